"""Random images of any shape under a class path of their own, in the place of a recipe's data."""

from __future__ import annotations

from typing import Any

import torch

from wideberth.data import Data
from wideberth.data.splits import InMemory, Source


class Synthetic(Data):
    """A few random images.

    Args:
        shape: of one image.
        classes: number of classes.
        rows: how many there are to train, and to test.
        limits: see `Data`.
    """

    def __init__(self, shape: list[int], classes: int = 10, rows: int = 8, **limits: Any) -> None:
        super().__init__(**limits)
        self.shape, self.classes, self.rows = tuple(shape), classes, rows

    def _load(self, train: bool) -> Source:
        generator = torch.Generator().manual_seed(int(train))
        x = torch.rand(self.rows, *self.shape, generator=generator)
        return InMemory(x, torch.arange(self.rows) % self.classes, classes=self.classes)
