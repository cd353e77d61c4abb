"""Descent with a radius that follows the boundary: DDN (Rony et al. 2019) and FMN (Pintor et al. 2021)."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.attacks.base import Attack, input_gradient
from wideberth.attacks.minimum_norm import half_cosine, largest_distance, record_closer, refuse_restarts
from wideberth.attacks.state import AttackInputs, AttackState
from wideberth.checks import InputError, Norm
from wideberth.losses import Loss

_LAST = 0.01
"""The last step, in units of the first."""
_LAST_GAMMA = 0.001
"""The last change of FMN's radius, relative."""
_TINY = 1e-12


@dataclass(frozen=True)
class DescentState(AttackState):
    """The state of DDN and FMN.

    Attributes:
        radius: (B,) of the ball that `point` was placed in.
        fallback: (B, ...) a random direction of unit length, taken where the gradient is zero.
    """

    radius: Tensor
    fallback: Tensor


@dataclass(frozen=True)
class Measured:
    """What a query at `state.point` measured.

    Attributes:
        success: (B,) bool, whether the point reaches the goal.
        distance: (B,) of the point.
        loss: (B,) there.
        gradient: (B, ...) of the loss.
    """

    success: Tensor
    distance: Tensor
    loss: Tensor
    gradient: Tensor


@dataclass(frozen=True, kw_only=True)
class RadiusDescent(Attack[DescentState]):
    """Steps along the gradient, each projected onto a ball that shrinks after a success and grows after a failure.

    Attributes:
        steps: how many points are queried, the clean input among them; each costs a forward and a backward.
        step_size: l2 length of the first step, in units of the input; it falls to a hundredth along half a cosine.
        gamma: relative change of the radius from step to step, in (0, 1).
        loss: what is ascended.
    """

    steps: int = 100
    step_size: float = 1.0
    gamma: float = 0.05
    loss: Loss

    minimum_norm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        super().__post_init__()
        checks.at_least("steps", self.steps, 1)
        checks.at_least("step_size", self.step_size, 0)
        checks.at_least("gamma", self.gamma, 0)
        checks.at_least("1 - gamma", 1 - self.gamma, 0)
        refuse_restarts(type(self).__name__, self.restarts)

    @property
    def num_steps(self) -> int:
        """One query for each."""
        return self.steps

    def init(self, inputs: AttackInputs) -> DescentState:
        """At the clean input."""
        draw = inputs.noise.fold("spare direction").normal(inputs.x.shape[1:], inputs.eps.dtype)
        radius = torch.full_like(inputs.eps, self.first_radius)
        return DescentState.initial(inputs, inputs.x, radius=radius, fallback=geometry.steepest(draw, "l2"))

    def update(self, model: nn.Module, inputs: AttackInputs, state: DescentState) -> DescentState:
        """One forward and one input gradient at `state.point`, then one step, projected onto the new ball."""
        logits, loss, gradient = input_gradient(model, state.point, inputs.attack_loss(self.loss))
        delta, gradient = (part.to(inputs.eps.dtype) for part in (state.point - inputs.x, gradient))
        measured = Measured(inputs.goal_reached(logits), geometry.norm(delta, self.norm), loss, gradient)
        size = half_cosine(state.iteration, self.steps, self.step_size, _LAST * self.step_size)
        gamma = self.change(state.iteration)
        state = record_closer(inputs, state, measured.success, measured.distance, cost=2)
        # `fmin`: a NaN, of a model that overflows, is no radius.
        radius = torch.fmin(self.next_radius(state, measured, gamma), largest_distance(inputs, self.norm, self.box))
        flat = geometry.column(geometry.norm(gradient, "linf") == 0, gradient)
        direction = torch.where(flat, state.fallback, geometry.steepest(gradient, "l2"))
        delta = delta + geometry.column(size, delta) * direction
        if self.norm == "l2":
            # Into the box first: the ball only shortens what is left, while a clamp after it would shorten it again.
            delta = (inputs.x + delta).clamp(*self.box) - inputs.x
        return replace(state, point=self.placed(inputs, delta, radius), radius=radius)

    @property
    @abstractmethod
    def first_radius(self) -> float:
        """The radius before the first query."""

    @abstractmethod
    def change(self, iteration: Tensor) -> Tensor:
        """The relative change of the radius at each row's iteration, (B,)."""

    @abstractmethod
    def next_radius(self, state: DescentState, measured: Measured, gamma: Tensor) -> Tensor:
        """The next radii, (B,); `state` has recorded the query already."""

    def placed(self, inputs: AttackInputs, delta: Tensor, radius: Tensor) -> Tensor:
        """The point x + delta, projected onto ball and box."""
        return geometry.place(inputs.x, delta, radius, self.norm, self.box)


