"""Rows of a source: what training and evaluation read, each sample with the index that names it for good."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from wideberth.checks import Box, InputError, at_least, valid_box
from wideberth.randomness import fold, permutation

Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]


def sample_rows(size: int, count: int) -> Tensor:
    """A fixed random sample of `count` of `size` rows, ascending, (count,) int64; a smaller one is a part of it."""
    return permutation(fold(0, "rows"), 0, size)[:count].sort().values


class Source(Protocol):
    """Samples addressed by row: either all in memory, or fetched when asked for."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> Tensor:
        """(n,) int64, the class of every row."""
        ...

    def fetch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, ...) float32 in the box and y (B,) int64 of the rows (B,)."""
        ...


def _unit(x: Tensor) -> Tensor:
    """float32 of stored inputs; uint8 is an image, whose 0..255 become [0, 1]."""
    return x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x.to(torch.float32)


def _check_inputs(name: str, x: Tensor, box: Box) -> None:
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise InputError(f"{name} is {x.dtype}: must be floating point in the box {list(box)}, or uint8 images")
    # Every uint8 is a possible pixel value, so only the box has to fit: no need to read the images.
    low, high = (0.0, 1.0) if x.dtype == torch.uint8 else (v.item() for v in torch.aminmax(x))
    if not (low > -torch.inf and high < torch.inf):  # NaN compares false
        raise InputError(f"{name} holds NaN or infinite values: must be finite, in the box {list(box)}")
    if low < box[0] or high > box[1]:
        raise InputError(f"{name} spans [{low:.4g}, {high:.4g}]: must lie in the box {list(box)}")


def _check_labels(name: str, y: Tensor, classes: int) -> None:
    low, high = (int(v) for v in torch.aminmax(y))
    if low < 0 or high >= classes:
        raise InputError(f"{name} spans {low}..{high}: with {classes} classes, labels must be in 0..{classes - 1}")


class InMemory:
    """A source whose samples are two tensors; images stay uint8 and become float32 / 255 batch by batch.

    Args:
        x: (n, ...) uint8 images, or floats in the box (kept as float32).
        y: (n,) integers in 0..classes-1.
        classes: number of classes, at least 2.
        box: (low, high) that holds every input.
        names: what messages call x and y.

    Raises:
        InputError: no rows, shapes or dtypes that do not fit, values not finite or outside the box, labels
            outside 0..classes-1.
    """

    def __init__(
        self, x: Tensor, y: Tensor, *, classes: int, box: Box = (0.0, 1.0), names: tuple[str, str] = ("x", "y")
    ) -> None:
        x_name, y_name = names
        at_least("classes", classes, 2)
        valid_box(box)
        if x.dim() < 2 or len(x) == 0:
            raise InputError(f"{x_name} of shape {tuple(x.shape)}: must be (n, ...) with at least one sample")
        if tuple(y.shape) != (len(x),) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise InputError(
                f"{y_name} of shape {tuple(y.shape)} and {y.dtype}: must be ({len(x)},) integer classes, "
                f"one for each row of {x_name}"
            )
        _check_inputs(x_name, x, box)
        _check_labels(y_name, y, classes)
        self.x = x if x.dtype == torch.uint8 else x.to(torch.float32)
        self.y = y.to(torch.int64)

    def __len__(self) -> int:
        return len(self.y)

    @property
    def labels(self) -> Tensor:
        """(n,) int64, the class of every row."""
        return self.y

    def fetch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, ...) float32 in the box and y (B,) int64 of the rows (B,)."""
        return _unit(self.x[rows]), self.y[rows]


