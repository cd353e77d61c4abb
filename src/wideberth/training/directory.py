"""The run directory of a training run: claiming it, resuming in it, and leaving the results there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch

from wideberth.checks import InputError
from wideberth.data import Split
from wideberth.models import save_weights
from wideberth.runs import Run, write_atomically
from wideberth.training.module import RobustTraining
from wideberth.training.recorder import training_radii

Keep: TypeAlias = Literal["last", "best"]
"""Which checkpoint's weights a run exports."""

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
RECORDS = (*ABOUT_THE_WEIGHTS, "checkpoints/last.ckpt", "checkpoints/best.ckpt", "metrics.csv", "radii.parquet")
# What a resumed run may change without becoming another experiment.
FREE = ("out", "epochs", "workers", "probe", "progress", "trainer")


def claim(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the run directory, or refuse one that would be overwritten or cannot be resumed (`InputError`)."""
    run = Run(out) if out.is_dir() else None
    if resume and (run is None or run.checkpoint is None):
        raise InputError(
            f"out={str(out)!r} with resume: holds no checkpoints/last.ckpt to resume from; train without it"
        )
    if run is not None and not resume:
        began = run.finished or run.checkpoint is not None
        if began and not overwrite:
            state = "a finished run" if run.finished else "an unfinished run"
            raise InputError(f"out={str(out)!r}: holds {state}; use --overwrite to replace it or --resume to continue")
        # Hidden ones do not count: a process beside this one may just be writing the config.
        foreign = any(not file.name.startswith(".") for file in out.iterdir())
        if not began and foreign and not (out / "config.yaml").is_file():
            raise InputError(f"out={str(out)!r}: holds files that are not a run's; choose an empty directory")
        discard(out, RECORDS)
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


def last_checkpoint(out: Path, module: RobustTraining, epochs: int) -> tuple[str, int]:
    """The checkpoint to resume from and the epochs behind it, or a refusal of one that does not fit (`InputError`)."""
    checkpoint = str(Run(out).checkpoint)
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    done = saved["epoch"] + 1
    if done > epochs:
        raise InputError(f"epochs={epochs}: {done} are done in {str(out)!r}; resume with at least as many")
    try:
        module.load_state_dict(saved["state_dict"])
    except RuntimeError as error:
        reason = shorten(str(error), 240, placeholder=" ...")
        raise InputError(f"out={str(out)!r} with resume: does not fit this model and data: {reason}") from None
    if done < epochs:  # the weights will move on: no verdict on the old ones may stand beside the new
        discard(out, ABOUT_THE_WEIGHTS)
    return checkpoint, done


def discard(out: Path, files: tuple[str, ...]) -> None:
    """Remove records that no longer hold."""
    for file in files:
        if (out / file).is_dir():
            shutil.rmtree(out / file)
        else:
            (out / file).unlink(missing_ok=True)


def kept_epoch(out: Path, module: RobustTraining, keep: Keep) -> int:
    """Load what the run is to export, weights and radii, into `module`; returns its epoch (0-based)."""
    file = out / "checkpoints" / f"{keep}.ckpt"
    if not file.is_file():  # no epoch was validated
        file = out / "checkpoints" / "last.ckpt"
    saved = torch.load(file, map_location="cpu", weights_only=True)
    module.load_state_dict(saved["state_dict"])
    return int(saved["epoch"])


def export(out: Path, module: RobustTraining, split: Split, said: dict[str, Any]) -> None:
    """Write the weights, what is `said` of them, the per-sample table and the samples at both ends of the radii."""
    samples = pd.DataFrame({"index": split.rows.numpy(), "label": split.labels.numpy()})
    radii = training_radii(module)
    if len(radii):
        samples["radius"] = radii
        arrays = extremes(split, radii)
        write_atomically(out / "extremes.npz", lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
    write_atomically(out / "samples.parquet", lambda file: samples.to_parquet(file))
    write_atomically(out / "export.json", lambda file: file.write_text(json.dumps(said)) and None)
    save_weights(module.model, out / "model.safetensors")  # last: its presence says that the run is finished


def extremes(split: Split, radii: np.ndarray[Any, Any], count: int = 16) -> dict[str, np.ndarray[Any, Any]]:
    """The samples with the smallest and the largest radii: {small, large}_{x, index, label, radius}."""
    order = np.argsort(radii, kind="stable")
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for end, places in (("small", order[:count]), ("large", order[::-1][:count])):
        x, y, index = split.__getitems__(places.tolist())
        arrays |= {f"{end}_x": x.numpy(), f"{end}_label": y.numpy(), f"{end}_index": index.numpy()}
        arrays[f"{end}_radius"] = radii[places]
    return arrays
