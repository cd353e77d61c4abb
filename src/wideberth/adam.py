"""Adam's step (Kingma and Ba 2015) for points instead of weights: each row by itself, without an optimizer object."""

from __future__ import annotations

import torch
from torch import Tensor

from wideberth import geometry

_DECAY = (0.9, 0.999)
"""Of the two running means."""


def adam_step(
    gradient: Tensor, mean: Tensor, square: Tensor, step: int | Tensor, tiny: float = 1e-8
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Adam, at a learning rate of 1.

    Args:
        gradient: (B, ...) to follow.
        mean: (B, ...) running mean of the gradient so far, zero at first.
        square: (B, ...) running mean of its square so far, zero at first.
        step: which step this is, from 1: a number or (B,) int64.
        tiny: added to the root of the mean square.

    Returns:
        The move, uphill along the gradient, and both running means after it, (B, ...) each.
    """
    mean = torch.lerp(gradient, mean, _DECAY[0])
    square = torch.lerp(gradient.square(), square, _DECAY[1])
    if isinstance(step, Tensor):
        powers = step.to(mean.dtype)
        first, second = (geometry.column(1 - decay**powers, mean) for decay in _DECAY)
        return mean / first / ((square / second).sqrt() + tiny), mean, square
    move = mean / (1 - _DECAY[0] ** step) / ((square / (1 - _DECAY[1] ** step)).sqrt() + tiny)
    return move, mean, square
