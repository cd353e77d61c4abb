"""Bad input is refused in one clear line with exit code 2; nothing is written and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from wideberth.runs import Run

TRAIN = ("train", "--config", "digits/pgd-at", "--epochs=1", "--progress=false", "--out", "new")

# words after the command, and what the line must name
REFUSED = {
    "unknown option": (("--nope", "3"), ["--nope"]),
    "unknown recipe": (("--config", "nope"), ["nope", "digits/standard"]),
    "unknown class": (("--radius", "Nope"), ["radius", "Nope"]),
    "unknown argument of a class": (("--attack.stepz", "3"), ["attack", "stepz"]),
    "negative eps": (("--radius.eps", "-1"), ["eps", "-1", "at least 0"]),
    "division by zero": (("--radius.eps", "8/0"), ["radius.eps", "float", "8/0"]),
    "not a number": (("--radius.eps", "abc"), ["radius.eps", "float", "abc"]),
    "unknown norm": (("--attack.norm", "l7"), ["attack.norm", "linf", "l7"]),
    "no steps": (("--attack.steps", "0"), ["steps=0", "at least 1"]),
    "no epochs": (("--epochs", "0"), ["epochs=0", "at least 1"]),
    "empty batches": (("--batch_size", "0"), ["batch_size=0", "at least 1"]),
    "one-column model": (
        ("--model", "wideberth.models.MLP", "--model.shape=[1,8,8]", "--model.classes=1"),
        ["classes=1"],
    ),
    "wrong number of classes": (("--model.classes", "7"), ["7 logits", "10 classes"]),
    "wrong input shape": (("--model.shape", "[3,8,8]"), ["shape"]),
    "missing folder": (("--data", "ImageFolders", "--data.root", "/nowhere"), ["/nowhere"]),
    "missing data": (("--data", "MNIST", "--data.root", "empty", "--data.download=false"), ["empty"]),
    "box that the data leaves": (("--attack.box", "[-1,0.5]"), ["box", "(0.0, 1.0)"]),
    "radii without adversary": (
        ("--radius", "InstanceAdaptive", "--objective", "CleanCrossEntropy"),
        ["InstanceAdaptive", "CleanCrossEntropy"],
    ),
    "attack that never moves": (("--objective", "TRADES", "--attack.start", "none"), ["start", "TRADES"]),
    "option of a class that is not named": (("--objective.loss", "LabelSmoothing"), ["--objective CLASS", "first"]),
    "best of nothing": (("--keep", "best"), ["keep", "held out"]),
    "weights without attack": (
        ("--weighting", "GAIRAT", "--radius", "Zero"),
        ["GAIRAT", "Zero"],
    ),
    "unknown trainer option": (("--trainer.nope", "3"), ["nope"]),
    "nothing to resume": (("--resume",), ["new", "last.ckpt"]),
}


def one_line(err: str, command: str) -> str:
    """The single line that was printed."""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith(f"wideberth {command}: error: ")
    assert "Traceback" not in err
    assert len(lines[0]) < 420
    return lines[0]


@pytest.mark.parametrize(("words", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_training_refuses(words: tuple[str, ...], named: list[str], wideberth) -> None:
    code, out, err = wideberth(*TRAIN, *words)
    line = one_line(err, "train")
    assert (code, out) == (2, "")
    assert [word for word in named if word not in line] == []
    assert not Path("new").exists(), "something was written"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--eps", "-1"), ["eps=-1", ">= 0"]),
        (("--eps", "8/0"), ["eps", "8/0"]),
        (("--suite", "nope"), ["suite", "pgd"]),
        (("--norm", "l7"), ["norm", "linf"]),
        (("--rows", "0"), ["rows=0"]),
        (("--weights", "nope.safetensors"), ["--out", "--weights"]),
        (("--weights", "nope.safetensors", "--out", "other"), ["nope.safetensors"]),
        (("--out", "margins.txt"), []),
    ],
)
def test_evaluation_refuses(words: tuple[str, ...], named: list[str], digits_run: Path, wideberth) -> None:
    command = "margins" if "margins.txt" in words else "evaluate"
    code, _, err = wideberth(command, digits_run, *words)
    line = one_line(err, command)
    assert code == 2
    assert [word for word in named if word not in line] == []


@pytest.mark.parametrize(
    "model", ["missing/run", "nope.safetensors", "timm/", "no.such.module:net", "torchvision/nope"]
)
def test_a_model_that_is_not_there(model: str, wideberth) -> None:
    code, _, err = wideberth("evaluate", model, "--data", "Digits")
    assert code == 2
    assert model.split("/")[-1].split(":")[0] in one_line(err, "evaluate")


def test_commands_on_what_is_no_run(wideberth, tmp_path: Path) -> None:
    for command, where in (("compare", "nothing"), ("report", "nothing"), ("report", tmp_path), ("compare", tmp_path)):
        code, _, err = wideberth(command, where)
        assert code == 2
        one_line(err, command)


def test_truncated_and_foreign_parquet(wideberth) -> None:
    good = pd.DataFrame({"img": [{"bytes": b"no image", "path": None}], "label": [0]})
    good.to_parquet("good.parquet")
    Path("cut.parquet").write_bytes(Path("good.parquet").read_bytes()[:-20])
    pd.DataFrame({"a": [1]}).to_parquet("columns.parquet")
    for name in ("cut", "columns", "good"):
        words = ("--data", "ParquetImages", "--data.train", f"{name}.parquet", "--data.test", f"{name}.parquet")
        code, _, err = wideberth(*TRAIN, *words)
        assert code == 2
        assert f"{name}.parquet" in one_line(err, "train")
        assert not Path("new").exists()


def test_a_finished_run_is_neither_overwritten_nor_lost(digits_run: Path, wideberth) -> None:
    before = {file: file.read_bytes() for file in digits_run.rglob("*") if file.is_file()}
    code, _, err = wideberth("train", "--config", "digits/iaat", "--out", digits_run)
    assert code == 2
    assert "--overwrite" in one_line(err, "train")
    assert {file: file.read_bytes() for file in digits_run.rglob("*") if file.is_file()} == before


def test_labels_out_of_range_and_data_outside_the_box(wideberth) -> None:
    from wideberth import InputError
    from wideberth.data import Tensors

    x, y = torch.rand(20, 3), torch.arange(20) % 3
    with pytest.raises(InputError, match=r"0\.\.1"):
        Tensors(x, y, x, y, classes=2)
    with pytest.raises(InputError, match=r"box"):
        Tensors(3 * x + 1, y, x, y)
    assert np.isfinite(x.numpy()).all()


def test_a_loss_that_is_nan_stops_and_keeps_the_last_checkpoint(wideberth) -> None:
    words = ("train", "--config", "digits/standard", "--epochs=4", "--progress=false", "--out", "nan")
    # The learning rate explodes when the third epoch begins: two good checkpoints lie behind it.
    schedule = (
        "--scheduler",
        "torch.optim.lr_scheduler.MultiStepLR",
        "--scheduler.milestones=[2]",
        "--scheduler.gamma=1e30",
    )
    code, _, err = wideberth(*words, *schedule)
    line = one_line(err, "train")
    assert code == 2
    assert "not finite at step 4" in line or "not finite at step 5" in line, line
    run = Run("nan")
    assert not run.finished
    state = torch.load(run.checkpoint, weights_only=True)
    assert state["epoch"] == 1
    assert all(bool(torch.isfinite(v).all()) for v in state["state_dict"].values() if v.is_floating_point())
