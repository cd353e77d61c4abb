"""Reading samples in batches from whatever holds them: a split, a torch data set or a pair of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import index as as_integer
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from wideberth.checks import InputError, at_least
from wideberth.data.splits import Batch, Split

Readable: TypeAlias = Split | Dataset[Any] | tuple[Tensor, Tensor]
"""A split; a torch data set of (x, y) or (x, y, index); tensors (x, y)."""


def count(source: Readable) -> int:
    """How many samples there are.

    Raises:
        InputError: where there is no length, or inputs and labels differ in number.
    """
    if isinstance(source, tuple):
        if len(source) != 2 or len(source[0]) != len(source[1]):
            lengths = [len(part) for part in source]
            raise InputError(f"data: tensors of lengths {lengths}: must be (x, y), one label each")
        return len(source[0])
    try:
        return len(source)  # type: ignore[arg-type]  # torch's Dataset declares no length
    except (TypeError, NotImplementedError):
        raise InputError(f"data: a {type(source).__name__} without a length: must be map-style") from None


def read(source: Readable, positions: Sequence[int] | Tensor) -> Batch:
    """The samples at these positions: x (B, ...), y (B,) and index (B,) int64.

    The index is what the source calls the sample, and its position where the source does not name it.

    Raises:
        InputError: for a sample of another form, or a label that is no integer.
    """
    places = positions.tolist() if isinstance(positions, Tensor) else list(positions)
    if isinstance(source, tuple):
        return source[0][places], source[1][places], torch.tensor(places, dtype=torch.int64)
    if isinstance(source, Split):
        return source.__getitems__(places)
    samples = [_sample(source, place) for place in places]
    x = torch.stack([sample[0] for sample in samples])
    y, index = (torch.tensor([sample[part] for sample in samples], dtype=torch.int64) for part in (1, 2))
    return x, y, index


def _sample(source: Dataset[Any], place: int) -> tuple[Tensor, int, int]:
    sample = source[place]
    if not isinstance(sample, tuple | list) or len(sample) not in (2, 3) or not isinstance(sample[0], Tensor):
        raise InputError(f"data: sample {place} is no (x, y) or (x, y, index) with a tensor x")
    try:
        return sample[0], as_integer(sample[1]), as_integer(sample[2]) if len(sample) > 2 else place
    except TypeError:
        raise InputError(f"data: sample {place} has label {sample[1]!r:.60}: must be an integer class") from None


def batches(
    source: Readable, positions: Sequence[int] | Tensor | None = None, batch_size: int = 256
) -> Iterator[Batch]:
    """The samples at these positions (default: all), in this order, at most `batch_size` at a time; see `read`.

    Raises:
        InputError: for a batch size below 1, and where `read` does.
    """
    at_least("batch_size", batch_size, 1)
    places = range(count(source)) if positions is None else positions
    for begin in range(0, len(places), batch_size):
        yield read(source, places[begin : begin + batch_size])


def collect(parts: Iterable[Mapping[str, Tensor]], size: int) -> dict[str, Tensor]:
    """Columns (size, ...) on the CPU from what is known of one batch after the other, (B, ...) each.

    They are allocated at the first batch. Many small tensors kept from many batches would each hold a gap in the heap
    open between the large ones that were freed, so that the process grew with the number of batches.
    """
    columns: dict[str, Tensor] = {}
    begin = 0
    for part in parts:
        rows = 0
        for name, values in part.items():
            if name not in columns:
                columns[name] = torch.empty((size, *values.shape[1:]), dtype=values.dtype)
            rows = len(values)
            columns[name][begin : begin + rows] = values
        begin += rows
    return columns
