"""The checkpoints of a run read back: which one it goes on from, and which one's weights it exports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from wideberth.checks import InputError
from wideberth.runs import reading

Keep: TypeAlias = Literal["last", "best"]
"""Which checkpoint's weights a run exports."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds.

    Attributes:
        file: where it is.
        epoch: the last one behind it (0-based).
        best: the epoch (0-based) with the best held-out accuracy until then; -1 where none was validated.
        state: of the training module, by name; on the CPU.
    """

    file: Path
    epoch: int
    best: int
    state: dict[str, Any]


def load(file: Path) -> Saved:
    """Read a checkpoint of a run; no objects are unpickled.

    Raises:
        InputError: where it is missing, cannot be read, or is no checkpoint of a run.
    """
    if not file.is_file():
        raise InputError(f"{str(file)!r}: is missing")
    with reading(file):
        # Mapped: the optimizer's state, most of the file, is not read here.
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        epoch, state = saved["epoch"], saved["state_dict"]
        best = saved["callbacks"]["KeepLast"]["best_epoch"]
        if not isinstance(epoch, int) or not isinstance(best, int) or not isinstance(state, dict):
            raise TypeError("is no checkpoint of a run")
        return Saved(file, epoch, best, state)


def newest(folder: Path, keep: Keep) -> tuple[Saved, str | None]:
    """The checkpoint that a run goes on from, and what to say of it where that is not last.ckpt.

    best.ckpt is written before last.ckpt, and whole: a run that was killed between the two goes on from best.ckpt.

    Raises:
        InputError: naming the file that is missing, cannot be read or, where the best epoch is to be exported, is of
            another epoch than that.
    """
    last, best = load(folder / "last.ckpt"), None
    try:
        best = load(folder / "best.ckpt")
    except InputError:
        if keep == "best" and last.best >= 0:
            raise
    if best is not None and best.epoch == last.epoch + 1:
        return best, f"{str(best.file)!r} is one epoch newer than last.ckpt: going on after epoch {best.epoch + 1}"
    if keep == "best":
        check_best(best, last.best)
    return last, None


def check_best(found: Saved | None, epoch: int) -> None:
    """Refuse a best.ckpt that is not of the epoch (0-based) that was the best (`InputError`)."""
    if found is not None and epoch >= 0 and found.epoch != epoch:
        raise InputError(
            f"{str(found.file)!r}: is of epoch {found.epoch + 1}, and epoch {epoch + 1} was the best: "
            "its weights are not there to be exported"
        )
