"""The run directory of a training run: claiming it, resuming in it, and leaving the results there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from textwrap import shorten
from typing import Any

import lightning as L
import numpy as np
import pandas as pd

from wideberth import checksums, schema
from wideberth.checks import InputError
from wideberth.data import Split, read
from wideberth.models import save_weights
from wideberth.runs import Run, reading, write_atomically, write_record
from wideberth.training.checkpoints import FILES, Keep, Saved, check_best, load, newest, present
from wideberth.training.module import RobustTraining
from wideberth.training.recorder import KeepLast, history, training_radii
from wideberth.training.stopping import OverfittingGuard
from wideberth.yaml_files import dump_yaml

# What says something about the weights of a run, and must not outlive them.
ABOUT_THE_WEIGHTS = (
    "model.safetensors",
    "export.json",
    "samples.parquet",
    "extremes.npz",
    "evaluations",
    "evaluation.json",  # this and the next: of version 0.1
    "evaluation.parquet",
    "margins.parquet",
    "report.html",
)
RECORDS = (
    *ABOUT_THE_WEIGHTS,
    *(f"checkpoints/{name}" for name in (*FILES, checksums.NAME)),
    "metrics.csv",
    "radii.parquet",
    checksums.NAME,
)
# What a resumed run may change without becoming another experiment.
FREE = ("out", "epochs", "workers", "probe", "progress", "trainer")


def claim(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the run directory, or refuse one that would be overwritten or cannot be resumed (`InputError`).

    Nothing in it is changed yet: see `FirstEpoch`.
    """
    run = Run(out) if out.is_dir() else None
    if resume and not present(out / "checkpoints"):
        raise InputError(
            f"out={str(out)!r} with resume: holds no checkpoints/last.ckpt to resume from; train without it"
        )
    if run is not None and not resume:
        began = _began(run)
        if began and not overwrite:
            state = "a finished run" if run.finished else "an unfinished run"
            raise InputError(f"out={str(out)!r}: holds {state}; use --overwrite to replace it or --resume to continue")
        # Hidden ones do not count: a process beside this one may just be writing the config.
        foreign = any(not file.name.startswith(".") for file in out.iterdir())
        if not began and foreign and not (out / "config.yaml").is_file():
            raise InputError(f"out={str(out)!r}: holds files that are not a run's; choose an empty directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={str(out)!r}: cannot be made a directory ({error.strerror})") from None


def same_experiment(out: Path, record: dict[str, Any]) -> None:
    """Refuse to resume a run by another configuration than its own, `FREE` aside (`InputError`)."""
    stored = Run(out).config
    for name in (key for key in {**stored, **record} if key not in FREE):
        if change := difference(stored.get(name), record.get(name), name):
            raise InputError(f"out={str(out)!r} with resume: {change}; only {', '.join(FREE)} may change")


def difference(then: Any, now: Any, name: str) -> str:
    """Where two configurations differ first, in words; empty where they are the same."""
    if isinstance(then, dict) and isinstance(now, dict):
        found = (difference(then.get(key), now.get(key), f"{name}.{key}") for key in {**then, **now})
        return next(filter(None, found), "")
    if then == now:
        return ""
    was, is_now = (shorten(str(value), 80, placeholder=" ...") for value in (then, now))
    return f"{name} was {was}, and is now {is_now}"


def resumed_from(out: Path, module: RobustTraining, epochs: int, keep: Keep) -> tuple[Saved, str | None]:
    """The checkpoint to resume from, after everything that a resumed run needs was read, and what to say of it.

    Changes nothing in the directory.

    Raises:
        InputError: naming the file that cannot be read, or where the checkpoint does not fit.
    """
    run = Run(out)
    saved, note = newest(out / "checkpoints", keep)
    done = saved.epoch + 1
    history(run, done)
    _ = run.export  # says later whether the records about the weights still hold
    if done > epochs:
        raise InputError(f"epochs={epochs}: {done} are done in {str(out)!r}; resume with at least as many")
    try:
        module.load_state_dict(saved.state)
    except RuntimeError as error:
        reason = shorten(str(error), 240, placeholder=" ...")
        raise InputError(f"out={str(out)!r} with resume: does not fit this model and data: {reason}") from None
    return saved, note


