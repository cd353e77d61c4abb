"""Windows of Square: how large they are when, where they lie in each row, and the bumps that fill them in l2 and l1."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wideberth.checks import Norm
from wideberth.randomness import Noise

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After these iterations of 10,000 the fraction of the input that a window covers is halved."""


def image(x: Tensor) -> Tensor:
    """The input as (B, C, H, W): windows cover part of the last two axes, and all channels.

    (B, d) vectors have one channel and H = 1, (B, C, T) sequences H = 1; leading axes of higher ranks are channels.
    """
    if x.dim() <= 3:
        return x.reshape(len(x), -1, 1, x.shape[-1])
    return x.flatten(1, -3)


def sides(fraction: float, height: int, width: int, norm: Norm) -> tuple[int, int]:
    """Rows and columns of a window that covers a fraction of the input.

    It is a square (in l2 and l1 of odd side, at least 3, so that a bump has a middle). Where the shorter axis has no
    room for it, it grows along the longer one; along a vector, it is a stretch of 1..d entries.
    """
    area = fraction * height * width
    if min(height, width) == 1:
        length = max(1, round(area))
        return min(length, height), min(length, width)
    side = max(1, round(area**0.5))
    if norm != "linf":
        side = max(side, 3) | 1
    rows = side if side <= width else max(side, round(area / width))
    columns = side if side <= height else max(side, round(area / height))
    return min(rows, height), min(columns, width)


