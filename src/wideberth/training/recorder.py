"""What a run leaves behind while it trains: one row per epoch, the radii's histogram, checkpoints to continue from."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
from lightning.pytorch.callbacks import Checkpoint
from rich.console import Console
from torch import Tensor

from wideberth import checksums, margins
from wideberth.checks import InputError
from wideberth.runs import Run, reading, write_atomically, write_record
from wideberth.training.module import RobustTraining
from wideberth.training.stopping import OverfittingGuard

log = logging.getLogger("wideberth")
BINS = 64
_FEW = 0.01
"""Of all radii: so many may go too far before it is said."""


class Recorder(L.Callback):
    """Writes metrics.csv and radii.parquet at the end of every epoch, atomically and continued on resume.

    Args:
        out: the run directory.
        probe: inputs (P, ...) and labels (P,) on which the effective margin is measured after each epoch, or None.
        echo: print one line per epoch (where there is no progress bar).
    """

    def __init__(self, out: Path, probe: tuple[Tensor, Tensor] | None, echo: bool = False) -> None:
        self.out, self.probe = out, probe
        self.console = Console(stderr=True) if echo else None
        self._rows: list[dict[str, Any]] = []
        self._radii: list[pd.DataFrame] = []
        self._began = 0.0
        self._learning_rate = float("nan")
        self._noted = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up the records of the epochs that a resumed run has behind it (its epoch is known from here on)."""
        if trainer.current_epoch and self.out.is_dir():  # not those of a run that is being replaced
            self._rows, self._radii = history(Run(self.out), trainer.current_epoch)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        # Schedules of the epoch have stepped when it ends.
        self._learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        self._began = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the epoch's row."""
        assert isinstance(pl_module, RobustTraining)
        metrics = dict(trainer.callback_metrics)  # on every rank, since reading them sums them over the ranks
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        seconds = time.monotonic() - self._began
        row: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        row |= {name: float(value) for name, value in metrics.items() if name != "loss_now"}
        row["learning_rate"] = self._learning_rate
        row |= self._radius_columns(trainer, pl_module)
        row |= self._margin_columns(pl_module)
        row["seconds"] = seconds
        self._rows.append(row)
        write_record(self.out / "metrics.csv", lambda file: pd.DataFrame(self._rows).to_csv(file, index=False))
        if self._radii:
            history = pd.concat(self._radii, ignore_index=True)
            write_record(self.out / "radii.parquet", lambda file: history.to_parquet(file))
        if self.console is not None:
            self.console.print(summary(row, trainer.max_epochs), highlight=False, soft_wrap=True)

    def _radius_columns(self, trainer: L.Trainer, module: RobustTraining) -> dict[str, float]:
        radii = training_radii(module)
        if not len(radii):
            return {}
        low, high = 0.0, max(float(radii.max()), module.radius.eval_eps(), 1e-9)
        count, edges = np.histogram(radii, bins=BINS, range=(low, high))
        self._radii.append(
            pd.DataFrame({"epoch": trainer.current_epoch, "low": edges[:-1], "high": edges[1:], "count": count})
        )
        if not self._noted and (note := beyond(radii, module)):
            self._noted = True
            log.warning(note)
        quantiles = {f"radius_q{q}": float(np.quantile(radii, q / 100)) for q in (0, 25, 50, 75, 100)}
        return {"radius_mean": float(radii.mean()), **quantiles}

    def _margin_columns(self, module: RobustTraining) -> dict[str, float]:
        if self.probe is None:
            return {}
        x, y = self.probe[0].to(next(module.parameters())), self.probe[1].to(module.device)  # device and dtype
        with module.own_generators("margins", 0, x.device):
            margin, weight, _ = margins.measure(module.model, x, y, module.attack.norm)
        return {"effective_margin": float(margin.median()), "effective_weight_norm": float(weight.median())}


def history(run: Run, epochs: int) -> tuple[list[dict[str, Any]], list[pd.DataFrame]]:
    """What is recorded of the first `epochs`: the rows of metrics.csv, and radii.parquet in a list (empty: none).

    Raises:
        InputError: where a file cannot be read, or does not say of which epochs it tells.
    """
    rows: list[dict[str, Any]] = []
    radii: list[pd.DataFrame] = []
    if (metrics := run.metrics) is not None:
        with reading(run.path / "metrics.csv"):
            before = metrics[metrics["epoch"] < epochs]
            rows = [{str(k): v for k, v in row.items()} for row in before.to_dict("records")]
    if (table := run.radii) is not None:
        with reading(run.path / "radii.parquet"):
            radii = [table[table["epoch"] < epochs]]
    return rows, radii


def training_radii(module: RobustTraining) -> np.ndarray[Any, Any]:
    """The learned radii of the rows that are trained on, (n,); empty where the policy remembers none."""
    if not len(module.radius.radii):
        return np.zeros(0)
    return module.radius.radii[module.rows].cpu().numpy()


