"""Data sets in files: torchvision's, parquet files, folders."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch.utils.data import Dataset

from wideberth.checks import InputError
from wideberth.data import (
    CIFAR10,
    CIFAR100,
    MNIST,
    SVHN,
    Data,
    FashionMNIST,
    ImageFolders,
    ImageNet,
    ParquetImages,
    loader,
)

Picture = Callable[..., Image.Image]


def refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        make()
    assert re.search(message, str(refusal.value)), str(refusal.value)
    assert "\n" not in str(refusal.value)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, encoded: list[bytes], labels: list[Any], column: str = "img", nest: bool = True) -> str:
    cells = [{"bytes": cell, "path": None} for cell in encoded] if nest else encoded
    pq.write_table(pa.table({column: cells, "label": labels}), path)
    return str(path)


# torchvision's


def test_mnist(real_data: Path) -> None:
    data = MNIST(str(real_data / "mnist"), download=False, train_rows=1000, validation=100)
    x, y, index = data.train().__getitems__(list(range(64)))
    assert x.shape == (64, *data.shape)
    assert x.min() == 0
    assert x.max() == 1
    assert data.train().source_size == 60_000
    assert torch.equal(data.train().labels[:64], y)
    assert index.max() < 1000
    data.prepare()


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST, CIFAR10, CIFAR100, SVHN])
def test_absent_files_are_refused(kind: Any, tmp_path: Path) -> None:
    refused(lambda: kind(str(tmp_path), download=False), f"root=.*there is no {tmp_path}.*download=True")


def arrays(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


@pytest.mark.parametrize(
    ("kind", "data", "targets"),
    [
        (MNIST, torch.from_numpy(arrays(3, 28, 28)), torch.arange(3)),
        (FashionMNIST, torch.from_numpy(arrays(3, 28, 28)), torch.arange(3)),
        (CIFAR10, arrays(3, 32, 32, 3), [0, 9, 2]),
        (CIFAR100, arrays(3, 32, 32, 3), [0, 99, 2]),
        (SVHN, arrays(3, 3, 32, 32), np.array([0, 9, 2])),
    ],
)
def test_layouts_of_torchvision(kind: Any, data: Any, targets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Opened:
        def __init__(self, root: Any, **options: Any) -> None:
            asked.append(options)
            self.data, self.targets, self.labels = data, targets, targets

    monkeypatch.setattr(f"torchvision.datasets.{kind.__name__}", Opened)
    made = kind("nowhere")
    made.prepare()
    train, test = ({"split": "train"}, {"split": "test"}) if kind is SVHN else ({"train": True}, {"train": False})
    assert asked == [{**train, "download": True}, {**test, "download": True}]
    x, y, _ = made.train().tensors()
    assert x.shape == (3, *made.shape)
    assert y.tolist() == list(targets)
    stored = np.asarray(data)
    images = np.moveaxis(stored, -1, 1) if stored.shape[-1] == 3 else stored.reshape(x.shape)
    assert np.array_equal((x * 255).round().numpy(), images)


def test_a_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error downloading:\nTried a mirror:\nno network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", fail)
    refused(
        CIFAR10(str(tmp_path)).train,
        f"root='{tmp_path}': cannot download CIFAR10 there: RuntimeError: Error downloading: Tried",
    )


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (folder / f"{part}-ubyte").write_bytes(b"broken")
    refused(MNIST(str(tmp_path), download=False).train, "cannot read MNIST there")


# parquet


@pytest.mark.parametrize(("column", "nest"), [("img", True), ("image", False)])
def test_parquet_images(tmp_path: Path, picture: Picture, column: str, nest: bool) -> None:
    pictures = [picture(i, 6, 5) for i in range(8)]
    path = write_parquet(tmp_path / "a.parquet", [png(p) for p in pictures], [0, 1, 2, 0, 1, 2, 0, 1], column, nest)
    data = ParquetImages(path, path, validation=2)
    assert (data.classes, data.shape) == (3, (3, 6, 5))
    x, y, _ = data.test().tensors()
    assert np.array_equal((x[3] * 255).round().permute(1, 2, 0).numpy(), np.asarray(pictures[3]))
    assert y.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    limited = ParquetImages(path, path, train_rows=5, validation=2)
    rows = limited.train()
    assert torch.equal(rows.tensors()[0], x[rows.rows])
    refused(ParquetImages(path, path, train_rows=9).train, "train_rows=9: ParquetImages has 8 train rows")


def test_grey_parquet_images_keep_one_channel(tmp_path: Path, picture: Picture) -> None:
    path = write_parquet(tmp_path / "a.parquet", [png(picture(i).convert("L")) for i in range(3)], [0, 1, 0])
    assert ParquetImages(path, path).shape == (1, 6, 6)


def test_cifar10_in_parquet(real_data: Path) -> None:
    folder = real_data / "cifar10"
    data = ParquetImages(str(folder / "train.parquet"), str(folder / "test.parquet"), train_rows=200, test_rows=100)
    assert (data.classes, data.shape) == (10, (3, 32, 32))
    assert len(data.train()) == 200
    x, y, _ = data.test().tensors()
    assert x.shape == (100, 3, 32, 32)
    assert 0.4 < x.mean() < 0.55
    assert torch.bincount(y, minlength=10).min() > 0


def test_bad_parquet_files_are_refused(tmp_path: Path, picture: Picture) -> None:
    good = write_parquet(tmp_path / "good.parquet", [png(picture(i)) for i in range(4)], [0, 1, 0, 1])
    refused(lambda: ParquetImages(good, str(tmp_path / "none.parquet")), "test='.*none.parquet': no such file")

    broken = tmp_path / "broken.parquet"
    broken.write_bytes(Path(good).read_bytes()[:-50])
    refused(lambda: ParquetImages(str(broken), good), "train='.*broken.parquet': not a readable parquet file")

    content = bytearray(Path(good).read_bytes())
    content[8:200] = bytes(192)
    corrupt = tmp_path / "corrupt.parquet"
    corrupt.write_bytes(content)
    refused(lambda: ParquetImages(good, str(corrupt)).test(), "test='.*corrupt.parquet': cannot")

    other = write_parquet(tmp_path / "other.parquet", [b"x"], [0], column="picture")
    refused(lambda: ParquetImages(good, other), "has no column image or img, only picture, label")
    refused(lambda: ParquetImages(good, good, label="fine"), "has no column fine, only img, label")

    text = write_parquet(tmp_path / "text.parquet", [png(picture(0))], ["cat"])
    refused(lambda: ParquetImages(text, good), "column label is string: must be integer classes")
    gaps = write_parquet(tmp_path / "gaps.parquet", [png(picture(0))] * 2, [0, None])
    refused(lambda: ParquetImages(gaps, good), "column label has missing values")
    empty = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(good).slice(0, 0), empty)
    refused(lambda: ParquetImages(str(empty), good), "empty.parquet': must have at least one row")
    paths = tmp_path / "paths.parquet"
    pq.write_table(pa.table({"img": ["a.png"], "label": [0]}), paths)
    refused(lambda: ParquetImages(str(paths), good), "column img is string: must be bytes")

    bad = write_parquet(tmp_path / "bad.parquet", [png(picture(0)), b"not an image"], [0, 1])
    refused(ParquetImages(good, bad).test, "bad.parquet': cannot decode the image of row 1")
    sizes = write_parquet(tmp_path / "sizes.parquet", [png(picture(0)), png(picture(0, 4, 6))], [0, 1])
    refused(ParquetImages(good, sizes).test, "the image of row 1 is 4x6: must be 6x6")
    many = write_parquet(tmp_path / "many.parquet", [png(picture(0))], [5])
    refused(ParquetImages(good, many).test, "labels of test='.*many.parquet' spans 5..5: with 2 classes")


# folders


def folders(root: Path, picture: Picture, test: str = "test") -> str:
    for part in ("train", test):
        for label, name in enumerate(("ants", "bees")):
            (root / part / name).mkdir(parents=True)
            for i in range(3):
                picture(10 * label + i, 9, 7 + label).save(root / part / name / f"{i}.png")
    return str(root)


@pytest.mark.parametrize("test", ["test", "val"])
def test_image_folders(tmp_path: Path, picture: Picture, test: str) -> None:
    data = ImageFolders(folders(tmp_path, picture, test), size=5, validation=2)
    assert (data.classes, data.shape) == (2, (3, 5, 5))
    x, y, index = data.test().tensors()
    assert x.shape == (6, 3, 5, 5)
    assert x.dtype == torch.float32
    assert x.max() <= 1
    assert y.tolist() == data.test().labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert index.tolist() == list(range(6))
    assert len(data.train()) == 4


def test_image_folders_are_read_by_workers(tmp_path: Path, picture: Picture) -> None:
    split = ImageFolders(folders(tmp_path, picture), size=5).train()
    batches = list(loader(split, 4, shuffle=True, workers=1))
    index = torch.cat([batch[2] for batch in batches])
    assert torch.equal(torch.cat([batch[0] for batch in batches]), split.tensors()[0][index])


def test_bad_folders_are_refused(tmp_path: Path, picture: Picture) -> None:
    refused(lambda: ImageFolders(str(tmp_path / "none")), "has no folder train; must hold train/")
    (tmp_path / "a" / "train").mkdir(parents=True)
    refused(lambda: ImageFolders(str(tmp_path / "a")), "train is empty; must hold one folder of images a class")
    root = folders(tmp_path / "b", picture)
    (tmp_path / "b" / "test" / "wasps").mkdir()
    refused(lambda: ImageFolders(root), "wasps is a class in only one of train and test")
    (tmp_path / "b" / "train" / "wasps").mkdir()
    refused(ImageFolders(root).train, "Found no valid file for the classes wasps")
    root = folders(tmp_path / "c", picture)
    (tmp_path / "c" / "train" / "ants" / "1.png").write_bytes(b"not an image")
    refused(ImageFolders(root, size=5).train().tensors, "ants/1.png: cannot decode this image")
    refused(lambda: ImageFolders(root, size=0), "size=0: must be at least 1")


def test_row_limits_of_folders_take_a_fixed_sample_of_all_classes(tmp_path: Path, picture: Picture) -> None:
    for label in range(10):
        for part in ("train", "test"):
            (tmp_path / part / f"{label}").mkdir(parents=True)
            for i in range(4):
                picture(i, 4, 4).save(tmp_path / part / f"{label}" / f"{i}.png")
    few, more = (ImageFolders(str(tmp_path), 4, train_rows=n, test_rows=n).test().rows for n in (8, 20))
    assert torch.equal(few, few.sort().values)
    assert set(few.tolist()) < set(more.tolist())
    limited = ImageFolders(str(tmp_path), 4, train_rows=20, validation=4)
    assert len(limited.train().labels.unique()) >= 6
    assert len(limited.train()) == 16
    assert torch.equal(ImageFolders(str(tmp_path), 4).test().rows, torch.arange(40))
    refused(ImageFolders(str(tmp_path), 4, test_rows=41).test, "test_rows=41: ImageFolders has 40 test rows")


# ImageNet


def imagenet(root: Path, picture: Picture, height: int = 20, width: int = 30) -> str:
    for part in ("train", "val"):
        for label, wnid in enumerate(("n01440764", "n01443537")):
            (root / part / wnid).mkdir(parents=True)
            for i in range(3):
                picture(10 * label + i, height, width).save(root / part / wnid / f"{part}_{i}.JPEG", format="PNG")
    (root / "test").mkdir()  # the unlabelled images
    picture(0).save(root / "test" / "ILSVRC2012_test_1.JPEG", format="PNG")
    return str(root)


def test_imagenet_crops_the_centre_of_enlarged_test_images_alone(tmp_path: Path, picture: Picture) -> None:
    # 14 of 16 pixels of the shorter side of 16: nothing is resized in the test, and the crop is known.
    data = ImageNet(imagenet(tmp_path, picture, 16, 20), size=14)
    assert (data.classes, data.shape) == (2, (3, 14, 14))
    x, y, _ = data.test().tensors()
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.asarray(picture(11, 16, 20))[1:15, 3:17]
    assert np.array_equal((x[4] * 255).round().permute(1, 2, 0).numpy(), expected)
    # Training images lose nothing of the shorter side.
    train = (data.train().tensors()[0][4] * 255).round().permute(1, 2, 0).numpy()
    resized = picture(11, 16, 20).resize((17, 14), Image.Resampling.BILINEAR)
    assert np.abs(train - np.asarray(resized, dtype=np.float32)[:, 2:16]).max() <= 1
    own = ImageNet(str(tmp_path), size=14, resize=14)
    assert torch.equal(own.test().tensors()[0], own.train().tensors()[0])
    assert ImageNet(str(tmp_path))._shorter == {True: 224, False: 256}


def test_imagenet_tests_the_images_of_a_list_in_its_order(tmp_path: Path, picture: Picture) -> None:
    root, file = imagenet(tmp_path, picture), tmp_path / "ids.txt"
    file.write_text("n01443537/val_2.JPEG\nn01440764/val_0.JPEG\n\nn01443537/val_0.JPEG\n")
    split = ImageNet(root, size=8, test_files=str(file)).test()
    assert split.rows.tolist() == [5, 0, 3]
    assert split.labels.tolist() == [1, 0, 1]
    assert torch.equal(split.tensors()[0], ImageNet(root, size=8).test().tensors()[0][[5, 0, 3]])
    limited = ImageNet(root, size=8, test_files=str(file), test_rows=2, train_rows=4)
    assert limited.test().rows.tolist() == [5, 0]
    assert len(limited.train()) == 4
    refused(ImageNet(root, test_files=str(file), test_rows=4).test, "names 3 images, not 4")
    file.write_text("n01443537/val_9.JPEG\n")
    refused(ImageNet(root, test_files=str(file)).test, "test_files='.*ids.txt': there is no n01443537/val_9.JPEG in")
    file.write_text("\n")
    refused(ImageNet(root, test_files=str(file)).test, "names 0 images, not any")
    refused(lambda: ImageNet(root, test_files="nowhere.txt"), "test_files='nowhere.txt': no such file")
    refused(lambda: ImageNet(root, size=8, resize=7), "resize=7: must be at least 8")
    (tmp_path / "val").rename(tmp_path / "validation")
    refused(lambda: ImageNet(root), "has no folder")


def test_a_config_names_imagenet_and_its_crops() -> None:
    parser = ArgumentParser()
    parser.add_argument("--data", type=Data)
    words = ["--data=wideberth.data.ImageNet", "--data.root=imagenet", "--data.test_rows=5000", "--data.validation=10"]
    assert parser.parse_args(words).data.init_args.as_dict() == {
        "root": "imagenet",
        "size": 224,
        "resize": None,
        "test_files": None,
        "train_rows": None,
        "test_rows": 5000,
        "validation": 10,
        "validation_seed": 0,
    }


# from a configuration


def test_a_config_names_data_and_records_every_choice() -> None:
    parser = ArgumentParser()
    parser.add_argument("--data", type=Data)
    config = parser.parse_args(["--data=wideberth.data.Digits", "--data.validation=97"])
    assert config.data.init_args.as_dict() == {
        "train_rows": None,
        "test_rows": None,
        "validation": 97,
        "validation_seed": 0,
    }
    assert len(parser.instantiate_classes(config).data.train()) == 1200


class Ramp(Dataset[Any]):
    """A user's data set, as a configuration names it."""

    def __init__(self, size: int = 3) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return torch.full((2,), row / self.size), row % 2


def test_a_config_names_a_users_data_sets() -> None:
    parser = ArgumentParser()
    parser.add_argument("--data", type=Data)
    ramp = f"{__name__}.Ramp"
    arguments = [f"--data.train={ramp}", "--data.train.size=5", f"--data.test={ramp}", "--data.classes=2"]
    data = parser.instantiate_classes(parser.parse_args(["--data=wideberth.data.FromDatasets", *arguments])).data
    assert (len(data.train()), len(data.test())) == (5, 3)
