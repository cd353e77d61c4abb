"""Which rows make a batch, and when: an order that is a function of (seed, epoch) and a position that is a number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DataLoader, Sampler

from wideberth.checks import InputError, at_least
from wideberth.data.splits import Batch, Split
from wideberth.randomness import fold, permutation


class KeyedSampler(Sampler[list[int]]):
    """Batches of positions 0..size-1 whose order depends on (seed, epoch) alone, so there is no state to save.

    Under `torch.distributed` every process takes its share, `batch[rank::world]`, of the same global batches:
    each position once an epoch (nothing is repeated to fill up), the same number of batches on every process, and
    shares that differ by one sample at most. A rest with fewer samples than processes joins the batch before it.

    Args:
        size: how many positions there are.
        batch_size: samples in a global batch, over all processes.
        shuffle: a new order each epoch; otherwise 0, 1, 2, ...
        seed: names the orders.
        drop_last: leave out a last batch that is not full.

    Attributes:
        epoch: what `set_epoch` set, 0 at first.
        start_batch: batches of this epoch that are done already, to continue in its middle: iterating skips them,
            `len` counts them. Belongs to the current epoch: set it after the epoch; another epoch starts at 0.

    Raises:
        InputError: a batch size that is below one sample per process, or leaves no batch at all.
    """

    def __init__(self, size: int, batch_size: int, *, shuffle: bool, seed: int = 0, drop_last: bool = False) -> None:
        at_least("batch_size", batch_size, 1)
        if size < (batch_size if drop_last else 1):
            raise InputError(f"batch_size={batch_size}: {size} samples with drop_last={drop_last} make no batch")
        self.size, self.batch_size = size, batch_size
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.epoch = 0
        self.start_batch = 0

    @property
    def sampler(self) -> KeyedSampler:
        """Itself: Lightning announces epochs to `dataloader.batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; one that is not the current one starts at its first batch."""
        if epoch != self.epoch:
            self.epoch, self.start_batch = epoch, 0

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(self.size, self.batch_size)
        return full + (not self.drop_last and rest >= self._share()[1])

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = self._share()
        # Read on the first `next`, not on `iter`: Lightning makes the iterator before it announces the epoch.
        order = permutation(self.seed, self.epoch, self.size) if self.shuffle else torch.arange(self.size)
        batches = len(self)
        for batch in range(self.start_batch, batches):
            last = batch == batches - 1 and not self.drop_last
            stop = self.size if last else (batch + 1) * self.batch_size
            yield order[batch * self.batch_size : stop][rank::world].tolist()

    def _share(self) -> tuple[int, int]:
        """(rank, world); asked each time because processes may be joined after construction."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return 0, 1
        rank, world = distributed.get_rank(), distributed.get_world_size()
        if self.batch_size < world or self.size < world:
            raise InputError(
                f"batch_size={self.batch_size} for {self.size} samples: must give each of {world} processes one"
            )
        return rank, world


def loader(
    split: Split,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int = 0,
    drop_last: bool = False,
    workers: int = 0,
    epoch: int = 0,
    start_batch: int = 0,
) -> DataLoader[Batch]:
    """Batches (x (B, ...) float32, y (B,) int64, index (B,) int64) of a split, in a keyed order.

    The order lives in `.batch_sampler`, a `KeyedSampler`. Lightning tells it the epoch if the trainer has
    `use_distributed_sampler=False`.

    Args:
        split: what to read.
        batch_size: samples in a global batch, over all processes.
        shuffle: a new order each epoch.
        seed: names the orders.
        drop_last: leave out a last batch that is not full.
        workers: processes that read ahead; worth it where images are decoded.
        epoch: where to continue. Needed here when resuming with workers, which read ahead before Lightning
            announces the epoch.
        start_batch: batches of that epoch that are done already.

    Raises:
        InputError: numbers out of range.
    """
    at_least("workers", workers, 0)
    at_least("start_batch", start_batch, 0)
    sampler = KeyedSampler(len(split), batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
    sampler.set_epoch(epoch)
    sampler.start_batch = start_batch
    return DataLoader(
        split,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        # Every new iterator draws a seed for its workers: not from the caller's global generator.
        generator=torch.Generator().manual_seed(fold(seed, "workers", epoch)),
    )


def _as_is(batch: Any) -> Any:
    """Nothing to collate: a split fetches whole batches."""
    return batch
