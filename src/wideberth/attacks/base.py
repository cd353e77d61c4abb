"""What every attack is: immutable hyper-parameters that craft when called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.checks import Box, InputError, Norm
from wideberth.losses import Loss
from wideberth.modes import Mode, borrowed
from wideberth.randomness import Noise

Keep: TypeAlias = Literal["last", "worst", "first_flip"]


@dataclass(frozen=True)
class Adversarial:
    """What an attack found, one row per sample.

    Attributes:
        x: (B, ...) inside ball and box, dtype of the input, detached.
        success: (B,) bool, whether `x` is misclassified (taken for the target, if one was given); None where the
            returned point was not judged.
        survived: (B,) int64, how many iterates were classified correctly before the first flip.
        evaluations: (B,) int64, forwards plus backwards spent.
    """

    x: Tensor
    success: Tensor | None
    survived: Tensor
    evaluations: Tensor


@dataclass(frozen=True)
class Problem:
    """One batch to attack: the inputs, what must be left (or reached), how far, and each row's random stream."""

    x: Tensor
    y: Tensor
    eps: Tensor
    noise: Noise
    target: Tensor | None = None

    def rows(self, where: Tensor) -> Problem:
        """The sub-problem of the rows `where` (bool or indices)."""
        draw = self.noise.draw[where] if isinstance(self.noise.draw, Tensor) else self.noise.draw
        noise = Noise(self.noise.index[where], self.noise.seed, draw)
        target = None if self.target is None else self.target[where]
        return Problem(self.x[where], self.y[where], self.eps[where], noise, target)

    def achieved(self, logits: Tensor) -> Tensor:
        """Whether these logits (B, K) are what the attack wants, (B,) bool."""
        if self.target is None:
            return losses.misclassified(logits, self.y)
        return losses.predictions(logits) == self.target

    def objective(self, loss: Loss) -> Loss:
        """The loss to ascend: the given one, or its negative at the target."""
        target = self.target
        return loss if target is None else lambda logits, y: -loss(logits, target)


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and one input gradient: logits (B, K), losses (B,), gradient of each row's own loss (B, ...).

    Raises:
        InputError: where the model's output does not depend differentiably on its input.
    """
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(point)
        values = loss(logits, y)
        if not values.requires_grad:
            raise InputError("the model's output carries no gradient to its input: gradient attacks cannot run")
        if values.shape != y.shape:
            raise InputError(f"the loss returned shape {tuple(values.shape)}: must be one loss per sample, ({len(y)},)")
        # Summed, not averaged: row i of the gradient belongs to sample i alone.
        (gradient,) = torch.autograd.grad(values.sum(), point, materialize_grads=True)
    # A NaN has no direction; left in, it would spread to the point and end the row's attack.
    return logits.detach(), values.detach(), gradient.nan_to_num(nan=0.0)


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """Immutable hyper-parameters; calling it crafts. A new attack is one subclass with a `craft`.

    Attributes:
        norm: "linf", "l2" or "l1".
        box: (low, high) that every input and every crafted point lies in.
    """

    norm: Norm = "linf"
    box: Box = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        checks.norm_name(self.norm)
        checks.valid_box(self.box)

    @abstractmethod
    def craft(self, model: nn.Module, problem: Problem, *, loss: Loss | None = None, judge: bool = True) -> Adversarial:
        """The attack itself, on a model whose mode and gradient flags are as they should be.

        A fixed number of steps, no host synchronisation and no data-dependent shapes with `judge=False`: this is what
        training calls. `loss` overrides the attack's own (an objective may ask for the loss it pays).
        """

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        eps: float | Tensor,
        index: Tensor | None = None,
        target: Tensor | None = None,
        seed: int = 0,
        judge: bool = True,
        mode: Mode = "eval",
    ) -> Adversarial:
        """Craft the worst points found within `eps` of `x`.

        Args:
            model: maps (B, ...) to logits (B, K >= 2). Its flags, gradients, buffers and the global random state are
                left as they were, except that layers attacked in train mode update statistics and draw dropout.
            x: (B, ...) floating point in the box.
            y: (B,) integer labels.
            eps: one radius, or (B,) radii; a row with radius 0 comes back bit for bit.
            index: (B,) int64 that names each row's random stream (default: its position), so that a sample meets the
                same noise in every batch.
            target: (B,) classes to be taken for, or None to be misclassified as anything.
            seed: of all randomness.
            judge: spend one more forward to tell whether the returned points succeed.
            mode: "eval", "train" or "keep".

        Raises:
            InputError: for eps, inputs, labels or logits that cannot be used.
        """
        checks.valid_inputs(x, self.box)
        checks.valid_eps(eps, len(x))
        x = x.detach()
        with borrowed(model, "eval"), torch.no_grad():
            # One row tells the shape of the output, and costs next to nothing.
            logits = model(x[:1])
        checks.valid_logits(logits, 1)
        checks.valid_labels(y, len(x), logits.shape[1])
        if target is not None:
            checks.valid_labels(target, len(x), logits.shape[1])
        with borrowed(model, mode):
            where = torch.arange(len(x), device=x.device) if index is None else index.to(x.device)
            problem = Problem(x, y, geometry.per_sample(eps, x), Noise(where, seed), target)
            return self.craft(model, problem, judge=judge)
