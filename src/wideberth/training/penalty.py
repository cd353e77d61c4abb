"""What every regularizer is: one value per sample, of a lent model, with graph to its parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, TypeAlias

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
    """What the shape of the function pays; a new regularizer is one subclass with a `compute`.

    Args:
        weight: factor of the mean penalty in the loss: a number >= 0, or a `Schedule` of the epoch.
        mode: the mode of the model meanwhile. In "eval", batch norm does not couple the samples, and a gradient
            belongs to its own sample.

    Attributes:
        where: which points it is given: the "adversarial" ones (the clean inputs where there are none), or always the
            "clean" ones.
        twice: whether `compute` differentiates gradients of the model again, for which its forwards are then prepared
            (`twice_differentiable`). One that does not says False, and pays nothing for it.
    """

    where: ClassVar[Where] = "adversarial"
    twice: bool = True

    def __init__(self, weight: float | Schedule, mode: Mode = "eval") -> None:
        not_negative("weight", weight)
        self.weight, self.mode = weight, mode

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """The penalty of each sample, (B,), with graph to the parameters of `model`.

        It is >= 0 wherever it is made of norms; `WeightNorm`, made of logarithms, may be negative.

        Args:
            model: given back in the mode it came in.
            x: (B, ...) where the function's shape is judged, see `where`.
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


class _Settled(torch.autograd.Function):
    """A value with the gradients it will have, which are scaled by what comes back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *[scale * gradient for gradient in ctx.gradients]


def settled(value: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """`value`, (), with its gradient in `parameters` taken now, and its graph let go.

    The graph of a second derivative is the largest of a training step. Let go before the objective builds its own, the
    two never lie in memory together: a lower peak, and on a CPU a step several per cent faster.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if not value.requires_grad or not wanted:
        return value
    found = torch.autograd.grad(value, wanted, allow_unused=True)
    reached = [(p, gradient) for p, gradient in zip(wanted, found, strict=True) if gradient is not None]
    settled_value: Tensor = _Settled.apply(value.detach(), [g for _, g in reached], *[p for p, _ in reached])
    return settled_value
