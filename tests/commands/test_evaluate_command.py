"""`wideberth evaluate`: what it attacks by default, radii from a file, and records that are never replaced unasked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from wideberth.checks import InputError
from wideberth.commands import evaluate as command
from wideberth.commands.parsing import with_flags
from wideberth.commands.threat import radii_of, threat, trained_for
from wideberth.data import Digits, Tensors
from wideberth.evaluation import Evaluation
from wideberth.runs import Run

DIGITS = Digits()
RADII = "wideberth.training.radii"


def config(radius: dict[str, Any] | None, norm: str | None = "linf", attack: str = "wideberth.attacks.PGD") -> Any:
    return {"attack": {"class_path": attack, "init_args": {"norm": norm} if norm else {}}, "radius": radius}


# ---- norm and radius by default ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("radius", "eps"),
    [
        ({"class_path": f"{RADII}.Fixed", "init_args": {"eps": 0.25, "warmup": 3}}, 0.25),
        ({"class_path": f"{RADII}.InstanceAdaptive", "init_args": {"eps": 0.15}}, 0.15),
        ({"class_path": f"{RADII}.Zero", "init_args": {}}, 0.0),
        (None, 0.0),
        ({"class_path": "mine.ByConfidence", "init_args": {"eps": 0.1}}, None),
        (
            {
                "class_path": f"{RADII}.Fixed",
                "init_args": {
                    "eps": {
                        "class_path": "wideberth.training.schedules.Ramp",
                        "init_args": {"value": 0.5, "epochs": 4},
                    }
                },
            },
            0.5,
        ),
    ],
)
def test_the_radius_that_a_run_was_trained_for(radius: dict[str, Any] | None, eps: float | None) -> None:
    found = trained_for(config(radius, "l2"))
    assert (found.norm, found.eps) == ("l2", eps)


@pytest.mark.parametrize("path", ["wideberth.runs:os.system", "wideberth.runs:Run", "wideberth.runs:shorten"])
def test_a_configuration_calls_nothing_but_policies_and_schedules(path: str, monkeypatch) -> None:
    import os

    monkeypatch.setattr(os, "system", lambda _: pytest.fail("was called"))
    with pytest.raises(InputError, match="neither a radius policy nor a schedule"):
        trained_for(config({"class_path": path, "init_args": {"command": "true"}}))


def test_a_configuration_does_not_open_the_current_directory_to_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(InputError, match=r"config\.yaml: radius: 'wideberth\.nowhere\.Fixed'"):
        trained_for(config({"class_path": "wideberth.nowhere.Fixed"}))
    assert str(tmp_path) not in sys.path


def test_defaults_follow_the_run_and_say_so(digits_run: Path) -> None:
    found = threat(str(digits_run), None, None, DIGITS)
    assert (found.norm, found.eps) == ("linf", 0.15)
    assert f"attack of {digits_run}" in found.reason
    assert "eps 0.15 (radius InstanceAdaptive" in found.reason
    found = threat(str(digits_run), "l2", 0.5, DIGITS)
    assert (found.norm, found.eps) == ("l2", 0.5)
    assert found.reason.count("as asked for") == 2
    with pytest.raises(InputError, match="--eps: needed with --norm l2"):
        threat(str(digits_run), "l2", None, DIGITS)


def test_defaults_of_what_is_no_run_or_was_not_attacked(digits_run: Path, tmp_path: Path) -> None:
    found = threat("timm/resnet18", None, None, DIGITS)
    assert (found.norm, found.eps) == ("linf", 8 / 255)
    assert "eps 8/255 (the default)" in found.reason
    (tmp_path / "config.yaml").write_text("attack: null\nradius: null\n")
    found = threat(str(tmp_path), None, None, DIGITS)
    assert (found.norm, found.eps) == ("linf", 8 / 255)
    assert "was trained without perturbations" in found.reason
    (tmp_path / "config.yaml").write_text(
        "radius: {class_path: mine.Own}\nattack: {class_path: wideberth.attacks.PGD, init_args: {norm: l2}}"
    )
    with pytest.raises(InputError, match="--eps: needed, since only the class Own"):
        threat(str(tmp_path), None, None, DIGITS)


# ---- one radius per sample --------------------------------------------------------------------------------------


@pytest.fixture
def table() -> pd.DataFrame:
    split = DIGITS.test()
    return pd.DataFrame({"index": split.rows, "label": split.labels, "radius": torch.linspace(0, 1, len(split))})


def test_radii_are_matched_by_index(table: pd.DataFrame, tmp_path: Path) -> None:
    file = tmp_path / "some:where.parquet"
    table.sample(frac=1, random_state=0).to_parquet(file)
    assert torch.equal(radii_of(f"{file}:radius", DIGITS), torch.linspace(0, 1, 500))
    table.drop(columns="index").to_parquet(file)
    assert torch.equal(radii_of(f"{file}:radius", DIGITS), torch.linspace(0, 1, 500))
    table.iloc[:40].to_parquet(file)
    fewer = radii_of(f"{file}:radius", DIGITS, rows=40)
    assert torch.equal(fewer[:40], torch.linspace(0, 1, 500)[:40])
    assert len(fewer) == 500
    assert not fewer[40:].any()
    found = threat("timm/resnet18", "l2", f"{file}:radius", DIGITS, rows=40)
    assert "one radius per sample, mean 0.03908 (0 to 0.07816)" in found.reason


def test_a_file_that_cannot_be_used_is_refused_in_one_line(table: pd.DataFrame, tmp_path: Path) -> None:
    file = tmp_path / "radii.parquet"

    def refused(change: pd.DataFrame | None, message: str, text: str = f"{file}:radius") -> None:
        if change is not None:
            change.to_parquet(file)
        with pytest.raises(InputError) as found:
            radii_of(text, DIGITS)
        assert message in str(found.value)
        assert "\n" not in str(found.value)

    refused(None, "there is no file")
    refused(table, "no column 'nope' of numbers; there are index, label, radius", f"{file}:nope")
    refused(None, "must be a number such as 8/255, or FILE.parquet:COLUMN", "abc")
    refused(None, "must be a number such as 8/255, or FILE.parquet:COLUMN", str(file))
    refused(table.iloc[3:], "has no radius for 3 of 500 test samples: index 0, 1, 2")
    refused(table.iloc[3:].drop(columns="index"), "has 497 rows and no column 'index', the test split 500")
    refused(table.assign(radius=table["radius"].where(table["index"] != 7)), "no radius for 1 of 500")
    refused(table.assign(radius=-1.0), "negative or infinite")
    refused(table.assign(radius=float("inf")), "negative or infinite")
    refused(pd.concat([table, table]), "twice")
    refused(table.assign(label=0), "its labels are not those of the test samples")
    refused(table.assign(radius="a"), "no column 'radius' of numbers")
    file.write_bytes(b"no parquet")
    refused(None, "cannot be read")


# ---- records ----------------------------------------------------------------------------------------------------


@pytest.fixture
def searched(monkeypatch) -> list[dict[str, Any]]:
    """What `evaluate` was called with."""
    calls: list[dict[str, Any]] = []
    evaluate = command.evaluate

    def counted(*arguments: Any, **options: Any) -> Evaluation:
        calls.append(options)
        return evaluate(*arguments, **options, examined=False)

    monkeypatch.setattr(command, "evaluate", counted)
    return calls


def test_no_evaluation_is_lost(digits_run: Path, tmp_path: Path, wideberth, searched: list[dict[str, Any]]) -> None:
    words = (
        "evaluate",
        digits_run,
        "--out",
        "kept",
        "--suite",
        "pgd",
        "--rows",
        20,
        "--margin=false",
        "--progress=false",
    )
    code, out, err = wideberth(*words)
    assert code == 0, err
    assert "eps 0.15 (radius InstanceAdaptive" in out
    (first,) = Run("kept").evaluations
    assert f"saved: {first.path}" in out
    code, _, err = wideberth(*words)
    assert (code, len(err.splitlines()), len(searched)) == (2, 1, 1), "refused before the search"
    assert str(first.path) in err
    assert "--overwrite" in err
    assert wideberth(*words, "--eps", "8/255")[0] == 0
    assert wideberth(*words, "--rows", 10)[0] == 0
    assert wideberth(*words, "--overwrite")[0] == 0
    names = [record.name for record in Run("kept").evaluations]
    assert [name.rsplit("-", 1)[0] for name in names] == [
        "linf-0.0314-pgd-n20",
        "linf-0.15-pgd-n10",
        "linf-0.15-pgd-n20",
    ]
    assert not list(Path("kept/evaluations").glob("*.state*"))
    code, out, _ = wideberth("evaluate", digits_run, "--out", "kept", "--list")
    assert (code, len(searched)) == (0, 4)
    assert all(name in out.replace("\n", "") for name in names)


def test_a_directory_that_cannot_be_written_is_noticed_first(
    digits_run: Path, wideberth, searched: list[dict[str, Any]]
) -> None:
    Path("kept").mkdir()
    Path("kept/evaluations").write_text("a file")
    code, _, err = wideberth("evaluate", digits_run, "--out", "kept", "--suite", "pgd", "--rows", 5)
    assert (code, len(err.splitlines()), searched) == (2, 1, [])


def test_what_was_searched_stays_until_the_record_is_saved(
    digits_run: Path, wideberth, searched: list[dict[str, Any]], monkeypatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "evaluation.json")

    monkeypatch.setattr(Evaluation, "save", full)
    words = ("evaluate", digits_run, "--out", "kept", "--suite", "pgd", "--rows", 5, "--progress=false")
    code, _, err = wideberth(*words)
    assert (code, "No space left" in err) == (2, True)
    assert len(list(Path("kept/evaluations").glob("linf-*.state"))) == 1
    assert searched


def test_radii_of_a_file_reach_the_search(digits_run: Path, table: pd.DataFrame, wideberth, monkeypatch) -> None:
    calls: list[dict[str, Any]] = []

    def stop(*_: Any, **options: Any) -> Evaluation:
        calls.append(options)
        raise InputError("enough")

    monkeypatch.setattr(command, "evaluate", stop)
    table.to_parquet("radii.parquet")
    code, out, _ = wideberth("evaluate", digits_run, "--eps", "radii.parquet:radius", "--out", "kept")
    assert code == 2
    assert "one radius per sample, mean 0.5 (0 to 1) (from radii.parquet:radius)" in out
    assert torch.equal(calls[0]["eps"], torch.linspace(0, 1, 500))
    assert Path(calls[0]["state"]).name.startswith("linf-mean0.5-fast-n500-")


def test_options_that_are_yes_or_no_need_no_value() -> None:
    words = ["run", "--radii", "--rows", "3", "--margin", "false", "--progress=false", "--list"]
    expected = ["run", "--radii=true", "--rows", "3", "--margin", "false", "--progress=false", "--list=true"]
    assert with_flags(words, command.run) == expected


# ---- which rows -------------------------------------------------------------------------------------------------


def test_fewer_rows_of_data_by_class_are_mixed(digits_run: Path, wideberth, searched: list[dict[str, Any]]) -> None:
    class ByClass(Tensors):
        _by_class = True

    split = DIGITS.test()
    order = split.labels.argsort()
    x, y = split.tensors()[0][order], split.labels[order]
    data, limited = ByClass(x, y, x, y), ByClass(x, y, x, y, test_rows=24)
    model, _ = command.subject(str(digits_run), None, None, None)
    found = command.evaluate(model, data, eps=0.0, suite="pgd", rows=24, margin=False)
    assert found.samples["index"].tolist() == limited.test().rows.tolist()
    assert found.samples["label"].nunique() > 5
    assert found.protocol["rows"] == "a fixed random sample of 24 of 500"
