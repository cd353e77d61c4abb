"""Data sets by way of Hugging Face's `datasets`: a stand-in for it, and the library itself where it is installed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from wideberth.checks import InputError
from wideberth.data import Data, HuggingFace, loader

Picture = Callable[..., Image.Image]


class Table:
    """As much of `datasets.Dataset` as is used."""

    def __init__(self, columns: dict[str, list[Any]], features: dict[str, Any]) -> None:
        self.columns, self.features = columns, features

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def select_columns(self, name: str) -> Table:
        return Table({name: self.columns[name]}, {name: self.features[name]})

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: int | slice) -> dict[str, Any]:
        row = {name: values[key] for name, values in self.columns.items()}
        for value in row.values():
            if isinstance(value, Exception):
                raise value
        return row


LABELS = [0, 0, 0, 1, 2, 2]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, picture: Picture) -> dict[str, Table]:
    """The splits of the only data set that there is; what was asked for is kept in `hub["asked"]`."""
    pictures = [picture(i, 6, 5) for i in range(6)]
    features = {"img": None, "label": SimpleNamespace(num_classes=4)}
    splits: dict[str, Any] = {
        "train": Table({"img": pictures, "label": LABELS, "id": list("abcdef")}, {**features, "id": None}),
        "test": Table({"img": pictures[::-1], "label": LABELS[::-1]}, features),
        "asked": [],
    }

    def load_dataset(path: str, name: str | None = None, *, split: str, **options: Any) -> Table:
        splits["asked"].append((path, name, split, options))
        if split not in splits:
            raise ValueError(f"Unknown split\n{split}")
        table: Table = splits[split]
        return table

    datasets: Any = ModuleType("datasets")
    datasets.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    return splits


def refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        make()
    assert re.search(message, str(refusal.value)), str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_images_labels_and_classes_are_those_of_the_columns(hub: dict[str, Any], picture: Picture) -> None:
    data = HuggingFace("me/photos", "large", options={"revision": "v1"}, validation=2)
    assert hub["asked"] == [("me/photos", "large", split, {"revision": "v1"}) for split in ("train", "test")]
    assert (data.classes, data.shape) == (4, (3, 6, 5))
    x, y, index = data.test().tensors()
    assert np.array_equal((x[1] * 255).round().permute(1, 2, 0).numpy(), np.asarray(picture(4, 6, 5)))
    assert y.tolist() == data.test().labels.tolist() == LABELS[::-1]
    assert index.tolist() == list(range(6))
    assert len(data.train()) == 4


def test_labels_are_read_without_decoding(hub: dict[str, Any]) -> None:
    data = HuggingFace("photos")
    hub["train"].columns["img"][:] = [OSError("decoded")] * 6
    assert data.train().labels.tolist() == LABELS
    refused(data.train().tensors, "photos, train: cannot read the image of row 0: OSError: decoded")


def test_sizes_modes_and_numbers_of_classes(hub: dict[str, Any], picture: Picture) -> None:
    assert HuggingFace("photos", size=4).shape == (3, 4, 4)
    assert HuggingFace("photos", size=4).test().tensors()[0].shape == (6, 3, 4, 4)
    hub["test"].columns["img"][2] = picture(0, 7, 5)
    refused(HuggingFace("photos").test().tensors, "image of row 2 is 7x5: must be 6x5 as the first training")
    hub["train"].features["label"] = None
    assert HuggingFace("photos").classes == 3
    assert HuggingFace("photos", classes=9).classes == 9
    hub["train"].columns["img"][0] = picture(0, 6, 5).convert("L")
    grey = HuggingFace("photos")
    assert grey.shape == (1, 6, 5)
    assert grey.train().tensors()[0].shape == (6, 1, 6, 5)


def test_row_limits_take_a_sample(hub: dict[str, Any]) -> None:
    rows = HuggingFace("photos", train_rows=4).train().rows
    assert len(rows) == 4
    assert rows.tolist() != [0, 1, 2, 3]


def test_what_does_not_fit_is_refused(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    refused(
        lambda: HuggingFace("photos", test="fest"), "path='photos': datasets cannot load 'fest': ValueError: Unknown"
    )
    refused(lambda: HuggingFace("photos", image="pic"), "photos, train: has no column pic, only img, label, id")
    refused(lambda: HuggingFace("photos", label="fine"), "photos, train: has no column fine")
    refused(lambda: HuggingFace("photos", image="label"), "photos, train: column label holds int: must hold images")
    refused(lambda: HuggingFace("photos", size=0), "size=0: must be at least 1")
    refused(HuggingFace("photos", classes=2).train().tensors, "labels of photos, train spans 0..2: with 2 classes")
    hub["train"].columns["label"] = [0, None, 1, 1, 1, 1]
    refused(lambda: HuggingFace("photos").train().labels, "column label must hold integer classes, in every row")
    hub["train"] = Table({"picture": [], "label": []}, {"picture": None, "label": None})
    refused(lambda: HuggingFace("photos"), "has no column image or img, only picture, label")
    hub["train"] = Table({"img": [], "label": []}, {"img": None, "label": None})
    refused(lambda: HuggingFace("photos"), "cannot read the image of row 0")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(lambda: HuggingFace("photos"), r"datasets is not installed; pip install 'wideberth\[hub\]'")


def test_a_config_names_it(hub: dict[str, Any]) -> None:
    parser = ArgumentParser()
    parser.add_argument("--data", type=Data)
    words = ["--data=wideberth.data.HuggingFace", "--data.path=me/photos", "--data.size=4", "--data.test_rows=3"]
    config = parser.parse_args([*words, '--data.options={"revision": "v1"}'])
    assert len(parser.instantiate(config).data.test()) == 3
    assert hub["asked"][0] == ("me/photos", None, "train", {"revision": "v1"})


def test_the_library_itself_reads_a_folder(tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("datasets")
    for part in ("train", "test"):
        for label, name in enumerate(("ants", "bees")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                picture(10 * label + i, 6, 5).save(tmp_path / part / name / f"{i}.png")
    data = HuggingFace(str(tmp_path), options={"cache_dir": str(tmp_path / "cache")})
    assert (data.classes, data.shape) == (2, (3, 6, 5))
    x, y, _ = data.test().tensors()
    assert y.tolist() == data.test().labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal((x[4] * 255).round().permute(1, 2, 0).numpy(), np.asarray(picture(11, 6, 5)))
    batches = list(loader(data.train(), 4, shuffle=True, workers=1))
    assert torch.cat([batch[2] for batch in batches]).sort().values.tolist() == list(range(6))
