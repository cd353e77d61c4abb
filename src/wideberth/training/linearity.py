"""Regularizers that watch the loss around a point: how steep it is, how it bends, how far it is from its tangent."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.adam import adam_step
from wideberth.checks import Box
from wideberth.gradients import gradient_of, input_gradient
from wideberth.modes import Mode, lent
from wideberth.randomness import Noise
from wideberth.training.curvature import twice_differentiable
from wideberth.training.penalty import Regularizer, Where, positive, squared_norm
from wideberth.training.schedules import Schedule

_TINY = 1e-9
"""In the denominator of Adam's step."""


class InputGradient(Regularizer):
    """Input-gradient regularisation (Ross and Doshi-Velez 2018): ||grad_x CE(z(x), y)||_2^2.

    Args:
        weight: factor of the mean penalty; a number or a `Schedule`.
        method: "double" differentiates the gradient once more. "finite" (Finlay and Oberman 2019) needs no second
            derivative: the squared slope of the loss over a short way along its gradient, whose direction is held
            constant.
        step: of "finite": the l2 length of that way, in units of the input. The point may leave the box by as much.
        mode: of the model meanwhile, see `Regularizer`.

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
        # The forward whose loss is paid gives the direction too; what it costs more is a backward to the input alone.
        gradient = gradient_of(loss, point, retain_graph=True)
        further = point.detach() + self.step * geometry.steepest(gradient, "l2")
        slope = (losses.cross_entropy(model(further), y) - loss) / self.step
        return slope.square()


class LocalLinearity(Regularizer):
    """Local linearity regularisation (LLR; Qin et al. 2019): a loss near its tangent hides no peaks from an attack.

    With g the loss gradient at x, |l(x + d) - l(x) - d.g| + gradient_weight * |d.g|, where d is where the first term
    was found largest within the linf ball. Judged at the clean inputs.

    Args:
        weight: factor of the mean penalty; a number or a `Schedule`.
        eps: linf radius of the ball, in units of the input.
        steps: of the search, by projected Adam from a random start; each costs a forward and an input gradient.
        step_size: of the search, in units of `eps`; the authors' 0.1 at radius 8/255.
        gradient_weight: of the second term, relative to the first.
        box: that the points of the search lie in.
        mode: of the model meanwhile, see `Regularizer`.

    What we do differently: the released code weighs the cross-entropy twice, so its weight 4 is our 2. Its search
    follows the gradient of l(x + d) up or down; ours that of the gap itself, which also knows the tangent. It
    normalises by the statistics of the clean batch; in eval mode, ours by the running ones. Its radius grows over the
    first 500 steps; give `weight` a `Ramp`.
    """

    where: ClassVar[Where] = "clean"
    twice = False  # only the clean forward is differentiated twice, and says so itself

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
        """How far each sample's loss departs from its tangent, and how far the tangent rises or falls, (B,)."""
        with twice_differentiable():
            loss = losses.cross_entropy(model(point), y)
            gradient = gradient_of(loss, point, create_graph=True)
        x = point.detach()
        worst = self.search(model, x, y, loss.detach(), gradient.detach(), noise)
        along = ((worst - x) * gradient).flatten(1).sum(1)
        gap = losses.cross_entropy(model(worst), y) - loss - along
        return gap.abs() + self.gradient_weight * along.abs()

    def search(self, model: nn.Module, x: Tensor, y: Tensor, loss: Tensor, gradient: Tensor, noise: Noise) -> Tensor:
        """The point (B, ...) of ball and box where the loss is found farthest from its tangent at `x`.

        Args:
            model: maps x to logits; its parameters are frozen meanwhile.
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


class GradientAlignment(Regularizer):
    """Gradient alignment (GradAlign; Andriushchenko and Flammarion 2020): one step is enough where gradients agree.

    1 - cos(g(x), g(x + d)) for the loss gradient g and d uniform in the linf ball; g(x) is held constant. Where it is
    near 0, the loss is so close to linear in the ball that FGSM finds what PGD would, and training on it does not
    overfit catastrophically. Judged at the clean inputs.

    Args:
        weight: factor of the mean penalty; a number or a `Schedule`. The authors' grows with the radius: at 8/255, 0.2
            on CIFAR-10 and 2.5 on SVHN.
        eps: linf radius of the ball, in units of the input; as large as that of the attack.
        mode: of the model meanwhile, see `Regularizer`.

    What we do differently: the gradients are those of the logit margin with a soft maximum, of which cross-entropy is a
    growing function: the direction is the same, and in float32 still known where cross-entropy is flat. The model is in
    eval mode, theirs in train mode. The mean is over all samples, theirs over those whose gradients are not zero, which
    here pay nothing. They take the gradient at x from the FGSM step.
    """

    where: ClassVar[Where] = "clean"
    twice = False  # only the second forward is differentiated twice, and says so itself

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


class Curvature(Regularizer):
    """Curvature regularisation (CURE; Moosavi-Dezfooli et al. 2019): how much the loss gradient g turns over a step.

    ||g(x + z) - g(x)||_2^power, with z of l2 length `step` along sign(g), held constant. Judged at the clean inputs.

    Args:
        weight: factor of the mean penalty; a number or a `Schedule`.
        step: l2 length of z, in units of the input. The authors' 3 is in pixels divided by a deviation of about 0.2.
            It grows with the square root of the input's size: 0.6 moves an entry of a 3x32x32 image by 0.011.
        power: 2 as in the paper, 1 as in the released code.
        mode: of the model meanwhile, see `Regularizer`.

    What we do differently: gradients are per sample. Those of the released code carry a factor 1/B from the batch
    mean, which is squared with `power` 2; its weight 4 does not carry over. Its step grows with the epoch; ours is one
    number. One gradient at x gives z and is what is compared, where the code takes it twice.
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
        # torch takes the derivative of a norm at zero to be zero: a flat loss has no direction to pay in.
        return change.square().sum(1) if self.power == 2 else torch.linalg.vector_norm(change, dim=1)
