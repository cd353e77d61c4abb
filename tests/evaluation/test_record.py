"""Records: one folder for each protocol, nothing replaced unasked, files that belong together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from wideberth import runs
from wideberth.attacks import FGSM, PGD
from wideberth.checks import InputError
from wideberth.data import Digits
from wideberth.evaluation import Evaluation, evaluate
from wideberth.evaluation import record as record_module
from wideberth.evaluation.identity import describe_samples, describe_search, radii_summary, record_name
from wideberth.evaluation.protocol import Protocol
from wideberth.evaluation.state_file import StateFile
from wideberth.runs import Run

TABLE = pd.DataFrame(
    {
        "index": [3, 1, 4, 5],
        "clean_correct": [True, True, True, False],
        "robust": [True, False, True, False],
        "evaluations": [9, 4, 9, 1],
        "job": pd.array([pd.NA, 1, pd.NA, pd.NA], dtype="Int64"),
    }
)
PROTOCOL: dict[str, Any] = {
    "data": {"class_path": "wideberth.data.Digits", "init_args": {}},
    "split": "test",
    "rows": "all 4",
    "norm": "linf",
    "eps": 8 / 255,
    "box": [0.0, 1.0],
    "suite": "fast",
    "seed": 0,
    "radii": False,
    "attacks": [{"name": "PMA", "robust_accuracy": 0.5, "seconds": 1.0, "settings": {"steps": 3}}],
}


def evaluation(**change: Any) -> Evaluation:
    return Evaluation(TABLE.copy(), PROTOCOL | change)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_saved_record_is_loaded_as_it_was(tmp_path: Path) -> None:
    found = evaluation()
    folder = found.save(tmp_path / "new" / "run")
    assert folder.parent == tmp_path / "new" / "run" / "evaluations"
    assert sorted(file.name for file in folder.iterdir()) == ["checksums.txt", "evaluation.json", "evaluation.parquet"]
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    for place in (folder, tmp_path / "new" / "run"):
        loaded = Evaluation.load(place)
        assert_frame_equal(loaded.samples, found.samples)
        assert loaded.protocol == found.protocol
        assert loaded.summary() == found.summary()


def test_loading_nothing_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "not there"):
        with pytest.raises(InputError, match="holds no evaluation"):
            Evaluation.load(place)


@pytest.mark.parametrize(
    "change",
    [
        {"eps": 4 / 255}, {"norm": "l2"}, {"suite": "standard"}, {"seed": 1}, {"radii": True}, {"box": [0.0, 2.0]},
        {"rows": "the first 4 of 500"}, {"data": "TensorDataset"}, {"suite": "custom"},
    ],
)  # fmt: skip
def test_another_protocol_gets_a_folder_of_its_own(change: dict[str, Any], tmp_path: Path) -> None:
    first = evaluation().save(tmp_path)
    before = contents(first)
    second = evaluation(**change).save(tmp_path)
    assert second != first
    assert contents(first) == before
    assert [record.name for record in Run(tmp_path).evaluations] == [first.name, second.name]
    assert Evaluation.load(tmp_path).protocol == PROTOCOL | change  # the newest
    assert Evaluation.load(first).protocol == PROTOCOL


def test_names_can_be_read() -> None:
    assert evaluation().name.startswith("linf-0.0314-fast-n4-")
    assert len(evaluation().name) == len("linf-0.0314-fast-n4-") + 6


def test_custom_suites_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    x, y = torch.rand(6, 3), torch.arange(6) % 2
    model = torch.nn.Linear(3, 2)
    line_ups = [{"attack": FGSM()}, {"attack": PGD(steps=2)}, {"attack": PGD(steps=3)}]
    folders = {
        evaluate(model, (x, y), eps=0.1, suite=each, margin=False, examined=False).save(tmp_path) for each in line_ups
    }
    assert len(folders) == 3
    with pytest.raises(InputError, match="same protocol"):
        evaluate(model, (x, y), eps=0.1, suite=line_ups[0], margin=False, examined=False).save(tmp_path)


def test_the_same_protocol_is_refused_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    folder = evaluation().save(tmp_path)
    before = contents(folder)
    again = Evaluation(TABLE.assign(robust=False), PROTOCOL)
    with pytest.raises(InputError, match="same protocol") as refused:
        again.save(tmp_path)
    assert "--overwrite" in str(refused.value)
    assert folder.name in str(refused.value)
    assert contents(folder) == before
    assert again.save(tmp_path, overwrite=True) == folder
    assert Evaluation.load(folder).robust_accuracy == 0
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("when", ["parquet", "json", "rename"])
def test_a_failure_while_saving_leaves_what_was_there(when: str, tmp_path: Path, monkeypatch) -> None:
    state = tmp_path / "kept.state"
    state.touch()
    folder = evaluation().save(tmp_path)
    before = contents(folder)
    again = Evaluation(TABLE.assign(robust=False), PROTOCOL, state_files=(StateFile(state),))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if when == "parquet":
        monkeypatch.setattr(record_module.pq, "write_table", full)
    elif when == "json":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        rename = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda path, target: full() if target == folder and ".replaced" not in path.name
            else rename(path, target),
        )  # fmt: skip
    with pytest.raises(OSError, match="No space"):
        again.save(tmp_path, overwrite=True)
    assert contents(folder) == before
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    assert state.exists(), "the search could not go on from here"
    monkeypatch.undo()
    again.save(tmp_path, overwrite=True)
    assert not state.exists()


def test_files_of_two_evaluations_are_not_taken_for_one(tmp_path: Path) -> None:
    first, second = evaluation().save(tmp_path), evaluation(eps=0.1).save(tmp_path)
    shutil.copyfile(first / "evaluation.parquet", second / "evaluation.parquet")
    with pytest.raises(InputError, match="is damaged, or was changed"):
        Evaluation.load(second)
    (second / "checksums.txt").unlink()  # then the id in both files tells
    for read in (lambda: Evaluation.load(second), lambda: Run(tmp_path).evaluation_samples):
        with pytest.raises(InputError, match="is of another evaluation"):
            read()
    TABLE.to_parquet(second / "evaluation.parquet")
    with pytest.raises(InputError, match="is of another evaluation"):
        Evaluation.load(second)
    assert Evaluation.load(first).robust_accuracy == 0.5


@pytest.mark.parametrize("name", ["evaluation.json", "evaluation.parquet"])
def test_damaged_files_are_named_in_one_line(name: str, tmp_path: Path) -> None:
    folder = evaluation().save(tmp_path)
    (folder / name).write_bytes(b"\x00damaged\n\nfile")
    with pytest.raises(InputError, match="is damaged, or was changed"):
        Evaluation.load(tmp_path)
    (folder / "checksums.txt").unlink()
    with pytest.raises(InputError, match="cannot be read") as refused:
        Evaluation.load(tmp_path)
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("version", [99, "2", None])
def test_a_newer_schema_is_refused_in_one_line(version: object, tmp_path: Path) -> None:
    file = evaluation().save(tmp_path) / "evaluation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": version}))
    file.with_name("checksums.txt").unlink()
    with pytest.raises(InputError, match="schema version") as refused:
        _ = Run(tmp_path).evaluation
    assert "\n" not in str(refused.value)


# ---- version 0.1 ------------------------------------------------------------------------------------------------


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """The evaluation of version 0.1: two files in the run directory, without an id, with the old column names."""
    table = TABLE.rename(columns={"job": "run"}).assign(closest=[0.3, -0.1, 0.2, np.nan])
    table.to_parquet(tmp_path / "evaluation.parquet")
    found = Evaluation(TABLE, PROTOCOL).summary()
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    return tmp_path


def test_an_evaluation_of_version_0_1_is_read(old_run: Path) -> None:
    loaded = Evaluation.load(old_run)
    assert loaded.protocol == PROTOCOL
    assert {"job", "max_probability_margin"} <= set(loaded.samples)
    assert not {"run", "closest"} & set(loaded.samples)
    assert Run(old_run).evaluation_name == "evaluation"


def test_it_is_the_oldest_and_is_not_replaced(old_run: Path) -> None:
    before = (old_run / "evaluation.json").read_bytes()
    new = evaluation().save(old_run)
    assert [record.name for record in Run(old_run).evaluations] == ["evaluation", new.name]
    assert (old_run / "evaluation.json").read_bytes() == before
    assert "id" in (Run(old_run).evaluation or {})
    assert "id" not in (Run(old_run, "evaluation").evaluation or {})


def test_upgrading_leaves_todays_columns_alone() -> None:
    table = TABLE.assign(run=1, max_probability_margin=0.0, closest=1.0)
    assert_frame_equal(runs.upgraded(table), table)


# ---- a run with several -----------------------------------------------------------------------------------------


def test_a_run_is_read_with_the_evaluation_that_is_asked_for(tmp_path: Path) -> None:
    first, second = evaluation().save(tmp_path), evaluation(eps=0.1).save(tmp_path)
    assert (Run(tmp_path).evaluation or {})["eps"] == 0.1
    assert (Run(tmp_path, first.name).evaluation or {})["eps"] == 8 / 255
    with pytest.raises(InputError, match=f"evaluation='nope': .* holds {first.name}, {second.name}"):
        Run(tmp_path, "nope")


def test_what_is_being_written_is_no_evaluation(tmp_path: Path) -> None:
    folder = evaluation().save(tmp_path)
    shutil.copytree(folder, folder.with_name(f".{folder.name}.0123"))
    (folder.parent / "empty").mkdir()
    assert [record.name for record in Run(tmp_path).evaluations] == [folder.name]


def test_a_new_training_run_discards_all(tmp_path: Path) -> None:
    from wideberth.training.directory import ABOUT_THE_WEIGHTS, discard

    evaluation().save(tmp_path)
    evaluation(eps=0.1).save(tmp_path)
    discard(tmp_path, ABOUT_THE_WEIGHTS)
    assert list(tmp_path.iterdir()) == []


# ---- the name is known before the search ------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "radii"), [(None, False), (7, True)])
def test_the_name_before_the_search_is_the_name_after(rows: int | None, radii: bool, digits_model) -> None:
    from wideberth.commands.evaluate import planned_name

    search: dict[str, Any] = {"norm": "linf", "suite": "pgd", "seed": 3, "radii": radii, "margin": False}
    data = Digits(test_rows=9)
    protocol = Protocol(**search, box=data.box, batch_size=4, evidence=True)
    for eps in (0.1, torch.linspace(0, 0.3, 9)):
        found = evaluate(digits_model, data, eps=eps, **search, rows=rows, examined=False)
        assert planned_name(data, rows, protocol, eps) == found.name


@pytest.fixture
def digits_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))


def test_radii_of_samples_are_part_of_the_identity() -> None:
    def name(eps: torch.Tensor) -> str:
        protocol = Protocol("linf", (0.0, 1.0), "fast", 0, 8, margin=False, radii=False, evidence=False)
        return record_name(describe_samples(Digits(), "all 4") | describe_search(protocol, eps), len(eps), eps)

    one, other = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    assert name(one) == name(one.double()) == name(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))
    assert name(one) != name(other)
    assert name(one).startswith("linf-mean0.25-fast-n4-")
    saved = Evaluation(TABLE.assign(eps=one.numpy()), PROTOCOL | {"eps": radii_summary(one)})
    assert saved.name != Evaluation(TABLE.assign(eps=other.numpy()), PROTOCOL | {"eps": radii_summary(other)}).name


def test_where_nothing_can_be_written_it_is_said_before_the_search(tmp_path: Path) -> None:
    check: Callable[..., Path] = record_module.check_free
    (tmp_path / "evaluations").write_text("a file, where the folder should be")
    with pytest.raises(OSError, match="evaluations"):
        check(tmp_path, "name")
    (tmp_path / "evaluations").unlink()
    assert check(tmp_path, "name") == tmp_path / "evaluations" / "name"
    assert list((tmp_path / "evaluations").iterdir()) == []
