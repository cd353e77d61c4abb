"""Local linearity regularisation."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.adam import adam_step
from wideberth.checks import Box
from wideberth.gradients import gradient_of, input_gradient
from wideberth.modes import Mode, lent
from wideberth.randomness import Noise
from wideberth.training.curvature import twice_differentiable
from wideberth.training.regularizers.base import Regularizer, Where, positive
from wideberth.training.schedules import Schedule

_TINY = 1e-9
"""In the denominator of Adam's step."""


class LocalLinearity(Regularizer):
    """Local linearity regularisation (LLR; Qin et al. 2019): the loss should be close to its tangent.

    With g the loss gradient at x, |l(x + d) - l(x) - d.g| + gradient_weight * |d.g|, where d is the point of
    the linf ball at which a search found the largest first term. Computed at the clean inputs.

    Args:
        weight: factor of the mean penalty; a number or a `Schedule`.
        eps: linf radius of the ball, in units of the input.
        steps: of the search, by projected Adam from a random start; each costs a forward and an input gradient.
        step_size: of the search, in units of `eps`; the authors' 0.1 at radius 8/255.
        gradient_weight: of the second term, relative to the first.
        box: that the points of the search lie in.
        mode: of the model, see `Regularizer`.

    What we do differently: the released code counts the cross-entropy twice, so its weight 4 is our 2. Its search
    follows the gradient of l(x + d) up or down; ours follows that of the first term itself, which includes the
    tangent. Its batch norm uses the statistics of the clean batch; ours, in eval mode, the running ones. Its radius
    grows over the first 500 steps; give `weight` a `Ramp`.
    """

    where: ClassVar[Where] = "clean"
    twice = False  # only the clean forward is differentiated twice; `compute` prepares it

    def __init__(
        self,
        weight: float | Schedule,
        eps: float = 8 / 255,
        steps: int = 10,
        step_size: float = 3.2,
        gradient_weight: float = 0.3,
        box: Box = (0.0, 1.0),
        mode: Mode = "eval",
    ) -> None:
        super().__init__(weight, mode)
        checks.valid_eps(eps)
        checks.at_least("steps", steps, 1)
        positive("step_size", step_size)
        checks.at_least("gradient_weight", gradient_weight, 0)
        checks.valid_box(box)
        self.eps, self.steps, self.step_size, self.gradient_weight = eps, steps, step_size, gradient_weight
        self.box = (box[0], box[1])

    def compute(self, model: nn.Module, point: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """The difference of each sample's loss from its tangent, and the change of the tangent, weighted, (B,)."""
        with twice_differentiable():
            loss = losses.cross_entropy(model(point), y)
            gradient = gradient_of(loss, point, create_graph=True)
        x = point.detach()
        worst = self.search(model, x, y, loss.detach(), gradient.detach(), noise)
        along = ((worst - x) * gradient).flatten(1).sum(1)
        gap = losses.cross_entropy(model(worst), y) - loss - along
        return gap.abs() + self.gradient_weight * along.abs()

    def search(self, model: nn.Module, x: Tensor, y: Tensor, loss: Tensor, gradient: Tensor, noise: Noise) -> Tensor:
        """The point (B, ...) of ball and box where the search finds the loss farthest from its tangent at `x`.

        Args:
            model: maps x to logits; its parameters are frozen during the search.
            x: (B, ...) in the box.
            y: (B,) int64 labels.
            loss: (B,) at x.
            gradient: (B, ...) of the loss at x.
            noise: of the random start.
        """
        eps = geometry.per_sample(self.eps, x)
        low, high = geometry.faces(x, eps, self.box)
        start = geometry.random_start(x, eps, "linf", "uniform", noise.fold("linearity"))
        point = geometry.place(x, start, eps, "linf", self.box)
        mean, square = torch.zeros_like(x), torch.zeros_like(x)
        with lent(model, "keep"):
            for step in range(1, self.steps + 1):
                _, value, slope = input_gradient(model, point, lambda logits: losses.cross_entropy(logits, y))
                gap = value - loss - ((point - x) * gradient).flatten(1).sum(1)
                uphill = geometry.column(gap.sign(), x) * (slope - gradient)
                move, mean, square = adam_step(uphill, mean, square, step, _TINY)
                point = (point + self.step_size * self.eps * move).clamp(low, high)
        return point