@dataclass(frozen=True, kw_only=True)
class DDN(RadiusDescent):
    """Decoupled direction and norm (DDN; Rony et al., CVPR 2019): direction by the gradient, length by success.

    After each step the perturbation is scaled to 1 - gamma of the last length where that was a success, and to
    1 + gamma of it where it was not. l2 only. Each point costs a forward and a backward.

    What we do differently: points are not rounded to 256 levels unless `levels` says so, since distances to the
    boundary are otherwise not comparable; radii never exceed the `eps` of the inputs, where there is one; where the
    gradient is zero, a row always takes the same random direction, of unit length.

    The cross-entropy mixes the classes near a boundary: where several are, the point found is not quite the nearest
    (on linear models with ten classes and small logits, by 3 % in the median); `losses.margin_loss` does not, but is
    more easily led to a boundary further away.

    Attributes:
        init_eps: the first radius, in units of the input. 100 steps get from 1 down to 0.006, and up to 130.
        levels: round the points to so many, evenly spaced over the finite box (256: images of 8 bits); None: do not.
    """

    norm: Norm = "l2"
    loss: Loss = losses.cross_entropy
    init_eps: float = 1.0
    levels: int | None = None

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        super().__post_init__()
        checks.choice("norm", self.norm, ("l2",))
        checks.at_least("init_eps", self.init_eps, 0)
        if self.levels is not None:
            checks.at_least("levels", self.levels, 2)
            if not all(map(math.isfinite, self.box)):
                raise InputError(f"levels={self.levels} in box={self.box}: levels are spread over a finite box")

    @property
    def first_radius(self) -> float:
        """`init_eps`."""
        return self.init_eps

    def change(self, iteration: Tensor) -> Tensor:
        """Always gamma."""
        return torch.full_like(iteration, self.gamma, dtype=torch.float64)

    def next_radius(self, state: DescentState, measured: Measured, gamma: Tensor) -> Tensor:
        """Shorter after a success, longer after a failure."""
        return state.radius * torch.where(measured.success, 1 - gamma, 1 + gamma).to(state.radius.dtype)

    def placed(self, inputs: AttackInputs, delta: Tensor, radius: Tensor) -> Tensor:
        """The perturbation scaled to the length of the radius."""
        delta = geometry.steepest(delta, "l2") * geometry.column(radius, delta)
        point = super().placed(inputs, delta, radius)
        if self.levels is None:
            return point
        low, high = self.box
        grid = (self.levels - 1) / (high - low)
        return (low + ((point.to(delta.dtype) - low) * grid).round() / grid).to(point.dtype).clamp(*self.box)


@dataclass(frozen=True, kw_only=True)
class FMN(RadiusDescent):
    """Fast minimum norm (Pintor et al., NeurIPS 2021) in linf, l2 and l1, by the authors' schedule.

    The radius is a first-order estimate of the distance to the boundary until the first success. From then on it is
    multiplied by 1 - gamma after a success (and is never larger than the best distance) and by 1 + gamma after a
    failure; gamma falls to 0.001. Steps are of the l2-normalised gradient in every norm. Each point costs a forward and
    a backward.

    What we do differently: the estimate is lengthened by gamma, for where the model is linear it is exact, and rounding
    then decides that no step ever succeeds; the l1 ball is intersected with the box in one exact projection; radii
    never exceed the `eps` of the inputs, where there is one; a zero gradient is replaced by a random direction. The
    projection only ever shortens.

    Attributes:
        loss: has to be zero on the boundary, as the margin is: its value is read as a distance.
    """

    loss: Loss = losses.margin_loss

    @property
    def first_radius(self) -> float:
        """Zero: the first query is at the input."""
        return 0.0

    def change(self, iteration: Tensor) -> Tensor:
        """From gamma to 0.001 along half a cosine."""
        return half_cosine(iteration, self.steps, self.gamma, _LAST_GAMMA)

    def next_radius(self, state: DescentState, measured: Measured, gamma: Tensor) -> Tensor:
        """Shorter after a success, longer after a failure, estimated before the first success."""
        slope = geometry.norm(measured.gradient, geometry.dual(self.norm)).clamp_min(_TINY)
        estimate = torch.maximum(measured.distance, state.radius) + measured.loss.abs() / slope
        best = -state.best_loss
        shorter = torch.minimum(state.radius * (1 - gamma), best)
        longer = torch.where(state.adversarial, state.radius, estimate) * (1 + gamma)
        return torch.where(measured.success, shorter, longer).to(state.radius.dtype)
