"""An evaluation spread over processes: under `torchrun` each judges every n-th sample, and all get the whole record."""

from __future__ import annotations

import atexit
import os
from pathlib import Path
from typing import TypeVar

from torch import distributed

T = TypeVar("T")


def mine() -> tuple[int, int]:
    """This process's rank and the number of processes; joins the group that `torchrun` announces."""
    if not distributed.is_available():
        return 0, 1
    if not distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
            return 0, 1
        distributed.init_process_group("gloo")  # only records travel, never tensors on a GPU
        atexit.register(_leave)
    return distributed.get_rank(), distributed.get_world_size()


def _leave() -> None:
    """Without it, the group's threads may still run when the interpreter takes itself down, which aborts it."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def gathered(part: T) -> list[T]:
    """What every process holds, in the order of their ranks."""
    _, world = mine()
    if world == 1:
        return [part]
    parts: list[T | None] = [None] * world
    distributed.all_gather_object(parts, part)
    return [part for part in parts if part is not None]


def own(path: Path) -> Path:
    """This process's own file beside `path`: its share of the samples has a state of its own."""
    rank, world = mine()
    return path if world == 1 else path.with_name(f"{path.stem}.{rank}-of-{world}{path.suffix}")
