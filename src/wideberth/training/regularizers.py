"""Regularizers: what the shape of the function pays. Each gives one value per sample, so that a weight means the same
at every batch size; published code that squares the gradient of a batch mean divides by B once more, and its weights
are converted in the recipes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wideberth import checks, losses
from wideberth.modes import Mode, borrowed
from wideberth.randomness import Noise
from wideberth.training.curvature import twice_differentiable
from wideberth.training.schedules import Schedule, not_negative, value_at


class Regularizer(ABC):
    """What the shape of the function pays; a new regularizer is one subclass with a `penalise`.

    Args:
        weight: factor of the mean penalty in the loss: a number >= 0, or a `Schedule` of the epoch.
        mode: the mode of the model meanwhile. In "eval", batch norm does not couple the samples, and a gradient
            belongs to its own sample.
    """

    def __init__(self, weight: float | Schedule, mode: Mode = "eval") -> None:
        not_negative("weight", weight)
        self.weight, self.mode = weight, mode

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """The penalty of each sample, (B,) >= 0, with graph to the parameters of `model`.

        Args:
            model: given back in the mode it came in.
            x: (B, ...) where the function's shape is judged: the adversarial points, if there are any.
            y: (B,) int64 labels.
            noise: random streams of the rows.
        """
        point = x.detach().requires_grad_()
        # In float32 under autocast too: the squares are tiny at initialisation (1e-5 on a small net).
        wide = torch.autocast(x.device.type, enabled=False)
        with borrowed(model, self.mode, freeze=False), wide, twice_differentiable():
            return self.penalise(model, point, y, noise)

    @abstractmethod
    def penalise(self, model: nn.Module, point: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """The penalty at `point` (B, ...), which takes gradients, (B,)."""

    def weight_at(self, epoch: float) -> float:
        """The weight at a moment of training."""
        return value_at(self.weight, epoch)


def squared_norm(output: Tensor, point: Tensor) -> Tensor:
    """Squared l2 norm of the gradient of each row's `output` (B,) at `point` (B, ...), (B,), with graph."""
    (gradient,) = torch.autograd.grad(output.sum(), point, create_graph=True, materialize_grads=True)
    return gradient.flatten(1).square().sum(1)


class EffectiveMargin(Regularizer):
    """Effective margin regularisation (EMR; Liu and Chan 2022): keep the effective weight, the Jacobian J, small.

    Cross-entropy can be lowered by scaling the logits, which widens no margin; the effective margin is the logit
    margin over the norm of the effective weight, so the norm is what pays.

    Args:
        weight: factor of the mean penalty; a number or a `Schedule`.
        estimator: "exact": ||J||_F^2, one backward per class (the paper's version for small networks). "projection":
            K * ||J^T v||^2 for random unit vectors v, an unbiased estimate of the former in one backward per draw
            (Hoffman et al. 2019, without their factor 1/2). "softmax": ||J^T q||^2 with q = softmax(z / temperature),
            detached: one backward, the released large-scale version.
        temperature: of "softmax". Towards 0 it penalises the predicted logit alone, towards infinity the mean logit
            (which cross-entropy does not see). The authors use 40 with PGD-AT, 1 with TRADES.
        draws: of "projection".
        mode: of the model meanwhile, see `Regularizer`.

    What we do differently: the released code squares the gradient of the batch mean, which divides the penalty by B
    once more; ours is the mean over samples. Their lambda 3 at batch size 128 is our weight 3/128.
    """

    def __init__(
        self,
        weight: float | Schedule,
        estimator: Literal["exact", "projection", "softmax"] = "projection",
        temperature: float = 1.0,
        draws: int = 1,
        mode: Mode = "eval",
    ) -> None:
        super().__init__(weight, mode)
        checks.choice("estimator", estimator, ("exact", "projection", "softmax"))
        if not temperature > 0:
            raise checks.InputError(f"temperature={temperature}: must be positive")
        checks.at_least("draws", draws, 1)
        self.estimator, self.temperature, self.draws = estimator, temperature, draws

    def penalise(self, model: nn.Module, point: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """The estimate of each sample's squared effective weight norm, (B,)."""
        logits = model(point)
        if self.estimator == "softmax":
            mixture = (logits / self.temperature).softmax(1).detach()
            return squared_norm((mixture * logits).sum(1), point)
        if self.estimator == "exact":
            return torch.stack([squared_norm(column, point) for column in logits.unbind(1)]).sum(0)
        classes = logits.shape[1]
        total = torch.zeros(len(point), dtype=logits.dtype, device=logits.device)
        for draw in range(self.draws):
            direction = noise.fold("projection", draw).normal((classes,), logits.dtype)
            direction = direction / direction.norm(dim=1, keepdim=True)
            total = total + squared_norm((direction * logits).sum(1), point)
        return total.mul(classes / self.draws)


class InputGradient(Regularizer):
    """Input-gradient regularisation (Ross and Doshi-Velez 2018): ||grad_x CE(z(x), y)||^2, by double backward."""

    def penalise(self, model: nn.Module, point: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """The squared l2 norm of each sample's loss gradient, (B,)."""
        del noise
        return squared_norm(losses.cross_entropy(model(point), y), point)


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