class Lazy:
    """A source that reads samples from any torch data set of (x, y) when they are asked for.

    Every batch is checked as it is read, so a bad sample stops a run with a message instead of spoiling it.

    Args:
        dataset: has a length; yields x, a tensor (uint8 image, or floats in the box) of one shape, and y, an
            integer class.
        classes: number of classes, at least 2.
        box: (low, high) that holds every input.
        name: what messages call the data set.

    Raises:
        InputError: on construction when there is no length or no sample; on reading when a sample is not a
            tensor, differs in shape, is not finite, leaves the box or has a label outside 0..classes-1.
    """

    def __init__(self, dataset: Dataset[Any], *, classes: int, box: Box = (0.0, 1.0), name: str = "dataset") -> None:
        at_least("classes", classes, 2)
        valid_box(box)
        try:
            self.size = len(dataset)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            raise InputError(f"{name} is a {type(dataset).__name__} without a length: must be map-style") from None
        if self.size == 0:
            raise InputError(f"{name} is empty: must have at least one sample")
        self.dataset, self.classes, self.box, self.name = dataset, classes, box, name
        self._labels: Tensor | None = None

    def __len__(self) -> int:
        return self.size

    @property
    def labels(self) -> Tensor:
        """(n,) int64; taken from the data set's `targets` where it has them untransformed, else read once."""
        if self._labels is None:
            targets = getattr(self.dataset, "targets", None)
            if targets is None or getattr(self.dataset, "target_transform", None) is not None:
                targets = [self._sample(row)[1] for row in range(self.size)]
            labels = torch.as_tensor(targets, dtype=torch.int64)
            _check_labels(f"labels of {self.name}", labels, self.classes)
            self._labels = labels
        return self._labels

    def fetch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, ...) float32 in the box and y (B,) int64 of the rows (B,)."""
        inputs, labels = zip(*(self._sample(row) for row in rows.tolist()), strict=True)
        shapes = {tuple(x.shape) for x in inputs}
        if len(shapes) > 1:
            raise InputError(f"{self.name} yields samples of shapes {sorted(shapes)}: all must have the same shape")
        x, y = torch.stack(inputs), torch.tensor(labels)
        _check_inputs(self.name, x, self.box)
        _check_labels(f"labels of {self.name}", y, self.classes)
        return _unit(x), y

    def _sample(self, row: int) -> tuple[Tensor, int]:
        sample = self.dataset[row]
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise InputError(f"{self.name} yields a {type(sample).__name__}: must yield pairs (x, y)")
        x, y = sample
        if not isinstance(x, Tensor):
            raise InputError(f"{self.name} yields x as {type(x).__name__}: must be a tensor, so give it a transform")
        try:
            return x, index(y)
        except TypeError:
            raise InputError(
                f"{self.name} yields y as {type(y).__name__} {y!r:.60}: must be an integer class"
            ) from None


class Split(Dataset[Batch]):
    """Rows of a source: yields (x float32 in the box, y int64, index int64).

    `index` is the row in the source. It stays what it is under row limits and held-out choices, so it addresses
    per-sample buffers (of length `source_size`) and keyed noise.

    Args:
        source: where the samples are.
        rows: (n,) int64 rows of the source; all of them if None.

    Raises:
        InputError: no rows, or rows that the source does not have.
    """

    rows: Tensor

    def __init__(self, source: Source, rows: Tensor | None = None) -> None:
        rows = torch.arange(len(source)) if rows is None else rows.to(torch.int64)
        if rows.dim() != 1 or len(rows) == 0 or int(rows.min()) < 0 or int(rows.max()) >= len(source):
            raise InputError(
                f"rows of shape {tuple(rows.shape)}: must be (n,), not empty, each in 0..{len(source) - 1}"
            )
        self.source = source
        self.rows = rows

    @property
    def source_size(self) -> int:
        """Rows of the source: the length a per-sample buffer addressed by index must have."""
        return len(self.source)

    @property
    def labels(self) -> Tensor:
        """(n,) int64, the class of every row of the split."""
        return self.source.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Batch:
        """One sample: x (...), y () and index ()."""
        row = self.rows[position]
        x, y = self.source.fetch(row[None])
        return x[0], y[0], row

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """One collated batch: x (B, ...), y (B,) and index (B,); what `DataLoader` calls to fetch many at once."""
        rows = self.rows[torch.as_tensor(positions, dtype=torch.int64)]
        return *self.source.fetch(rows), rows

    def tensors(self) -> Batch:
        """All of it in memory: x (n, ...) float32, y (n,) and index (n,)."""
        return *self.source.fetch(self.rows), self.rows.clone()
