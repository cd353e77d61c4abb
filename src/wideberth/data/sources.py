"""Data sets: what a config's `data:` names by class path; each gives a train, a validation and a test split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from wideberth.checks import Box, InputError, at_least
from wideberth.configuration import Described
from wideberth.data.splits import InMemory, Lazy, Source, Split, sample_rows
from wideberth.randomness import fold, permutation


class Data(Described, ABC):
    """A classification data set, read when first asked for and kept.

    A subclass sets `classes`, `shape` (of one input) and `box`, checks its arguments on construction as far as that
    is cheap, and implements `_load`. It passes `**limits`, untyped so that the command line finds types, defaults and
    help of these arguments in one place, on to this class.

    Args:
        train_rows: use only so many training rows, the first; all if None. Where rows may come class by class, as image
            files do, it is a fixed random sample, of which a smaller one is a part.
        test_rows: likewise of the test rows.
        validation: how many of these training rows are held out for validation; 0 for none.
        validation_seed: decides which ones.

    Raises:
        InputError: a number out of range: on construction, or on reading where the size is known only then.
    """

    classes: int
    shape: tuple[int, ...]
    box: Box = (0.0, 1.0)
    _by_class: ClassVar[bool] = False
    """Whether rows may come class by class: then a limit takes a fixed random sample, not the first rows."""

    def __init__(
        self,
        *,
        train_rows: int | None = None,
        test_rows: int | None = None,
        validation: int = 0,
        validation_seed: int = 0,
    ) -> None:
        self._limits = {True: train_rows, False: test_rows}
        for train, limit in self._limits.items():
            if limit is not None:
                at_least("train_rows" if train else "test_rows", limit, 1)
        at_least("validation", validation, 0)
        self._held_out, self._validation_seed = validation, validation_seed
        self._loaded: dict[bool, Source] = {}

    @abstractmethod
    def _load(self, train: bool) -> Source:
        """Read the training or the test samples; called at most once for each.

        Where reading takes long, a source may end at the row limit; it may not begin elsewhere.
        """

    def prepare(self) -> None:
        """Fetch what has to be downloaded; with several processes, call it on one of them first."""

    def train(self) -> Split:
        """The training rows that are not held out."""
        return Split(self._source(True), self._train_and_held_out()[0])

    def validation(self) -> Split | None:
        """The held-out training rows (their index is that of the training source); None without `validation`."""
        return Split(self._source(True), self._train_and_held_out()[1]) if self._held_out else None

    def test(self, rows: int | None = None) -> Split:
        """The test rows; with `rows`, only those that `test_rows=rows` takes (all where there are fewer)."""
        return Split(self._source(False), self._first_rows(False, rows))

    def _source(self, train: bool) -> Source:
        if train not in self._loaded:
            self._loaded[train] = self._load(train)
        return self._loaded[train]

    def _first_rows(self, train: bool, most: int | None = None) -> Tensor:
        """The rows of the source within the limit, and within `most` where that is smaller, (n,) int64."""
        size = len(self._source(train))
        limit = self._limits[train]
        if limit is not None and limit > size:
            kind = "train" if train else "test"
            raise InputError(f"{kind}_rows={limit}: {type(self).__name__} has {size} {kind} rows")
        count = min(number for number in (size, limit, most) if number is not None)
        return sample_rows(size, count) if self._by_class else torch.arange(count)

    def _train_and_held_out(self) -> tuple[Tensor, Tensor]:
        rows = self._first_rows(True)
        if self._held_out >= len(rows):
            raise InputError(f"validation={self._held_out}: must leave some of the {len(rows)} training rows")
        order = permutation(fold(self._validation_seed, "validation"), 0, len(rows))
        held_out, kept = order[: self._held_out], order[self._held_out :]
        return rows[kept.sort().values], rows[held_out.sort().values]


class Digits(Data):
    """1,797 real handwritten digits that come with scikit-learn: 1x8x8, 1,297 to train and 500 to test.

    The original order groups writers, so a fixed permutation decides which rows are which.
    """

    classes = 10
    shape = (1, 8, 8)

    def _load(self, train: bool) -> Source:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = permutation(0, 0, len(digits.target))
        rows = order[:-500] if train else order[-500:]
        x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        return InMemory(x[rows], torch.tensor(digits.target)[rows], classes=self.classes)


class Tensors(Data):
    """Data that are in memory already.

    Args:
        x_train: (n, ...) uint8 images (C, H, W), or floats in the box.
        y_train: (n,) integers in 0..classes-1.
        x_test: (m, ...) as x_train.
        y_test: (m,) as y_train.
        classes: number of classes; one more than the largest label if None.
        box: (low, high) that holds every input; contains [0, 1] where the inputs are uint8.
        limits: see `Data`.

    Raises:
        InputError: no rows, shapes or dtypes that do not fit, values not finite or outside the box, labels
            outside 0..classes-1.
    """

    def __init__(
        self,
        x_train: Tensor | np.ndarray,
        y_train: Tensor | np.ndarray,
        x_test: Tensor | np.ndarray,
        y_test: Tensor | np.ndarray,
        *,
        classes: int | None = None,
        box: Box = (0.0, 1.0),
        **limits: Any,
    ) -> None:
        super().__init__(**limits)
        x, y = [torch.as_tensor(v) for v in (x_train, x_test)], [torch.as_tensor(v) for v in (y_train, y_test)]
        if x[0].shape[1:] != x[1].shape[1:]:
            raise InputError(
                f"x_test has inputs of shape {tuple(x[1].shape[1:])}: must be {tuple(x[0].shape[1:])} as in x_train"
            )
        if classes is None:
            classes = max((int(labels.max()) for labels in y if labels.numel()), default=1) + 1
        names = (("x_train", "y_train"), ("x_test", "y_test"))
        self._sources = [InMemory(x[i], y[i], classes=classes, box=box, names=names[i]) for i in range(2)]
        self.classes, self.shape, self.box = classes, tuple(x[0].shape[1:]), box

    def _load(self, train: bool) -> Source:
        return self._sources[0 if train else 1]


class FromDatasets(Data):
    """Any two torch data sets of (x, y), read sample by sample when needed.

    Args:
        train: map-style; yields x, a tensor (uint8 image, or floats in the box) of one shape, and an integer y.
        test: as train.
        classes: number of classes.
        box: (low, high) that holds every input.
        limits: see `Data`.

    Raises:
        InputError: no length, no sample, or a first sample that is not as described; later ones are checked as
            they are read.
    """

    def __init__(
        self,
        train: Dataset,  # type: ignore[type-arg]  # with a type argument, a config's class path is refused
        test: Dataset,  # type: ignore[type-arg]
        *,
        classes: int,
        box: Box = (0.0, 1.0),
        **limits: Any,
    ) -> None:
        super().__init__(**limits)
        self._sources = [
            Lazy(dataset, classes=classes, box=box, name=name) for dataset, name in ((train, "train"), (test, "test"))
        ]
        shapes = [tuple(source.fetch(torch.tensor([0]))[0].shape[1:]) for source in self._sources]
        if shapes[0] != shapes[1]:
            raise InputError(f"test has inputs of shape {shapes[1]}: must be {shapes[0]} as in train")
        self.classes, self.shape, self.box = classes, shapes[0], box

    def _load(self, train: bool) -> Source:
        return self._sources[0 if train else 1]
