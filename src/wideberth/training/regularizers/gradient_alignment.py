"""Gradient alignment."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.gradients import gradient_of, input_gradient
from wideberth.modes import Mode, lent
from wideberth.randomness import Noise
from wideberth.training.curvature import twice_differentiable
from wideberth.training.regularizers.base import Regularizer, Where
from wideberth.training.schedules import Schedule


class GradientAlignment(Regularizer):
    """Gradient alignment (GradAlign; Andriushchenko and Flammarion 2020): gradients in the ball should agree.

    1 - cos(g(x), g(x + d)) for the loss gradient g and d uniform in the linf ball; g(x) is held constant. Where it is
    near 0, the loss is so close to linear in the ball that FGSM finds the points that PGD would, and training on
    them does not overfit catastrophically. Computed at the clean inputs.

    Args:
        weight: factor of the mean penalty; a number or a `Schedule`. The authors' grows with the radius: at 8/255, 0.2
            on CIFAR-10 and 2.5 on SVHN.
        eps: linf radius of the ball, in units of the input; as large as that of the attack.
        mode: of the model, see `Regularizer`.

    What we do differently: the gradients are those of the logit margin with a soft maximum, of which cross-entropy is a
    growing function: the direction is the same, and in float32 it is still defined where cross-entropy is flat. The
    model is in eval mode, theirs in train mode. The mean is over all samples, theirs over those whose gradients are not
    zero; here the penalty of the others is 0. They take the gradient at x from the FGSM step.
    """

    where: ClassVar[Where] = "clean"
    twice = False  # only the second forward is differentiated twice; `compute` prepares it

    def __init__(self, weight: float | Schedule, eps: float = 8 / 255, mode: Mode = "eval") -> None:
        super().__init__(weight, mode)
        checks.valid_eps(eps)
        self.eps = eps

    def compute(self, model: nn.Module, point: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """One minus the cosine between each sample's two loss gradients, (B,): 0 to 2, up to rounding."""
        eps = geometry.per_sample(self.eps, point)
        delta = geometry.random_start(point.detach(), eps, "linf", "uniform", noise.fold("alignment"))
        further = (point.detach() + delta).to(point.dtype).requires_grad_()
        with lent(model, "keep"):
            here = input_gradient(model, point, lambda logits: losses.soft_margin_loss(logits, y))[2]
        with twice_differentiable():
            there = gradient_of(losses.soft_margin_loss(model(further), y), further, create_graph=True)
        pair = (here.flatten(1), there.flatten(1))
        lengths = [torch.linalg.vector_norm(gradient, dim=1) for gradient in pair]
        known = (lengths[0] > 0) & (lengths[1] > 0)
        one, two = (
            gradient / torch.where(known, length, 1)[:, None] for gradient, length in zip(pair, lengths, strict=True)
        )
        return torch.where(known, 1 - (one * two).sum(1), 0)
