"""Perturbations that move mass between nearby pixels: projected gradient steps in a Wasserstein ball."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wideberth import checks, geometry, losses
from wideberth.attacks.base import Attack, input_gradient
from wideberth.attacks.spatial import images_only
from wideberth.attacks.state import AttackInputs, AttackState
from wideberth.checks import InputError, Norm
from wideberth.losses import Loss

_ROUNDS_OF_RETURN = 20
"""How often mass that found no room is offered again; what is still left then stays where it came from."""
_LEAST = 1e-280
"""Instead of zero, to divide by and to take logarithms of; all here is float64."""


@dataclass(frozen=True)
class WassersteinState(AttackState):
    """The state of the Wasserstein attack: each projection begins at the dual variables of the last one.

    Attributes:
        potential: (B, C, H, W) float64, how much mass each pixel draws.
        price: (B,) float64, what a unit of cost takes from it.
    """

    potential: Tensor
    price: Tensor


@dataclass(frozen=True, kw_only=True)
class Wasserstein(Attack[WassersteinState]):
    """Projected gradient ascent in a Wasserstein ball (Wong et al. 2019), by projected Sinkhorn iterations.

    An image is mass, its values above the low face of the box. The ball holds the images that arise from x by moving
    mass within each channel, from a pixel to those of the `window` x `window` square around it, at a cost of at most
    eps per unit of the image's whole mass; a unit moved by d pixels costs d^`order`. So with `order=1`, eps is how many
    pixels far mass moves on average; with 2, as in the paper, eps bounds the square of the 2-Wasserstein distance.
    eps = 0 returns the input bit for bit, and an image without mass stays as it is. Defined on images (B, C, H, W) and
    a box with a finite low face.

    Steps along the gradient leave the ball and are projected onto it, entropically regularised: the projection is not
    quite the nearest point, but it is in the ball, because its plan is made to keep the cost, the mass and the box.
    All the mass that is lost is what the dtype of x rounds away afterwards, always towards x.

    What we do differently: the box is part of the projection (the paper clamps afterwards, which loses mass);
    `sharpness` and `step_size` are relative to the image's mean mass per entry, so that they mean the same for any size
    and brightness (the paper's lambda is `sharpness` times the number of entries: its values are about 1 here);
    projections have a fixed number of iterations, and each begins where the last one ended.

    Attributes:
        norm: of the gradient step: "l2" follows its direction, "linf" its sign (the paper's choice, and weaker).
        steps: how many, >= 1; the point of the last one takes one more forward and input gradient.
        step_size: root mean square of a step over the entries, in units of the image's mean mass, > 0.
        order: power of the distance that the cost is, > 0.
        window: side of the square that mass moves in, odd, >= 3.
        sharpness: how little the entropy counts, > 0. Higher is nearer to the true projection and takes more
            iterations; `sharpness` times `step_size` beyond some 100 is more than the iterations can follow.
        iterations: per projection, >= 1.
        loss: what is ascended; (logits, y) -> (B,).
    """

    norm: Norm = "l2"
    steps: int = 20
    step_size: float = 1.0
    order: float = 2.0
    window: int = 5
    sharpness: float = 10.0
    iterations: int = 20
    loss: Loss = losses.cross_entropy

    norm_bounded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        super().__post_init__()
        checks.choice("norm", self.norm, ("linf", "l2"))
        checks.at_least("steps", self.steps, 1)
        checks.at_least("iterations", self.iterations, 1)
        for name in ("step_size", "order", "sharpness"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)}: must be a finite number above 0")
        if self.window < 3 or self.window % 2 == 0:
            raise InputError(f"window={self.window}: must be odd and at least 3")
        if not math.isfinite(self.box[0]):
            raise InputError(f"box={self.box}: its low face must be finite, mass is what lies above it")

    @property
    def num_steps(self) -> int:
        """The steps, and a query of the last point."""
        return self.steps + 1

    def init(self, inputs: AttackInputs) -> WassersteinState:
        """At the clean image.

        Raises:
            InputError: for inputs that are not images.
        """
        images_only(self, inputs.x)
        potential = torch.zeros_like(inputs.x, dtype=torch.float64)
        price = torch.ones_like(inputs.eps, dtype=torch.float64)
        return WassersteinState.initial(inputs, inputs.x, potential=potential, price=price)

    def update(self, model: nn.Module, inputs: AttackInputs, state: WassersteinState) -> WassersteinState:
        """One forward and one input gradient at `state.point`, then a step that is projected onto the ball."""
        logits, loss, gradient = input_gradient(model, state.point, inputs.attack_loss(self.loss))
        x, low, high = inputs.x.double(), *self.box
        unit = (x - low).mean((1, 2, 3), keepdim=True)
        dark = unit <= 0
        unit = torch.where(dark, 1, unit)
        mass = torch.where(dark, 1, (x - low) / unit)
        direction = geometry.steepest(gradient.double(), self.norm)
        if self.norm == "l2":
            direction = direction * math.sqrt(x[0].numel())
        wanted = (state.point.double() - low) / unit + self.step_size * direction
        ball = Ball(mass, (high - low) / unit, inputs.eps.double(), self.order, self.window, self.sharpness)
        potential, price = ball.sinkhorn(wanted, state.potential, state.price, self.iterations)
        delta = (ball.carried(potential, price) - mass) * unit
        found = geometry.inward(inputs.x, delta).clamp(*self.box)
        still = dark | geometry.column(inputs.eps == 0, x)
        state = state.recorded(inputs, logits, loss, cost=2)
        return replace(state, point=torch.where(still, inputs.x, found), potential=potential, price=price)


@dataclass(frozen=True)
class Ball:
    """The images within a transport cost of others, and the way to them: plans a_i * exp(-price * cost_ij) * b_j.

    All tensors are float64. A row's mass is 1 per entry on average.

    Attributes:
        mass: (B, C, H, W) what is there, >= 0.
        most: (B, 1, 1, 1) what an entry can hold, >= `mass`.
        eps: (B,) cost allowed per unit of mass.
        order: power of the distance that the cost is.
        window: side of the square that mass moves in.
        sharpness: of the entropic projection.
    """

    mass: Tensor
    most: Tensor
    eps: Tensor
    order: float
    window: int
    sharpness: float

    @property
    def cost(self) -> Tensor:
        """(window, window), of a way from the middle."""
        away = torch.arange(self.window, dtype=self.mass.dtype, device=self.mass.device) - self.window // 2
        return (away[:, None].square() + away.square()) ** (self.order / 2)

    def sinkhorn(self, wanted: Tensor, potential: Tensor, price: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        """Potential and price of the plan that comes nearest to `wanted`, by coordinate ascent in the dual.

        The plan minimises ||wanted - arrived||^2 / 2 + sum(plan * log(plan)) / sharpness over plans within the cost
        that leave `mass` and let no more than `most` arrive.
        """
        cost, budget = self.cost, (self.eps * self.mass[0].numel()).clamp_min(_LEAST)
        for _ in range(iterations):
            top = potential.amax((1, 2, 3), keepdim=True)
            draw = (potential - top).exp().clamp_min(_LEAST)
            price = self._repriced(draw, price, cost, budget)
            kernel = _kernel(price, cost)
            (total,) = _spread(draw, kernel)
            (arriving,) = _spread(self.mass / total, kernel)
            arriving = arriving.clamp_min(_LEAST).log() - top
            # An entry holds z with log z = arriving + potential, where potential = sharpness * (wanted - z).
            z = _log_lambert(arriving + self.sharpness * wanted + math.log(self.sharpness)).exp() / self.sharpness
            potential = torch.where(z > self.most, self.most.log() - arriving, self.sharpness * (wanted - z))
        return potential, price

    def _repriced(self, draw: Tensor, price: Tensor, cost: Tensor, budget: Tensor) -> Tensor:
        """The price (B,) nearer to where the plan's cost is the budget: a Newton step for the cost's logarithm.

        Costs fall about exponentially with the price, so that their logarithm is nearly straight.
        """
        kernel = _kernel(price, cost)
        total, first, second = _spread(draw, kernel, kernel * cost, kernel * cost.square())
        mean = first / total
        spent = (self.mass * mean).sum((1, 2, 3)).clamp_min(_LEAST)
        slope = (self.mass * (second / total - mean.square())).sum((1, 2, 3)) / spent
        change = (spent / budget).log() / slope.clamp_min(_LEAST)
        return (price + torch.maximum(torch.minimum(change, 1 + price), -1 - price / 2)).clamp(0, 300)

    def carried(self, potential: Tensor, price: Tensor) -> Tensor:
        """(B, C, H, W) where that plan carries the mass, once it keeps the cost and lets nothing overflow.

        Entry j accepts a share of what others send, as far as there is room, what leaves j included; the rest stays
        where it came from. Shares that grow from zero never overflow: more has left j than they counted on.
        """
        cost = self.cost
        kernel = _kernel(price, cost)
        draw = (potential - potential.amax((1, 2, 3), keepdim=True)).exp().clamp_min(_LEAST)
        (total,) = _spread(draw, kernel)
        send, kernel = self.mass / total, torch.where(cost > 0, kernel, 0)
        offered = draw * _spread(send, kernel)[0]
        room = (self.most - self.mass).clamp_min(0)
        left = torch.zeros_like(room)
        for _ in range(_ROUNDS_OF_RETURN):
            share = ((room + left) / offered.clamp_min(_LEAST)).clamp_max(1)
            left = send * _spread(draw * share, kernel)[0]
        spent = (send * _spread(draw * share, kernel * cost)[0]).sum((1, 2, 3))
        allowed = (self.eps * self.mass[0].numel() / spent.clamp_min(_LEAST)).clamp_max(1)
        return self.mass + geometry.column(allowed, room) * (offered * share - left)


def _kernel(price: Tensor, cost: Tensor) -> Tensor:
    return (-price[:, None, None] * cost).exp()


def _spread(mass: Tensor, *kernels: Tensor) -> list[Tensor]:
    """Each row's images (B, C, H, W) correlated with the row's kernels (B, k, k); nothing leaves the image.

    Kernels are the same on either side of the middle, which takes a quarter of the work of a convolution.
    """
    reach = kernels[0].shape[1] // 2
    padded, totals = F.pad(mass, (reach,) * 4), [torch.zeros_like(mass) for _ in kernels]
    for across in range(reach + 1):
        columns = _either_side(padded, 3, across, reach)
        for down in range(reach + 1):
            rows = _either_side(columns, 2, down, reach)
            for total, kernel in zip(totals, kernels, strict=True):
                total.addcmul_(rows, geometry.column(kernel[:, reach + down, reach + across], mass))
    return totals


def _either_side(padded: Tensor, axis: int, away: int, reach: int) -> Tensor:
    """Per entry, the sum of the entries so far away along the axis, without the padding along it."""
    size = padded.shape[axis] - 2 * reach
    after = padded.narrow(axis, reach + away, size)
    return after + padded.narrow(axis, reach - away, size) if away else after


def _log_lambert(value: Tensor) -> Tensor:
    """log W(exp(value)), the root v of v + exp(v) = value, by Newton's method from above, where it is monotone."""
    value = value.clamp_min(-700)
    root = torch.where(value > 1, value.clamp_min(1).log(), value)
    for _ in range(5):
        grown = root.exp()
        root = root - (root + grown - value) / (1 + grown)
    return root