def beyond(radii: np.ndarray[Any, Any], module: RobustTraining) -> str | None:
    """What to say where radii have grown so far that every input can be turned grey; None where they have not."""
    half = (module.box[1] - module.box[0]) / 2
    share = float((radii > half).mean())
    if module.attack.norm != "linf" or share < _FEW:
        return None
    return (
        f"note: {share:.0%} of the learned radii are beyond {half:g}, half of the box, where every input can be turned "
        "grey: training at these may teach the network to hide its gradients; a smaller radius.maximum prevents it"
    )


def summary(row: dict[str, Any], epochs: int | None) -> str:
    """One epoch in one line."""
    shown = {
        "loss": "loss {:.3f}",
        "accuracy_clean": "clean {:.1%}",
        "accuracy_adversarial": "adversarial {:.1%}",
        "validation_clean": "held-out clean {:.1%}",
        "validation_robust": "held-out robust {:.1%}",
        "radius_mean": "mean radius {:.4f}",
        "effective_margin": "effective margin {:.4f}",
        "seconds": "{:.1f} s",
    }
    parts = [text.format(row[name]) for name, text in shown.items() if name in row]
    return f"epoch {row['epoch'] + 1}/{epochs or '?'}: " + ", ".join(parts)


class KeepLast(Checkpoint):
    """checkpoints/last.ckpt after every epoch, and best.ckpt by held-out accuracy (robust, if there is a radius).

    All are moved into place whole, so that a full disk or a crash leaves what was there; best.ckpt first, so that it
    is there whenever last.ckpt says that its epoch was the best. What last.ckpt was before becomes previous.ckpt, to go
    on from should last.ckpt be damaged.

    Args:
        out: the run directory.
        patience: epochs without a new best after which training stops; None: it goes on.
        guard: where it has found a breakdown, that epoch is not saved.
        saved: called in the first process when last.ckpt is in place.

    Attributes:
        newest: the checkpoint of the last epoch that was saved.
        ended: why training stopped before its last epoch; None where it did not.
    """

    def __init__(
        self,
        out: Path,
        patience: int | None = None,
        guard: OverfittingGuard | None = None,
        saved: Callable[[], None] | None = None,
    ) -> None:
        self.folder = out / "checkpoints"
        self.patience, self.guard, self.saved = patience, guard, saved
        self.best, self.best_epoch = float("-inf"), -1
        self.newest = self.folder / "last.ckpt"
        self.ended: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, and when it was."""
        return {"best": self.best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best score so far."""
        self.best, self.best_epoch = state_dict["best"], state_dict["best_epoch"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that had run out of patience does not go on when it is resumed."""
        self._stop_if_stale(trainer, trainer.current_epoch - 1)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the state after this epoch."""
        if self.guard is not None and self.guard.reason is not None:
            self.ended = self.guard.reason
            return
        metrics = trainer.callback_metrics
        score = float(metrics.get("validation_robust", metrics.get("validation_clean", float("nan"))))
        better = score > self.best
        if better:
            self.best, self.best_epoch = score, trainer.current_epoch
        last, fresh = self.folder / "last.ckpt", self.folder / ".saving.ckpt"
        try:
            trainer.save_checkpoint(fresh, weights_only=False)
            if trainer.is_global_zero:
                if better:
                    write_record(self.folder / "best.ckpt", lambda file: shutil.copyfile(fresh, file))
                self._keep_previous()
                checksums.note(last, checksums.digest(fresh))
                fresh.replace(last)
                if self.saved is not None:
                    self.saved()
        except OSError as error:  # say where, not in which temporary file
            raise OSError(error.errno, error.strerror, str(last)) from error
        finally:
            if trainer.is_global_zero:
                fresh.unlink(missing_ok=True)
        self.newest = last
        trainer.strategy.barrier()
        self._stop_if_stale(trainer, trainer.current_epoch)

    def complete(self) -> None:
        """Make last.ckpt the newest checkpoint, where a run was resumed from another and had no epoch left to train."""
        last = self.folder / "last.ckpt"
        if self.newest != last:
            write_record(last, lambda file: shutil.copyfile(self.newest, file))
            self.newest = last

    def _keep_previous(self) -> None:
        """Make last.ckpt also previous.ckpt, unless it was damaged: then what was previous stays."""
        last, previous = self.folder / "last.ckpt", self.folder / "previous.ckpt"
        try:
            known = checksums.verified(last) if last.is_file() else None
        except InputError:
            known = None
        if known is None:
            return

        def write(file: Path) -> None:
            file.unlink(missing_ok=True)
            try:
                os.link(last, file)
            except OSError:  # not every file system has links
                shutil.copyfile(last, file)
            checksums.note(previous, known)

        write_atomically(previous, write)

    def _stop_if_stale(self, trainer: L.Trainer, epoch: int) -> None:
        stale = epoch - self.best_epoch
        if self.patience is not None and stale >= self.patience and epoch + 1 != trainer.max_epochs:
            self.ended = f"stopped after epoch {epoch + 1}: held-out accuracy has not risen for {stale} epochs"
            trainer.should_stop = True
