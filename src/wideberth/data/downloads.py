"""The standard image data sets of torchvision, held in memory as uint8."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from pickle import PickleError
from typing import Any, ClassVar

import torch
from torch import Tensor

from wideberth.checks import InputError, one_line
from wideberth.data.sources import Data
from wideberth.data.splits import InMemory, Source


class _Torchvision(Data):
    """A data set that torchvision can download and that fits in memory.

    Args:
        root: folder where it is, or is to be.
        download: fetch it if it is not there.
        limits: see `Data`.

    Raises:
        InputError: files missing or unreadable, and not to be had.
    """

    _files: ClassVar[tuple[str, ...]]  # what has to be there, under root

    def __init__(self, root: str = "data", download: bool = True, **limits: Any) -> None:
        super().__init__(**limits)
        self._root = Path(root).expanduser()
        self._download = download
        if not download and (missing := self._missing()):
            raise InputError(
                f"root={root!r}: there is no {missing}; name the folder that holds it, or let download=True"
            )

    @abstractmethod
    def _open(self, train: bool) -> tuple[Tensor, Tensor]:
        """x (n, C, H, W) uint8 and y (n,), by way of torchvision."""

    def prepare(self) -> None:
        """Download what is not there."""
        if self._missing():
            self._source(True)
            self._source(False)

    def _missing(self) -> Path | None:
        return next((path for file in self._files if not (path := self._root / file).is_file()), None)

    def _load(self, train: bool) -> Source:
        name = type(self).__name__
        try:
            x, y = self._open(train)
        # Failed downloads and broken files surface as any of these: torchvision has no error of its own.
        except (OSError, RuntimeError, ValueError, TypeError, EOFError, AssertionError, PickleError) as error:
            doing = "download" if self._missing() else "read"
            raise InputError(f"root={str(self._root)!r}: cannot {doing} {name} there: {one_line(error)}") from error
        return InMemory(x, y, classes=self.classes, names=(f"{name} images", f"{name} labels"))


class MNIST(_Torchvision):
    """Handwritten digits: 1x28x28, 60,000 to train and 10,000 to test."""

    classes = 10
    shape = (1, 28, 28)
    _files = (
        "MNIST/raw/train-images-idx3-ubyte",
        "MNIST/raw/train-labels-idx1-ubyte",
        "MNIST/raw/t10k-images-idx3-ubyte",
        "MNIST/raw/t10k-labels-idx1-ubyte",
    )

    def _open(self, train: bool) -> tuple[Tensor, Tensor]:
        from torchvision.datasets import MNIST as Opened

        opened = Opened(self._root, train=train, download=self._download)
        return opened.data.unsqueeze(1), opened.targets


class FashionMNIST(_Torchvision):
    """Pictures of clothes: 1x28x28, 60,000 to train and 10,000 to test."""

    classes = 10
    shape = (1, 28, 28)
    _files = tuple(f"Fashion{file}" for file in MNIST._files)

    def _open(self, train: bool) -> tuple[Tensor, Tensor]:
        from torchvision.datasets import FashionMNIST as Opened

        opened = Opened(self._root, train=train, download=self._download)
        return opened.data.unsqueeze(1), opened.targets


class CIFAR10(_Torchvision):
    """Small photographs of ten kinds of things: 3x32x32, 50,000 to train and 10,000 to test."""

    classes = 10
    shape = (3, 32, 32)
    _files = (*(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)), "cifar-10-batches-py/test_batch")

    def _open(self, train: bool) -> tuple[Tensor, Tensor]:
        from torchvision.datasets import CIFAR10 as Opened

        opened = Opened(self._root, train=train, download=self._download)
        return _channels_first(opened.data), torch.tensor(opened.targets)


class CIFAR100(_Torchvision):
    """Small photographs of a hundred kinds of things: 3x32x32, 50,000 to train and 10,000 to test."""

    classes = 100
    shape = (3, 32, 32)
    _files = ("cifar-100-python/train", "cifar-100-python/test")

    def _open(self, train: bool) -> tuple[Tensor, Tensor]:
        from torchvision.datasets import CIFAR100 as Opened

        opened = Opened(self._root, train=train, download=self._download)
        return _channels_first(opened.data), torch.tensor(opened.targets)


class SVHN(_Torchvision):
    """House numbers, cropped to one digit: 3x32x32, 73,257 to train and 26,032 to test."""

    classes = 10
    shape = (3, 32, 32)
    _files = ("train_32x32.mat", "test_32x32.mat")

    def _open(self, train: bool) -> tuple[Tensor, Tensor]:
        from torchvision.datasets import SVHN as Opened

        opened = Opened(str(self._root), split="train" if train else "test", download=self._download)
        return torch.tensor(opened.data), torch.tensor(opened.labels)


def _channels_first(images: Any) -> Tensor:
    return torch.as_tensor(images).permute(0, 3, 1, 2).contiguous()
