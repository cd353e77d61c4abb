"""Curvature regularisation."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.gradients import gradient_of
from wideberth.modes import Mode
from wideberth.randomness import Noise
from wideberth.training.regularizers.base import Regularizer, Where, positive
from wideberth.training.schedules import Schedule


class Curvature(Regularizer):
    """Curvature regularisation (CURE; Moosavi-Dezfooli et al. 2019): how much the loss gradient g changes over a step.

    ||g(x + z) - g(x)||_2^power, with z of l2 length `step` along sign(g), held constant. Computed at the clean inputs.

    Args:
        weight: factor of the mean penalty; a number or a `Schedule`.
        step: l2 length of z, in units of the input. The authors' 3 is in pixels divided by a deviation of about 0.2.
            It grows with the square root of the input's size: 0.6 moves an entry of a 3x32x32 image by 0.011.
        power: 2 as in the paper, 1 as in the released code.
        mode: of the model, see `Regularizer`.

    What we do differently: gradients are per sample. Those of the released code carry a factor 1/B from the batch
    mean, which is squared with `power` 2; its weight 4 does not carry over. Its step grows with the epoch; ours is one
    number. One gradient at x both gives z and is compared, where the code computes it twice.
    """

    where: ClassVar[Where] = "clean"

    def __init__(
        self, weight: float | Schedule, step: float = 0.6, power: Literal[1, 2] = 2, mode: Mode = "eval"
    ) -> None:
        super().__init__(weight, mode)
        positive("step", step)
        if power not in (1, 2):
            raise checks.InputError(f"power={power!r}: accepted are 1, 2")
        self.step, self.power = step, power

    def compute(self, model: nn.Module, point: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """The length, or the squared length, of the change of each sample's loss gradient, (B,)."""
        del noise
        gradient = gradient_of(losses.cross_entropy(model(point), y), point, create_graph=True)
        direction = geometry.steepest(gradient.detach().sign(), "l2")
        further = (point.detach() + self.step * direction).requires_grad_()
        there = gradient_of(losses.cross_entropy(model(further), y), further, create_graph=True)
        change = (there - gradient).flatten(1)
        # torch defines the derivative of a norm at zero as zero, so a flat loss has no gradient here.
        return change.square().sum(1) if self.power == 2 else torch.linalg.vector_norm(change, dim=1)
