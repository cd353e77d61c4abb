"""Data sets: what a config's `data:` names by class path; each gives a train, a validation and a test split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from wideberth.checks import Box, InputError, at_least, valid_box
from wideberth.data.splits import InMemory, Lazy, Source, Split, one_line
from wideberth.randomness import fold, permutation


class Data(ABC):
    """A classification data set, read when first asked for and kept.

    A subclass sets `classes`, `shape` (of one input) and `box`, checks its arguments on construction as far as that
    is cheap, and implements `_load`. It passes `**limits` on to this class, where they are documented.

    Args:
        train_rows: use the first so many training rows; all if None.
        test_rows: use the first so many test rows; all if None.
        validation: how many of these training rows are held out for validation; 0 for none.
        validation_seed: decides which ones.

    Raises:
        InputError: a number out of range: on construction, or on reading where the size is known only then.
    """

    classes: int
    shape: tuple[int, ...]
    box: Box = (0.0, 1.0)

    def __init__(
        self,
        *,
        train_rows: int | None = None,
        test_rows: int | None = None,
        validation: int = 0,
        validation_seed: int = 0,
    ) -> None:
        for name, rows in (("train_rows", train_rows), ("test_rows", test_rows)):
            if rows is not None:
                at_least(name, rows, 1)
        at_least("validation", validation, 0)
        self._train_rows, self._test_rows = train_rows, test_rows
        self._held_out, self._validation_seed = validation, validation_seed
        self._loaded: dict[bool, Source] = {}

    @abstractmethod
    def _load(self, train: bool) -> Source:
        """Read the training or the test samples; called at most once for each."""

    def prepare(self) -> None:
        """Fetch what has to be downloaded; with several processes, call it on one of them first."""

    def train(self) -> Split:
        """The training rows that are not held out."""
        return Split(self._source(True), self._train_and_held_out()[0])

    def validation(self) -> Split | None:
        """The held-out training rows (their index is that of the training source); None without `validation`."""
        return Split(self._source(True), self._train_and_held_out()[1]) if self._held_out else None

    def test(self) -> Split:
        """The test rows."""
        return Split(self._source(False), self._first_rows(False))

    def _source(self, train: bool) -> Source:
        if train not in self._loaded:
            self._loaded[train] = self._load(train)
        return self._loaded[train]

    def _first_rows(self, train: bool) -> Tensor:
        size = len(self._source(train))
        rows = self._train_rows if train else self._test_rows
        if rows is not None and rows > size:
            kind = "train" if train else "test"
            raise InputError(f"{kind}_rows={rows}: {type(self).__name__} has {size} {kind} rows")
        return torch.arange(size if rows is None else rows)

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

    def __init__(self, **limits: Any) -> None:
        super().__init__(**limits)

    def _load(self, train: bool) -> Source:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = permutation(0, 0, len(digits.target))
        rows = order[:-500] if train else order[-500:]
        x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        return InMemory(x[rows], torch.tensor(digits.target)[rows], classes=self.classes)


class _Torchvision(Data):
    """A data set of torchvision that fits in memory."""

    _files: ClassVar[tuple[str, ...]]  # under root, what has to be there

    def __init__(self, root: str = "data", download: bool = True, **limits: Any) -> None:
        super().__init__(**limits)
        self._root = Path(root).expanduser()
        self._download = download
        missing = [self._root / file for file in self._files if not (self._root / file).is_file()]
        if missing and not download:
            raise InputError(
                f"root={root!r}: no {missing[0]}; give the folder that holds {Path(self._files[0]).parts[0]}, "
                "or download=True"
            )

    @abstractmethod
    def _open(self, train: bool) -> tuple[Tensor, Tensor]:
        """x (n, C, H, W) uint8 and y (n,) by way of torchvision."""

    def prepare(self) -> None:
        """Download what is missing."""
        if any(not (self._root / file).is_file() for file in self._files):
            self._source(True), self._source(False)

    def _load(self, train: bool) -> Source:
        name = type(self).__name__
        try:
            x, y = self._open(train)
        # Broken files surface as any of these: torchvision has no error of its own.
        except (OSError, RuntimeError, ValueError, TypeError, EOFError, AssertionError) as error:
            doing = "read or download" if self._download else "read"
            raise InputError(f"root={str(self._root)!r}: cannot {doing} {name} there: {one_line(error)}") from error
        names = (f"the images of {name}", f"the labels of {name}")
        return InMemory(x, y, classes=self.classes, names=names)


class MNIST(_Torchvision):
    """Handwritten digits: 1x28x28, 60,000 to train and 10,000 to test.

    Args:
        root: folder that holds MNIST/raw.
        download: fetch what is missing.
        limits: see `Data`.

    Raises:
        InputError: files missing or unreadable, and not to be had.
    """

    classes = 10
    shape = (1, 28, 28)
    _files = tuple(
        f"MNIST/raw/{part}"
        for part in (
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
            "t10k-images-idx3-ubyte",
            "t10k-labels-idx1-ubyte",
        )
    )

    def _open(self, train: bool) -> tuple[Tensor, Tensor]:
        from torchvision import datasets

        # FashionMNIST has the same files under its own name.
        opened = getattr(datasets, type(self).__name__)(self._root, train=train, download=self._download)
        return opened.data.unsqueeze(1), opened.targets


class FashionMNIST(_Torchvision):
    """Photographs of clothes: 1x28x28, 60,000 to train and 10,000 to test; arguments as for `MNIST`."""


class CIFAR10(_Torchvision):
    """Photographs of ten kinds of things: 3x32x32, 50,000 to train and 10,000 to test."""


class CIFAR100(_Torchvision):
    """x"""


class SVHN(_Torchvision):
    """x"""