class FirstEpoch(L.Callback):
    """Lets what an earlier run left in the directory give way to a new one, or to a run resumed, as late as it can.

    A new run replaces an earlier one (`overwrite`) when its first epoch has ended, before anything of it is recorded.
    A resumed run leaves every file as it is until its first new epoch has ended, and then removes what says something
    about the old weights when the new checkpoint is in place. So what is interrupted or fails before leaves the
    earlier run as it was.

    Args:
        out: the run directory.
        record: what goes into config.yaml.
        resumed: whether the run goes on from a checkpoint.

    Attributes:
        over: whether an epoch has ended since training started.
    """

    def __init__(self, out: Path, record: dict[str, Any], *, resumed: bool) -> None:
        self.out, self.record, self.resumed = out, record, resumed
        self.over = self.moved_on = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what is being trained, where there is no earlier run to keep."""
        if trainer.is_global_zero and not self.resumed and not _began(Run(self.out)):
            discard(self.out, RECORDS)  # of a run that was interrupted before its first checkpoint
            self.write_config()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the directory over, once, unless this epoch will not be kept."""
        assert isinstance(pl_module, RobustTraining)
        pl_module.refuse_bad_steps()  # raises: the module itself would look only after this callback
        guards = [c for c in getattr(trainer, "callbacks", []) if isinstance(c, OverfittingGuard)]
        if any(guard.reason for guard in guards):
            return
        if trainer.is_global_zero and not self.over:
            if not self.resumed:
                discard(self.out, RECORDS)
            self.write_config()
        self.over = True

    def saved(self) -> None:
        """Remove, once, what is said of the weights that the run had when it was resumed: a new checkpoint is there."""
        if self.resumed and not self.moved_on:
            discard(self.out, ABOUT_THE_WEIGHTS)
        self.moved_on = True

    def write_config(self) -> None:
        """Write config.yaml."""
        text = dump_yaml({schema.KEY: schema.VERSION, **self.record})
        write_atomically(self.out / "config.yaml", lambda file: file.write_text(text))


def _began(run: Run) -> bool:
    return run.finished or present(run.path / "checkpoints")


def discard(out: Path, files: tuple[str, ...]) -> None:
    """Remove records that no longer hold."""
    for file in files:
        if (out / file).is_dir():
            shutil.rmtree(out / file)
        else:
            (out / file).unlink(missing_ok=True)


def kept_epoch(keeper: KeepLast, module: RobustTraining, keep: Keep) -> int:
    """Load what the run is to export, weights and radii, into `module`; returns its epoch (0-based).

    Raises:
        InputError: naming the checkpoint that is missing, cannot be read, or is not of the best epoch.
    """
    validated = keeper.best_epoch >= 0
    saved = load(keeper.folder / "best.ckpt" if keep == "best" and validated else keeper.newest)
    if keep == "best":
        check_best(saved, keeper.best_epoch)
    with reading(saved.file):
        module.load_state_dict(saved.state)
    return saved.epoch


def export(out: Path, module: RobustTraining, split: Split, said: dict[str, Any]) -> None:
    """Write the weights, what is `said` of them, the per-sample table and the samples at both ends of the radii.

    What stands in the directory about the weights of another epoch is removed first.
    """
    known = Run(out).export
    if known is None or known.get("epoch") != said["epoch"]:
        discard(out, ABOUT_THE_WEIGHTS)
    samples = pd.DataFrame({"index": split.rows.numpy(), "label": split.labels.numpy()})
    radii = training_radii(module)
    if len(radii):
        samples["radius"] = radii
        arrays = extremes(split, radii)
        write_record(out / "extremes.npz", lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
    write_record(out / "samples.parquet", lambda file: samples.to_parquet(file))
    write_record(out / "export.json", lambda file: file.write_text(json.dumps(said)))
    save_weights(module.model, out / "model.safetensors")  # last: its presence says that the run is finished


def extremes(split: Split, radii: np.ndarray[Any, Any], count: int = 16) -> dict[str, np.ndarray[Any, Any]]:
    """The samples with the smallest and the largest radii: {small, large}_{x, index, label, radius}."""
    order = np.argsort(radii, kind="stable")
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for end, places in (("small", order[:count]), ("large", order[::-1][:count])):
        x, y, index = read(split, places.tolist())
        arrays |= {f"{end}_x": x.numpy(), f"{end}_label": y.numpy(), f"{end}_index": index.numpy()}
        arrays[f"{end}_radius"] = radii[places]
    return arrays
