"""Projected gradient descent (PGD; Madry et al. 2018), and what attacks share that step along input gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from wideberth import checks, geometry, losses
from wideberth.attacks.base import Keep, Query, SteppedAttack, raw_input_gradient
from wideberth.attacks.state import AttackInputs, ProjectedState
from wideberth.geometry import Start
from wideberth.losses import Loss

P = TypeVar("P", bound=ProjectedState, default=Any)


@dataclass(frozen=True)
class ScaledStep:
    """A step size that follows each sample's radius: max(ratio * eps / steps, floor), (B,).

    `ScaledStep(2.5)` is Madry's rule; `ScaledStep(2, floor=2/255)` is what the authors of IAAT use.
    """

    ratio: float = 2.5
    floor: float = 0.0

    def __call__(self, eps: Tensor, steps: int) -> Tensor:
        """The step sizes (B,) for radii (B,) and a number of steps."""
        return (self.ratio * eps / steps).clamp_min(self.floor)


@dataclass(frozen=True, kw_only=True)
class GradientAscent(SteppedAttack[P]):
    """Steps along input gradients, each projected onto ball and box: the parts of PGD, MI-FGSM and early-stopped PGD.

    A k-step attack costs k forwards and k input gradients; checking the returned point takes one more forward.

    Attributes:
        steps: how many, >= 1.
        step_size: absolute, in units of the input, or a `ScaledStep` that follows each sample's radius.
        start: "uniform" over the ball, "gaussian" (0.001 * N(0, 1), as TRADES and MART) or "none".
        loss: what is ascended; (logits, y) -> (B,).
        keep: what is returned. "last": the last point. "worst": the misclassified point of highest loss, or the point
            of highest loss where none was misclassified. "first_flip": the first misclassified point, where the row
            then stays; the last point where there was none.
        draws: passes that a gradient is the mean of, for randomised models (see `raw_input_gradient`).
    """

    steps: int = 10
    step_size: float | ScaledStep = ScaledStep()
    start: Start = "uniform"
    loss: Loss = losses.cross_entropy
    keep: Keep = "last"
    draws: int = 1

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        super().__post_init__()
        checks.at_least("steps", self.steps, 1)
        checks.at_least("draws", self.draws, 1)
        checks.choice("start", self.start, ("uniform", "gaussian", "none"))
        checks.choice("keep", self.keep, ("last", "worst", "first_flip"))
        if isinstance(self.step_size, int | float):
            checks.at_least("step_size", self.step_size, 0)

    @property
    def num_steps(self) -> int:
        """The steps; the point that the last one leads to is not queried."""
        return self.steps

    @property
    def knows_success(self) -> bool:
        """Where `keep` is "last", no step depends on success."""
        return self.keep != "last"

    def starting(self, inputs: AttackInputs, state: P) -> P:
        """The state with its first point, as far from the clean input as `start` says."""
        delta = geometry.random_start(inputs.x, inputs.eps, self.norm, self.start, inputs.noise)
        point = state.projected(inputs, inputs.x, delta, self.norm, self.box)
        return replace(state, point=point, best=point)

    def query(self, model: nn.Module, inputs: AttackInputs, state: P) -> Query:
        """One forward and one input gradient at `state.point`, times `draws`."""
        return Query(*raw_input_gradient(model, state.point, inputs.attack_loss(self.loss), self.draws), 2 * self.draws)

    def check(self, model: nn.Module, inputs: AttackInputs, state: P) -> Query:
        """One forward at `state.point`."""
        with torch.no_grad():
            logits = model(state.point)
            loss = inputs.attack_loss(self.loss)(logits)
        return Query(logits, loss, state.point.new_empty(0), 1)

    def record(self, inputs: AttackInputs, state: P, query: Query) -> P:
        """Count the query, and keep its point as `keep` says."""
        if self.keep == "worst":
            return state.recorded(inputs, query.logits, query.loss, query.cost)
        if self.keep == "first_flip":
            best = geometry.choose(state.adversarial, state.best, state.point)
            return replace(state.recorded(inputs, query.logits, query.loss, query.cost), best=best)
        success = inputs.goal_reached(query.logits)
        return replace(
            state,
            best=state.point,
            best_loss=query.loss.to(state.best_loss.dtype),
            adversarial=success,
            steps_survived=state.steps_survived + (~success & (state.steps_survived == state.iteration)),
            iteration=state.iteration + 1,
            evaluations=state.evaluations + query.cost,
        )

    def move(self, inputs: AttackInputs, state: P, query: Query) -> P:
        """One step along the gradient."""
        return self.stepped(inputs, state, query.gradient)

    def stepped(self, inputs: AttackInputs, state: P, direction: Tensor) -> P:
        """One steepest-ascent step along a direction (B, ...), projected."""
        step = self.ascent_step(inputs, state.point, direction)
        point = state.projected(inputs, state.point, step, self.norm, self.box)
        if self.keep == "first_flip":
            point = geometry.choose(state.adversarial, state.best, point)
        return replace(state, point=point)

    def ascent_step(self, inputs: AttackInputs, point: Tensor, direction: Tensor) -> Tensor:
        """The step of length `step_size` from `point` that ascends fastest along a direction (B, ...), as a gradient.

        It is in memory of its own, to work on in place; entries of the direction that are NaN do not move.
        """
        if self.norm == "l1":
            # The one entry that moves must have room: at a face of the box, outward would leave the point where it is.
            low, high = self.box
            direction = direction.masked_fill(torch.where(direction > 0, point >= high, point <= low), 0)
        size = self.step_size(inputs.eps, self.steps) if callable(self.step_size) else self.step_size
        length = size if isinstance(size, float) else geometry.column(geometry.per_sample(size, inputs.x), inputs.x)
        wide = torch.promote_types(inputs.x.dtype, inputs.eps.dtype)
        if self.norm == "linf":
            # The sign of NaN is 0, and one pass over memory less than to take it out first.
            return direction.sign().to(wide).mul_(length)
        return geometry.steepest(direction.nan_to_num(nan=0.0).to(wide), self.norm).mul_(length)


@dataclass(frozen=True, kw_only=True)
class PGD(GradientAscent[ProjectedState]):
    """Projected gradient descent on minus the loss (PGD; Madry et al. 2018), from a random start in the ball.

    Each step goes to the steepest point of that norm, then back into ball and box: in linf along the gradient's sign.
    Radius, step size and start are per sample. Arguments and costs are those of `GradientAscent`.
    """

    def init(self, inputs: AttackInputs) -> ProjectedState:
        """At the clean input, or at a random point of the ball around it."""
        return self.starting(inputs, ProjectedState.initial_in_ball(inputs, inputs.x, self.norm, self.box))
