"""Projected gradient descent (PGD; Madry et al. 2018), and the base class of attacks that follow input gradients."""

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
    """A step size in proportion to each sample's radius: max(ratio * eps / steps, floor), (B,).

    `ScaledStep(2.5)` is the rule of Madry et al.; `ScaledStep(2, floor=2/255)` is the rule of the authors of IAAT.
    """

    ratio: float = 2.5
    floor: float = 0.0

    def __call__(self, eps: Tensor, steps: int) -> Tensor:
        """Return the step sizes (B,) for radii (B,) and a number of steps."""
        return (self.ratio * eps / steps).clamp_min(self.floor)


@dataclass(frozen=True, kw_only=True)
class GradientAscent(SteppedAttack[P]):
    """The base class of PGD, MI-FGSM and early-stopped PGD: it steps along the input gradient and projects.

    An attack of k steps costs k * draws forwards and k * draws input gradients. To check the returned point costs one
    more forward.

    Attributes:
        steps: the number of steps, >= 1.
        step_size: a number in units of the input, or a `ScaledStep`, which is in proportion to each sample's radius.
        start: the distribution of the first point around the input: "uniform" in the ball, "gaussian" (0.001 * N(0, 1),
            as in TRADES and MART) or "none" (the input itself).
        loss: the loss that the attack maximises; (logits, y) -> (B,).
        keep: which point is returned. "last": the last point. "worst": of the points that reach the goal
            (misclassification, or the target class), the one with the highest loss; the point with the highest loss if
            none does. "first_flip": the first point that reaches the goal, after which the row is no longer moved; the
            last point if none does.
        draws: the number of gradients that are averaged in each step, for randomised models (see `raw_input_gradient`).
    """

    steps: int = 10
    step_size: float | ScaledStep = ScaledStep()
    start: Start = "uniform"
    loss: Loss = losses.cross_entropy
    keep: Keep = "last"
    draws: int = 1

    def __post_init__(self) -> None:
        """Raise `InputError` for invalid hyper-parameters."""
        super().__post_init__()
        checks.at_least("steps", self.steps, 1)
        checks.at_least("draws", self.draws, 1)
        checks.choice("start", self.start, ("uniform", "gaussian", "none"))
        checks.choice("keep", self.keep, ("last", "worst", "first_flip"))
        if isinstance(self.step_size, int | float):
            checks.at_least("step_size", self.step_size, 0)

    @property
    def num_steps(self) -> int:
        """One query per step; `check` queries the point after the last step."""
        return self.steps

    @property
    def knows_success(self) -> bool:
        """Whether `update` keeps track of success: False for keep="last", where no step depends on it."""
        return self.keep != "last"

    def starting(self, inputs: AttackInputs, state: P) -> P:
        """Return the state at the first point, which is drawn around the clean input as `start` says and projected."""
        delta = geometry.random_start(inputs.x, inputs.eps, self.norm, self.start, inputs.noise)
        point = state.projected(inputs, inputs.x, delta, self.norm, self.box)
        return replace(state, point=point, best=point)

    def query(self, model: nn.Module, inputs: AttackInputs, state: P) -> Query:
        """Compute logits, loss and input gradient at `state.point`, with `draws` forwards and as many backwards."""
        return Query(*raw_input_gradient(model, state.point, inputs.attack_loss(self.loss), self.draws), 2 * self.draws)

    def check(self, model: nn.Module, inputs: AttackInputs, state: P) -> Query:
        """Compute logits and loss at `state.point` without a gradient, with one forward."""
        with torch.no_grad():
            logits = model(state.point)
            loss = inputs.attack_loss(self.loss)(logits)
        return Query(logits, loss, state.point.new_empty(0), 1)

    def record(self, inputs: AttackInputs, state: P, query: Query) -> P:
        """Return the state with the query counted; `best` is updated as `keep` says."""
        if self.keep == "worst":
            return state.recorded(inputs, query.logits, query.loss, query.cost)
        if self.keep == "first_flip":
            # `recorded` keeps the point with the highest loss. Here `best` is the first success, else the latest point.
            best = geometry.choose(state.adversarial, state.best, state.point)
            return replace(state.recorded(inputs, query.logits, query.loss, query.cost), best=best)
        # With keep="last", `best` is the latest point, and `adversarial` says whether that point is a success.
        success = inputs.goal_reached(query.logits)
        return replace(
            state,
            best=state.point,
            best_loss=query.loss.to(state.best_loss.dtype),
            adversarial=success,
            # The number of queries before the first success: it grows only while every query so far was survived.
            steps_survived=state.steps_survived + (~success & (state.steps_survived == state.iteration)),
            iteration=state.iteration + 1,
            evaluations=state.evaluations + query.cost,
        )

    def move(self, inputs: AttackInputs, state: P, query: Query) -> P:
        """Return the state after one step along the gradient."""
        return self.stepped(inputs, state, query.gradient)

    def stepped(self, inputs: AttackInputs, state: P, direction: Tensor) -> P:
        """Return the state after one steepest-ascent step along `direction` (B, ...), projected onto ball and box."""
        step = self.ascent_step(inputs, state.point, direction)
        point = state.projected(inputs, state.point, step, self.norm, self.box)
        if self.keep == "first_flip":
            point = geometry.choose(state.adversarial, state.best, point)
        return replace(state, point=point)

    def ascent_step(self, inputs: AttackInputs, point: Tensor, direction: Tensor) -> Tensor:
        """Return the step of norm `step_size` with the largest inner product with `direction`.

        `direction` (B, ...) is used as a gradient; NaN in it counts as 0. The result is a new tensor (B, ...), which
        the caller may change in place.
        """
        if self.norm == "l1":
            # An l1 step changes a single entry. Entries at a face of the box whose gradient points outward are
            # excluded, because clipping would undo the step.
            low, high = self.box
            direction = direction.masked_fill(torch.where(direction > 0, point >= high, point <= low), 0)
        size = self.step_size(inputs.eps, self.steps) if callable(self.step_size) else self.step_size
        factor = size if isinstance(size, float) else geometry.column(geometry.per_sample(size, inputs.x), inputs.x)
        dtype = torch.promote_types(inputs.x.dtype, inputs.eps.dtype)
        if self.norm == "linf":
            # sign(NaN) is 0 in torch, so that no nan_to_num is needed, which saves a pass over memory.
            return direction.sign().to(dtype).mul_(factor)
        return geometry.steepest(direction.nan_to_num(nan=0.0).to(dtype), self.norm).mul_(factor)


@dataclass(frozen=True, kw_only=True)
class PGD(GradientAscent[ProjectedState]):
    """Projected gradient ascent on the loss (PGD; Madry et al. 2018), by default from a random start in the ball.

    Each step is the steepest-ascent step of the norm (the sign of the gradient in linf), followed by projection onto
    ball and box. Radius, step size and random start are separate for each sample. Attributes and costs are those of
    `GradientAscent`.
    """

    def init(self, inputs: AttackInputs) -> ProjectedState:
        """Return the initial state at the clean input, or at a random point in the ball around it."""
        return self.starting(inputs, ProjectedState.initial_in_ball(inputs, inputs.x, self.norm, self.box))