class Window(NamedTuple):
    """One window per row.

    Attributes:
        top: (B,) int64, its first row.
        left: (B,) int64, its first column.
        rows: (B,) int64, how many it has.
        columns: (B,) int64.
    """

    top: Tensor
    left: Tensor
    rows: Tensor
    columns: Tensor

    def mask(self, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """(B, 1, H, W), 1 inside and 0 outside: as numbers, since products run in vectors and selections do not."""
        across = _inside(self.left, self.columns, width, dtype)[:, None, None, :]
        return across if height == 1 else across * _inside(self.top, self.rows, height, dtype)[:, None, :, None]

    def places(self, width: int) -> Tensor:
        """(B, n) int64, where in the flattened (H, W) its entries lie; smaller windows name their last ones again."""
        device = self.top.device
        down = torch.arange(int(self.rows.max()), device=device).minimum(self.rows[:, None] - 1) + self.top[:, None]
        across = torch.arange(int(self.columns.max()), device=device).minimum(self.columns[:, None] - 1)
        return (down[:, :, None] * width + (across + self.left[:, None])[:, None]).flatten(1)


def _inside(first: Tensor, count: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    place = torch.arange(length, device=first.device) - first[:, None]
    return ((place >= 0) & (place < count[:, None])).to(dtype)


@dataclass(frozen=True)
class Plan:
    """Windows by stage; what depends on the shape of the input alone, and is made once.

    Attributes:
        halvings: (9,) int64, the last iterations of all stages but the last.
        size: (10, 2) int64, rows and columns of a stage's window.
        bumps: (20, M, N), two orientations of each stage's bump (l2 and l1 only), on a ground of zeros: a window of it
            shows the bump anywhere in the input.
    """

    halvings: Tensor
    size: Tensor
    bumps: Tensor

    def stage(self, iteration: Tensor) -> Tensor:
        """(B,) int64: how often the windows' area has been halved by then."""
        return torch.bucketize(iteration, self.halvings)

    def draw(self, stage: Tensor, where: Tensor, height: int, width: int) -> Window:
        """Windows of the stages (B,), placed by uniform numbers (B, 2); every position is as likely."""
        rows, columns = self.size[stage].unbind(1)
        # Offsets 0..H-s, the last included (the original never draws it).
        free = torch.stack([height + 1 - rows, width + 1 - columns], 1)
        top, left = (where * free).to(torch.int64).unbind(1)
        return Window(top, left, rows, columns)

    def bump(self, stage: Tensor, turned: Tensor, window: Window, height: int, width: int) -> Tensor:
        """(B, 1, H, W): the bump of unit norm in each row's window, zero around it; `turned` (B,) int64 is 0 or 1."""
        crops = self.bumps.unfold(2, width, 1)
        top = height - window.rows - window.top
        down = torch.arange(height, device=top.device) + top[:, None]
        left = width - window.columns - window.left
        return crops[(2 * stage + turned)[:, None], down, left[:, None]][:, None]


@lru_cache(maxsize=32)
def plan(fraction: float, height: int, width: int, norm: Norm, dtype: torch.dtype, device: torch.device) -> Plan:
    """The windows of an attack that begins with those that cover `fraction` of an input."""
    stages = [sides(fraction / 2**halved, height, width, norm) for halved in range(len(HALVINGS) + 1)]
    bumps = torch.zeros(0, 1, width, dtype=dtype)
    if norm != "linf":
        rows = 2 * height - min(rows for rows, _ in stages)
        columns = 2 * width - min(columns for _, columns in stages)
        bumps = torch.zeros(2 * len(stages), rows, columns, dtype=dtype)
        for stage, (high, wide) in enumerate(stages):
            corner = bumps[2 * stage : 2 * stage + 2, height - high : height, width - wide : width]
            corner.copy_(torch.stack([bump(high, wide, norm), bump(high, wide, norm, turned=True)]))
    return Plan(torch.tensor(HALVINGS, device=device), torch.tensor(stages, device=device), bumps.to(device))


def bump(rows: int, columns: int, norm: Norm, *, turned: bool = False) -> Tensor:
    """(rows, columns) in float64, unit norm: two hills of opposite signs, one above the other or (turned) side by side.

    A hill falls off from its middle with the distance in the maximum norm; a window of one entry is 1.
    """
    if rows * columns == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if rows == 1 or (columns > 1 and turned):
        return bump(columns, rows, norm).T
    first = rows // 2
    hills = torch.cat([_hill(first, columns, norm), -_hill(rows - first, columns, norm)])
    # Each hill has one half of the (squared) mass: both have unit norm on their own.
    return hills / (2**0.5 if norm == "l2" else 2)


def _hill(rows: int, columns: int, norm: Norm) -> Tensor:
    """Sum of nested squares around the middle, clipped to the rectangle; the k-th has height 1/k^2, in l1 1/k^4."""
    power = 2 if norm == "l2" else 4
    down = (torch.arange(rows) - rows // 2).abs()
    across = (torch.arange(columns) - columns // 2).abs()
    distance = torch.maximum(down[:, None], across)
    squares = torch.arange(1, max(rows, columns) // 2 + 2, dtype=torch.float64) ** -power
    # An entry lies in every square that is at least as large as its distance.
    height = squares.flip(0).cumsum(0).flip(0)[distance]
    length: Tensor = torch.linalg.vector_norm(height, ord=2 if norm == "l2" else 1)
    return height / length


def tiles(noise: Noise, shape: torch.Size, norm: Norm, dtype: torch.dtype) -> Tensor:
    """(B, C, H, W): a grid of bumps, 5 or a few more along each axis, signs and orientations drawn per row."""
    _, channels, height, width = shape
    high, wide = max(1, height // 5), max(1, width // 5)
    down, across = height // high, width // wide
    draws = noise.uniform((channels + 1, down, across), dtype)

    def spread(values: Tensor) -> Tensor:
        return values.repeat_interleave(high, -2).repeat_interleave(wide, -1)

    device = noise.index.device
    flat, turned = (
        bump(high, wide, norm, turned=side).to(device, dtype).repeat(down, across) for side in (False, True)
    )
    pattern = torch.where(spread(draws[:, -1:]) < 0.5, flat, turned)
    grid = torch.where(spread(draws[:, :-1]) < 0.5, pattern, -pattern)
    top, left = (height - down * high) // 2, (width - across * wide) // 2
    return F.pad(grid, (left, width - across * wide - left, top, height - down * high - top))
