"""The base class of regularizers: one value per sample, with graph to the parameters of the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from wideberth.checks import InputError
from wideberth.gradients import gradient_of
from wideberth.modes import Mode, lent
from wideberth.randomness import Noise
from wideberth.training.curvature import twice_differentiable
from wideberth.training.schedules import Schedule, not_negative, value_at

Where: TypeAlias = Literal["adversarial", "clean"]


class Regularizer(ABC):
    """A penalty on the shape of the function that the model computes; a new one is one subclass with a `compute`.

    Args:
        weight: factor of the mean penalty in the loss: a number >= 0, or a `Schedule` of the epoch.
        mode: the mode of the model in `compute`. In "eval", batch norm does not couple the samples, and a gradient
            belongs to its own sample.

    Attributes:
        where: the points that it is given: the "adversarial" ones (the clean inputs where there are none), or always
            the "clean" ones.
        twice: whether `compute` differentiates gradients of the model again; the model's forwards are then rewritten by
            `twice_differentiable`. A regularizer that does not sets it to False and saves that cost.
    """

    where: ClassVar[Where] = "adversarial"
    twice: bool = True

    def __init__(self, weight: float | Schedule, mode: Mode = "eval") -> None:
        not_negative("weight", weight)
        self.weight, self.mode = weight, mode

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """The penalty of each sample, (B,), with graph to the parameters of `model`.

        It is >= 0 for all but `WeightNorm`, a sum of logarithms.

        Args:
            model: its mode is restored afterwards.
            x: (B, ...) the points at which the penalty is computed, see `where`.
            y: (B,) int64 labels.
            noise: random streams of the rows.
        """
        point = x.detach().requires_grad_()
        # In float32 under autocast too: the squares are tiny at initialisation (1e-5 on a small net).
        wide = torch.autocast(x.device.type, enabled=False)
        with lent(model, self.mode, freeze=False), wide, twice_differentiable() if self.twice else nullcontext():
            return self.compute(model, point, y, noise)

    @abstractmethod
    def compute(self, model: nn.Module, point: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """The penalty at `point` (B, ...), which takes gradients, (B,)."""

    def weight_at(self, epoch: float) -> float:
        """The weight at a moment of training."""
        return value_at(self.weight, epoch)


def positive(name: str, value: float) -> None:
    """Refuse a number that is not above 0 (`InputError`)."""
    if not value > 0:
        raise InputError(f"{name}={value}: must be positive")


def squared_norm(output: Tensor, point: Tensor) -> Tensor:
    """Squared l2 norm of the gradient of each row's `output` (B,) at `point` (B, ...), (B,), with graph."""
    return gradient_of(output, point, create_graph=True).flatten(1).square().sum(1)
