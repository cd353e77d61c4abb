"""What a new or resumed run does to the run it finds in its directory, and when."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from training_tools import fit, mlp, tensors

import wideberth as wb
from wideberth.training import directory
from wideberth.training.directory import ABOUT_THE_WEIGHTS
from wideberth.training.radii import InstanceAdaptive


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def train(out: Path, **options: Any) -> wb.Run:
    model = options.pop("model", None) or mlp()
    radius = InstanceAdaptive(0.1, gamma=0.02, warmup=0)
    return fit(model, tensors(14, validation=4), out, **({"radius": radius} | options))


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """A finished run of two epochs with everything that may be said of its weights."""
    run = train(tmp_path / "run")
    (run.path / "evaluations").mkdir()
    for name in ("evaluation.json", "evaluation.parquet", "margins.parquet", "report.html", "evaluations/a.json"):
        (run.path / name).write_text("of the weights after two epochs")
    assert all((run.path / name).exists() for name in ABOUT_THE_WEIGHTS)
    return run.path


class Stop(L.Callback):
    """Raises at a hook of an epoch."""

    def __init__(self, hook: str, epoch: int, error: BaseException) -> None:
        self.epoch, self.error = epoch, error
        setattr(self, hook, self._raise)

    def _raise(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise self.error


def failing(parameters: Any) -> torch.optim.Optimizer:
    raise ValueError("Invalid learning rate: -1")


FAILS: dict[str, Callable[[int], dict[str, Any]]] = {
    "the optimizer": lambda _: {"optimizer": failing},
    "the schedule": lambda _: {"scheduler": failing},
    "the first batch": lambda epoch: {"trainer": {"callbacks": [Stop("on_train_batch_end", epoch, RuntimeError())]}},
    "Ctrl-C": lambda epoch: {"trainer": {"callbacks": [Stop("on_train_batch_start", epoch, KeyboardInterrupt())]}},
}


# ---- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAILS)
def test_what_fails_in_the_first_new_epoch_leaves_the_run_as_it_was(judged: Path, name: str) -> None:
    before = contents(judged)
    with pytest.raises((ValueError, RuntimeError, KeyboardInterrupt)):
        # The configuration of the failing runs differs in what makes them fail alone.
        train(judged, epochs=4, resume=True, config=wb.Run(judged).config, **FAILS[name](2))
    assert contents(judged) == before
    assert wb.Run(judged).finished
    assert train(judged, epochs=4, resume=True).export == {"epoch": 3, "keep": "last", "ended": None}


def test_records_of_the_old_weights_go_when_the_first_new_checkpoint_is_there(judged: Path) -> None:
    seen: list[tuple[int, int, bool, int]] = []

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            run = wb.Run(judged)
            assert run.checkpoint is not None
            last = torch.load(run.checkpoint, weights_only=True)["epoch"]
            about = [(judged / name).exists() for name in ABOUT_THE_WEIGHTS]
            assert len(set(about)) == 1, "all or none"
            seen.append((trainer.current_epoch, last, about[0], run.config["epochs"]))

    train(judged, epochs=4, resume=True, trainer={"callbacks": [Look()]})
    # Before the checkpoint of the epoch that ends is written.
    assert seen == [(2, 1, True, 4), (3, 2, False, 4)]
    run = wb.Run(judged)
    assert run.export == {"epoch": 3, "keep": "last", "ended": None}
    assert not any((judged / name).exists() for name in ABOUT_THE_WEIGHTS if name.startswith(("eval", "marg", "rep")))


def test_killed_before_the_old_records_were_removed(judged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of the third and last epoch is in place, the verdict is still that of the second."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(directory, "discard", killed)
        with pytest.raises(KeyboardInterrupt):
            train(judged, epochs=3, resume=True)
    run = wb.Run(judged)
    assert run.export == {"epoch": 1, "keep": "last", "ended": None}  # of model.safetensors, as it is
    assert (judged / "evaluation.json").exists()
    train(judged, epochs=3, resume=True)  # has no epoch to train
    assert run.export == {"epoch": 2, "keep": "last", "ended": None}
    assert not (judged / "evaluation.json").exists()
    straight = train(judged.with_name("straight"), epochs=3)
    assert (judged / "model.safetensors").read_bytes() == (straight.path / "model.safetensors").read_bytes()


def test_without_a_new_epoch_the_verdict_stays(judged: Path) -> None:
    before = contents(judged)
    train(judged, epochs=2, resume=True)
    assert contents(judged) == before


# ---- overwrite ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAILS)
def test_what_fails_in_its_first_epoch_overwrites_nothing(judged: Path, name: str) -> None:
    before = contents(judged)
    with pytest.raises((ValueError, RuntimeError, KeyboardInterrupt)):
        train(judged, overwrite=True, seed=1, epochs=1, **FAILS[name](0))
    assert contents(judged) == before


def test_a_run_overwrites_all_of_another_when_its_first_epoch_has_ended(judged: Path) -> None:
    (judged / "metrics.csv").write_bytes(b"\xff")  # a damaged run can be replaced
    stop = {"callbacks": [Stop("on_train_batch_start", 1, KeyboardInterrupt())]}
    with pytest.raises(KeyboardInterrupt):
        fit(mlp(), tensors(), judged, overwrite=True, seed=1, epochs=2, trainer=stop)
    checkpoint = {"checkpoints/last.ckpt", "checkpoints/checksums.txt"}
    assert set(contents(judged)) == {"config.yaml", "metrics.csv", "checksums.txt"} | checkpoint
    run = wb.Run(judged)
    assert run.config["seed"] == 1
    assert run.metrics is not None
    assert run.metrics["epoch"].tolist() == [0]


def test_a_new_run_says_what_it_is_before_its_first_epoch(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", trainer={"callbacks": [Stop("on_train_batch_start", 0, KeyboardInterrupt())]})
    assert set(contents(tmp_path / "run")) == {"config.yaml"}


class Unwatched(wb.RobustTraining):
    """Does not look at the loss of every step, as on a GPU, where it looks at one in fifty."""

    def _watch(self, loss: torch.Tensor) -> None:
        bad = torch.where(torch.isfinite(loss.detach()), -1, 0)
        self._first_bad_step = bad if self._first_bad_step is None else torch.maximum(self._first_bad_step, bad)


def test_a_first_epoch_that_diverges_overwrites_nothing(judged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wideberth.training.job.RobustTraining", Unwatched)
    before = contents(judged)
    with pytest.raises(wb.Diverged):
        train(judged, overwrite=True, probe=0, optimizer=partial(torch.optim.SGD, lr=1e30))
    assert contents(judged) == before
