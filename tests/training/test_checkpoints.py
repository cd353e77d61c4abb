"""The checkpoints of a run killed at any moment: it goes on, and exports what it would have exported."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import lightning.fabric.plugins.io.torch_io as torch_io
import numpy as np
import pandas as pd
import pytest
import torch
from training_tools import adam, fit, mlp, tensors

import wideberth as wb
from wideberth import checksums
from wideberth.training.checkpoints import Keep, load
from wideberth.training.radii import InstanceAdaptive

BEST = [0, 1, 1]
"""The best epoch after each: the end of one with a new best is cut short, and of one without."""


def exploding(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 2 else -3.0)


def train(out: Path, keep: Keep = "best", **options: Any) -> wb.Run:
    given = {
        "radius": InstanceAdaptive(0.02, gamma=0.02, warmup=0),
        "optimizer": adam,
        "scheduler": exploding,
        "attack": wb.attacks.PGD(steps=1),
        "epochs": len(BEST),
        "batch_size": 16,
        "seed": 1,
    }
    return fit(mlp(), tensors(60, validation=20), out, keep=keep, **(given | options))


def outcome(run: wb.Run) -> dict[str, Any]:
    """What the run exported and recorded, to compare."""
    metrics, samples, radii = run.metrics, run.samples, run.radii
    assert metrics is not None
    assert samples is not None
    assert radii is not None
    tables = (metrics.drop(columns="seconds"), samples, radii)
    return {
        "weights": (run.path / "model.safetensors").read_bytes(),
        "export": run.export,
        "tables": [table.to_csv() for table in tables],
        "kept": epochs_of(run.path),
    }


def epochs_of(out: Path) -> tuple[int, int]:
    """Of which epochs last.ckpt and best.ckpt are."""
    last, best = (load(out / "checkpoints" / f"{name}.ckpt").epoch for name in ("last", "best"))
    return last, best


class Killed(BaseException):
    """Nothing of the process runs any more."""


class Disk:
    """Counts what is about to be done to files; from the nth on (`dead`), or at the nth alone, it raises instead.

    What removes files is not counted, and fails only where the process is dead.
    """

    def __init__(self, patch: pytest.MonkeyPatch, nth: int = 10**6, *, dead: bool = False) -> None:
        self.count, self.nth, self.dead = 0, nth, dead
        for owner, name in (
            (Path, "replace"),
            (Path, "write_text"),
            (shutil, "copyfile"),
            (checksums, "note"),
            (torch_io, "_atomic_save"),
            (pd.DataFrame, "to_csv"),
            (pd.DataFrame, "to_parquet"),
            (np, "savez_compressed"),
        ):
            patch.setattr(owner, name, self._watched(getattr(owner, name)))
        patch.setattr(Path, "unlink", self._watched(Path.unlink, counted=0))
        # A link that cannot be made is no failure: the file is copied.
        patch.setattr(os, "link", self._watched(os.link, counted=int(dead)))

    def _watched(self, function: Callable[..., Any], counted: int = 1) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.count += counted
            if (counted and self.count == self.nth) or (self.dead and self.count > self.nth):
                raise Killed if self.dead else OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return watched


@pytest.mark.parametrize(
    ("keep", "epochs", "dead", "part"),
    [
        ("best", 3, True, (0.35, 0.8)),  # at the ends of the second epoch, a new best, and of the third
        ("best", 2, True, (0.5, 1)),  # at the end of the last epoch and at the export
        ("last", 2, True, (0.5, 0.8)),
        ("best", 2, False, (0.5, 0.9)),
    ],
    ids=["killed", "killed at a last epoch that is the best", "killed, keep=last", "full disk"],
)
def test_a_run_stopped_at_any_write_goes_on_to_the_same_end(
    keep: Keep, epochs: int, dead: bool, part: tuple[float, float], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        straight = train(tmp_path / "straight", keep, epochs=epochs)
    assert straight.metrics is not None
    scores = straight.metrics["validation_robust"]
    assert [int(scores[: epoch + 1].idxmax()) for epoch in range(epochs)] == BEST[:epochs]
    assert straight.export is not None
    assert straight.export["epoch"] == (BEST[epochs - 1] if keep == "best" else epochs - 1)
    wanted = outcome(straight)
    count, seen = disk.count, set()
    for nth in range(1 + int(part[0] * count), 1 + int(part[1] * count)):
        out = tmp_path / f"{nth}"
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, nth, dead=dead)
            with pytest.raises(Killed if dead else OSError):
                train(out, keep, epochs=epochs)
        seen.add(epochs_of(out))
        resumed = train(out, keep, epochs=epochs, resume=True)
        assert outcome(resumed) == wanted, f"stopped before write {nth} of {count}"
    # It was stopped before a new best was saved, between best.ckpt and last.ckpt, and after it.
    assert {(0, 0), (0, 1), (1, 1)} <= seen


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs, of which the second was the best; do not write into it."""
    return train(tmp_path_factory.mktemp("finished") / "run").path


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def refused(out: Path, message: str, **options: Any) -> None:
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(wb.InputError, match=message) as refusal:
        train(out, resume=True, **options)
    assert "\n" not in str(refusal.value)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("epochs", [3, 4], ids=["to export", "to go on"])
def test_a_best_checkpoint_of_another_epoch_is_refused(copied: Path, epochs: int) -> None:
    best = copied / "checkpoints" / "best.ckpt"
    shutil.copyfile(copied / "checkpoints" / "last.ckpt", best)
    refused(copied, r"checkpoints/best.ckpt': is of epoch 3, and epoch 2 was the best", epochs=epochs)
    best.unlink()
    refused(copied, r"checkpoints/best.ckpt': is missing", epochs=epochs)


