"""The checkpoints of a run read back: which one it goes on from, and which one's weights it exports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from wideberth import schema
from wideberth.checks import InputError
from wideberth.runs import reading

Keep: TypeAlias = Literal["last", "best"]
"""Which checkpoint's weights a run exports."""

FILES = ("last.ckpt", "previous.ckpt", "best.ckpt")


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
        InputError: where it is missing, damaged, or no checkpoint of a run.
    """
    if not file.is_file():
        raise InputError(f"{str(file)!r}: is missing")
    with reading(file):
        # Mapped: the optimizer's state, most of the file, is not read here.
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        schema.check_version(saved, repr(str(file)))
        epoch, state = saved["epoch"], saved["state_dict"]
        best = saved["callbacks"]["KeepLast"]["best_epoch"]
        if not isinstance(epoch, int) or not isinstance(best, int) or not isinstance(state, dict):
            raise TypeError("is no checkpoint of a run")
        return Saved(file, epoch, best, state)


def present(folder: Path) -> bool:
    """Whether there is a checkpoint to go on from, sound or not."""
    return any((folder / name).is_file() for name in FILES)


def newest(folder: Path, keep: Keep) -> tuple[Saved, str | None]:
    """The checkpoint that a run goes on from, and what to say of it where that is not last.ckpt.

    Each holds all of the state. best.ckpt is written before last.ckpt: a run that was killed between the two goes on
    from best.ckpt. Where last.ckpt is damaged, it goes on from the newer one of the other two.

    Raises:
        InputError: where no checkpoint is sound, naming last.ckpt; or where the best epoch is to be exported, and
            best.ckpt is missing, damaged or of another epoch.
    """
    last, best = _tried(folder / "last.ckpt"), _tried(folder / "best.ckpt")
    chosen, note = last, None
    if isinstance(last, InputError):
        others = [each for each in (_tried(folder / "previous.ckpt"), best) if isinstance(each, Saved)]
        if not others:
            raise InputError(f"{last}; and there is no other checkpoint to go on from")
        chosen = max(others, key=lambda each: each.epoch)
        note = f"{last}: training goes on from {chosen.file.name}, after epoch {chosen.epoch + 1}"
    elif isinstance(best, Saved) and best.epoch == last.epoch + 1:
        chosen = best
        note = f"{str(best.file)!r} is one epoch newer than last.ckpt: training goes on after epoch {best.epoch + 1}"
    assert isinstance(chosen, Saved)
    if keep == "best" and chosen.best >= 0:
        if isinstance(best, InputError):
            raise best
        check_best(best, chosen.best)
    return chosen, note


def _tried(file: Path) -> Saved | InputError:
    try:
        return load(file)
    except schema.NewerVersion:
        raise
    except InputError as error:
        return error


def check_best(found: Saved, epoch: int) -> None:
    """Refuse a best.ckpt that is not of the epoch (0-based) that was the best; -1: none was (`InputError`)."""
    if epoch >= 0 and found.epoch != epoch:
        raise InputError(
            f"{str(found.file)!r}: is of epoch {found.epoch + 1}, and epoch {epoch + 1} was the best: "
            "its weights are not there to be exported"
        )
