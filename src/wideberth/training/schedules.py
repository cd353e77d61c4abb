"""Numbers that change with the epoch: regularizer weights, radii, learning rates."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from wideberth.checks import InputError, at_least


class Schedule(ABC):
    """A number as a function of the epoch (0-based; a fraction says how far the epoch has come)."""

    @abstractmethod
    def __call__(self, epoch: float) -> float:
        """The value at `epoch`."""


@dataclass(frozen=True)
class Steps(Schedule):
    """`value` times `factor` for every milestone epoch (0-based) that has begun."""

    value: float
    epochs: Sequence[int]
    factor: float = 0.1

    def __call__(self, epoch: float) -> float:
        """The value at `epoch`."""
        return self.value * self.factor ** sum(epoch >= milestone for milestone in self.epochs)


@dataclass(frozen=True)
class Ramp(Schedule):
    """A straight line from `start` to `value` over the first `epochs` epochs, then `value`."""

    value: float
    epochs: float
    start: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a ramp of no length (`InputError`)."""
        if not self.epochs > 0:
            raise InputError(f"Ramp(epochs={self.epochs}): must be positive")

    def __call__(self, epoch: float) -> float:
        """The value at `epoch`."""
        return self.start + (self.value - self.start) * min(1.0, epoch / self.epochs)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine wave from `start` to `value` over the first `epochs` epochs, flat at both ends, then `value`."""

    value: float
    epochs: float
    start: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a ramp of no length (`InputError`)."""
        if not self.epochs > 0:
            raise InputError(f"Cosine(epochs={self.epochs}): must be positive")

    def __call__(self, epoch: float) -> float:
        """The value at `epoch`."""
        way = (1 - math.cos(math.pi * min(1.0, epoch / self.epochs))) / 2
        return self.start + (self.value - self.start) * way


@dataclass(frozen=True)
class Levels:
    """A factor of the learning rate that is constant between milestones: `lr_lambda` of torch's `LambdaLR`.

    `MultiStepLR` has one factor for all milestones; this has a value for each.

    Args:
        factors: of the optimizer's rate: the first from the beginning, each other from its milestone on.
        starts: the first epoch (0-based; step, with `scheduler_interval: step`) of each factor, rising from 0.
    """

    factors: Sequence[float]
    starts: Sequence[int]

    def __post_init__(self) -> None:
        """Refuse milestones that do not rise from 0, one per factor (`InputError`)."""
        starts = list(self.starts)
        if len(starts) != len(self.factors) or starts[:1] != [0] or starts != sorted(set(starts)):
            raise InputError(f"Levels(starts={starts}): must be 0 and then rise, one for each of the factors")

    def __call__(self, epoch: int) -> float:
        """The factor at `epoch`."""
        return self.factors[sum(start <= epoch for start in self.starts) - 1]


def value_at(schedule: float | Schedule, epoch: float) -> float:
    """The value of a number or a schedule at `epoch`."""
    return schedule(epoch) if isinstance(schedule, Schedule) else float(schedule)


def not_negative(name: str, schedule: float | Schedule) -> None:
    """Refuse a negative number, or a schedule that begins with one (`InputError`)."""
    at_least(name, value_at(schedule, 0.0), 0.0)
