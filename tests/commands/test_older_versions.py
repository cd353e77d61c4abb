"""What version 0.1 wrote is read; what a newer version wrote is refused, in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import wideberth as wb
from wideberth import schema
from wideberth.configuration import describe
from wideberth.runs import Run

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A run that version 0.1 trained for two epochs and evaluated: IAAT on digits, through the command line."""
    shutil.copytree(FIXTURES / "run-0.1", tmp_path / "old")
    return tmp_path / "old"


def test_it_says_nothing_of_a_version(old: Path) -> None:
    for file in ("config.yaml", "evaluation.json"):
        assert "schema_version" not in (old / file).read_text()
    assert "judge" in (old / "config.yaml").read_text()


def test_a_run_of_version_0_1_is_reported_and_compared(old: Path, wideberth: Any) -> None:
    code, out, err = wideberth("report", old)
    assert (code, err) == (0, "")
    assert (old / "report.html").stat().st_size > 10_000
    code, out, err = wideberth("compare", old, "--out", old / "trade_off.png")
    assert (code, err) == (0, "")
    assert "20.8" in out  # its clean accuracy, 5 of 24


def test_a_run_of_version_0_1_is_evaluated_again(old: Path, wideberth: Any) -> None:
    code, _, err = wideberth("evaluate", old, "--suite", "pgd", "--eps", "0.1", "--progress", "false")
    assert (code, err) == (0, "")
    before, now = Run(old).evaluations
    assert before.name == "evaluation"
    assert now.summary["schema_version"] == schema.VERSION
    for name in ("clean_accuracy", "robust_accuracy"):
        assert now.summary[name] == before.summary[name]
    assert {"job", "max_probability_margin"} <= set(before.samples)


def test_a_run_of_version_0_1_is_resumed(old: Path, wideberth: Any) -> None:
    words = ("train", "--config", old / "config.yaml", "--out", old, "--resume", "--epochs", "3", "--progress", "false")
    code, _, err = wideberth(*words)
    assert code == 0, err
    assert Run(old).metrics["epoch"].tolist() == [0, 1, 2]
    written = yaml.safe_load((old / "config.yaml").read_text())
    assert written["schema_version"] == schema.VERSION
    assert "judge" not in written
    assert written["validation_attack"]["class_path"] == "wideberth.attacks.PGD"
    checkpoint = torch.load(old / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["schema_version"] == schema.VERSION


def test_paths_that_version_0_1_wrote_from_python_are_those_of_today() -> None:
    old = yaml.safe_load((FIXTURES / "config-0.1-from-python.yaml").read_text())
    assert old["attack"]["class_path"] == "wideberth.attacks.gradient.PGD"
    new = schema.upgraded_configuration(old, "config.yaml")
    assert new["attack"] == describe(wb.attacks.PGD(steps=2))
    assert new["validation_attack"] == describe(wb.attacks.FGSM())
    assert new["regularizers"][0] == describe(wb.regularizers.InputGradient(0.01))
    assert new["data"]["class_path"] == "wideberth.data.Digits"
    assert new["model"]["class_path"] == "wideberth.models.MLP"
    assert schema.upgraded_configuration(new | {"schema_version": 2}, "config.yaml") == new


def test_what_is_described_is_named_by_the_package_that_exports_it() -> None:
    assert describe(wb.attacks.PGD())["class_path"] == "wideberth.attacks.PGD"
    assert (
        describe(wb.regularizers.EffectiveMargin(0.1))["class_path"]
        == "wideberth.training.regularizers.EffectiveMargin"
    )
    assert describe(wb.losses.margin_loss) == "wideberth.losses.margin_loss"
    assert describe(torch.optim.Adam) == "torch.optim.Adam"


@pytest.mark.parametrize("version", [99, "2", None, True, 0])
def test_a_newer_configuration_is_refused_in_one_line(version: object, old: Path, wideberth: Any) -> None:
    config = yaml.safe_load((old / "config.yaml").read_text())
    (old / "config.yaml").write_text(yaml.safe_dump({"schema_version": version} | config))
    commands: tuple[tuple[Any, ...], ...] = (
        ("report", old),
        ("compare", old),
        ("evaluate", old, "--suite", "pgd"),
        ("train", "--config", old / "config.yaml", "--out", old, "--resume"),
    )
    for words in commands:
        code, out, err = wideberth(*words)
        assert (code, out) == (2, ""), words
        assert len(err.splitlines()) == 1
        assert f"schema version {version!r}" in err


def test_a_newer_checkpoint_and_a_newer_evaluation_are_refused_in_one_line(old: Path, wideberth: Any) -> None:
    file = old / "checkpoints" / "last.ckpt"
    torch.save(torch.load(file, weights_only=True) | {"schema_version": 99}, file)
    code, out, err = wideberth("train", "--config", old / "config.yaml", "--out", old, "--resume", "--epochs", "3")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "schema version 99" in err
    record = old / "evaluation.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"schema_version": 99}))
    code, out, err = wideberth("compare", old)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "schema version 99" in err


def test_the_version_is_public() -> None:
    assert wb.__version__.startswith("0.")
