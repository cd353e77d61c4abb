"""Input-gradient regularisation."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.gradients import gradient_of
from wideberth.modes import Mode
from wideberth.randomness import Noise
from wideberth.training.regularizers.base import Regularizer, positive, squared_norm
from wideberth.training.schedules import Schedule


class InputGradient(Regularizer):
    """Input-gradient regularisation (Ross and Doshi-Velez 2018): ||grad_x CE(z(x), y)||_2^2.

    Args:
        weight: factor of the mean penalty; a number or a `Schedule`.
        method: "double" differentiates the gradient once more. "finite" (Finlay and Oberman 2019) needs no second
            derivative: the squared slope of the loss over a short step along its gradient, whose direction is held
            constant.
        step: of "finite": the length of that step in l2, in units of the input. The point may leave the box by as
            much.
        mode: of the model, see `Regularizer`.

    What we do differently: Ross and Doshi-Velez sum over the data set, we take the mean over samples. "finite" is the
    squared slope, so that both methods mean the same; Finlay and Oberman take half of it (their weight 0.1 is 0.05
    here), stay in train mode, and also offer other norms.
    """

    def __init__(
        self,
        weight: float | Schedule,
        method: Literal["double", "finite"] = "double",
        step: float = 0.01,
        mode: Mode = "eval",
    ) -> None:
        super().__init__(weight, mode)
        checks.choice("method", method, ("double", "finite"))
        positive("step", step)
        self.method, self.step = method, step
        self.twice = method == "double"

    def compute(self, model: nn.Module, point: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """The squared l2 norm of each sample's loss gradient, or the squared slope along it, (B,)."""
        del noise
        loss = losses.cross_entropy(model(point), y)
        if self.method == "double":
            return squared_norm(loss, point)
        # The forward of the loss also gives the direction; that costs one more backward, to the input alone.
        gradient = gradient_of(loss, point, retain_graph=True)
        further = point.detach() + self.step * geometry.steepest(gradient, "l2")
        slope = (losses.cross_entropy(model(further), y) - loss) / self.step
        return slope.square()