def test_a_best_checkpoint_that_changes_under_way_is_not_exported(tmp_path: Path) -> None:
    class Swap(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            shutil.copyfile(tmp_path / "run/checkpoints/last.ckpt", tmp_path / "run/checkpoints/best.ckpt")

    with pytest.raises(wb.InputError, match=r"best.ckpt': is of epoch 3, and epoch 2 was the best"):
        train(tmp_path / "run", trainer={"callbacks": [Swap()]})
    assert not wb.Run(tmp_path / "run").finished


def test_a_run_that_keeps_its_last_epoch_goes_on_without_the_best(tmp_path: Path) -> None:
    out = train(tmp_path / "run", "last").path
    (out / "checkpoints" / "best.ckpt").write_bytes(b"damaged")
    assert train(out, "last", epochs=4, resume=True).export == {"epoch": 3, "keep": "last", "ended": None}


def test_epochs_are_counted_from_the_newest_checkpoint(
    copied: Path, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed when the second epoch, a new best, was in best.ckpt and not yet in last.ckpt."""
    first = train(tmp_path / "first", epochs=1).path
    shutil.copyfile(first / "checkpoints" / "last.ckpt", copied / "checkpoints" / "last.ckpt")
    (copied / "checkpoints" / "checksums.txt").unlink()
    refused(copied, "epochs=1: 2 are done", epochs=1)
    resumed = train(copied, resume=True)
    said = "best.ckpt' is one epoch newer than last.ckpt: training goes on after epoch 2\n"
    assert said.strip() in caplog.text
    assert outcome(resumed) == outcome(wb.Run(finished))


# ---- a damaged checkpoint -------------------------------------------------------------------------------------------


def flip(file: Path, place: float) -> None:
    """Change one bit, at a share of the file's length."""
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x04
    file.write_bytes(content)


@pytest.mark.parametrize("place", [0, 0.2, 0.4, 0.6, 0.8, 1])
def test_a_damaged_last_checkpoint_costs_one_epoch(
    copied: Path, finished: Path, place: float, caplog: pytest.LogCaptureFixture
) -> None:
    flip(copied / "checkpoints" / "last.ckpt", place)
    before = (copied / "checkpoints" / "previous.ckpt").read_bytes()
    resumed = train(copied, resume=True)
    (line,) = caplog.messages
    assert f"{str(copied / 'checkpoints' / 'last.ckpt')!r}: is damaged" in line
    assert line.endswith("training goes on from previous.ckpt, after epoch 2")
    assert outcome(resumed) == outcome(wb.Run(finished))
    # The damaged one did not become the previous one.
    assert (copied / "checkpoints" / "previous.ckpt").read_bytes() == before
    caplog.clear()
    assert train(copied, resume=True).finished
    assert caplog.messages == []


def test_the_newer_of_the_other_checkpoints_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The last epoch was the best: nothing is lost with last.ckpt."""
    out = train(tmp_path / "run", epochs=2).path
    wanted = outcome(wb.Run(out))
    flip(out / "checkpoints" / "last.ckpt", 0.5)
    resumed = train(out, epochs=2, resume=True)
    assert caplog.messages[-1].endswith("training goes on from best.ckpt, after epoch 2")
    assert outcome(resumed) == wanted
    assert (out / "checkpoints" / "last.ckpt").read_bytes() == (out / "checkpoints" / "best.ckpt").read_bytes()


def test_killed_in_the_first_epoch_between_best_and_last(copied: Path, finished: Path) -> None:
    first = train(copied.with_name("first"), epochs=1).path
    (first / "checkpoints" / "last.ckpt").unlink()
    (first / "model.safetensors").unlink()
    with pytest.raises(wb.InputError, match="holds an unfinished run"):
        train(first)
    assert outcome(train(first, resume=True)) == outcome(wb.Run(finished))


def test_without_a_sound_checkpoint_nothing_is_resumed(copied: Path) -> None:
    for name in ("last", "previous", "best"):
        flip(copied / "checkpoints" / f"{name}.ckpt", 0.5)
    refused(copied, r"last.ckpt': is damaged, .*; and there is no other checkpoint to go on from")


@pytest.mark.parametrize("epochs", [3, 4], ids=["to export", "to go on"])
def test_a_damaged_best_checkpoint_is_not_exported(copied: Path, epochs: int) -> None:
    flip(copied / "checkpoints" / "best.ckpt", 0.5)
    refused(copied, r"best.ckpt': is damaged", epochs=epochs)


def test_a_last_checkpoint_that_is_damaged_under_way_does_not_become_the_previous_one(tmp_path: Path) -> None:
    out = tmp_path / "run"

    class Flip(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 2:
                flip(out / "checkpoints" / "last.ckpt", 0.5)

    train(out, trainer={"callbacks": [Flip()]})
    assert [load(out / "checkpoints" / f"{name}.ckpt").epoch for name in ("previous", "last")] == [0, 2]


def test_where_files_cannot_be_linked_the_previous_checkpoint_is_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    out = train(tmp_path / "run").path
    assert [load(out / "checkpoints" / f"{name}.ckpt").epoch for name in ("previous", "last")] == [1, 2]


def test_a_run_of_version_0_1_has_no_checksums_and_goes_on(copied: Path, finished: Path) -> None:
    for name in ("checksums.txt", "checkpoints/checksums.txt", "checkpoints/previous.ckpt"):
        (copied / name).unlink()
    assert train(copied, epochs=5, resume=True).export == {"epoch": 1, "keep": "best", "ended": None}
    assert load(copied / "checkpoints" / "previous.ckpt").epoch == 3
