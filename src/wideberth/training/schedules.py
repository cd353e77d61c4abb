"""Numbers that change with the epoch: regularizer weights and radii."""

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


def value_at(schedule: float | Schedule, epoch: float) -> float:
    """The value of a number or a schedule at `epoch`."""
    return schedule(epoch) if isinstance(schedule, Schedule) else float(schedule)


def not_negative(name: str, schedule: float | Schedule) -> None:
    """Refuse a negative number, or a schedule that begins with one (`InputError`)."""
    at_least(name, value_at(schedule, 0.0), 0.0)
