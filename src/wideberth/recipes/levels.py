"""Learning rates that go down, or up, by other factors at each milestone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wideberth.checks import InputError


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
