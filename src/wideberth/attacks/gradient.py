"""Projected gradient ascent: FGSM (Goodfellow et al. 2015) and PGD (Madry et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.attacks.base import Adversarial, Attack, Keep, Problem, input_gradient
from wideberth.geometry import Start
from wideberth.losses import Loss


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


@dataclass(frozen=True)
class State:
    """Where an attack stands; every tensor's first axis is the row.

    Attributes:
        point: (B, ...) where the next gradient is taken.
        kept: (B, ...) what would be returned now.
        value: (B,) loss at `kept`; minus infinity before the first forward.
        flipped: (B,) bool, whether some iterate achieved the goal.
        survived: (B,) int64, iterates before the first flip.
    """

    point: Tensor
    kept: Tensor
    value: Tensor
    flipped: Tensor
    survived: Tensor


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient ascent (Madry et al. 2018) with a radius, a step and a random start per sample.

    A k-step attack costs k forwards and k input gradients; judging the returned point takes one more forward.

    Attributes:
        steps: how many, >= 1.
        step_size: absolute, in units of the input, or a `ScaledStep` that follows each sample's radius.
        start: "uniform" over the ball, "gaussian" (0.001 * N(0, 1), as TRADES and MART) or "none".
        restarts: how many runs from fresh starts; after the first, only rows that are still unbroken run again.
        loss: what is ascended; (logits, y) -> (B,).
        keep: what is returned. "last": the last iterate. "worst": the misclassified iterate of highest loss, or the
            iterate of highest loss where none was misclassified. "first_flip": the first misclassified iterate, where
            the row then stays; the last iterate where there was none.
    """

    steps: int = 10
    step_size: float | ScaledStep = ScaledStep()
    start: Start = "uniform"
    restarts: int = 1
    loss: Loss = losses.cross_entropy
    keep: Keep = "last"

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        super().__post_init__()
        checks.at_least("steps", self.steps, 1)
        checks.at_least("restarts", self.restarts, 1)
        checks.choice("start", self.start, ("uniform", "gaussian", "none"))
        checks.choice("keep", self.keep, ("last", "worst", "first_flip"))
        if isinstance(self.step_size, int | float):
            checks.at_least("step_size", self.step_size, 0)

    def craft(self, model: nn.Module, problem: Problem, *, loss: Loss | None = None, judge: bool = True) -> Adversarial:
        """Run all restarts; see `Attack.craft`."""
        found = self._run(model, problem, loss, judge)
        for restart in range(1, self.restarts):
            found = self._again(model, problem, loss, found, restart)
        return found

    def start_state(self, problem: Problem) -> State:
        """The state before the first forward."""
        delta = geometry.random_start(problem.x, problem.eps, self.norm, self.start, problem.noise)
        point = geometry.place(problem.x, delta, problem.eps, self.norm, self.box)
        nothing = torch.zeros_like(problem.y, dtype=torch.int64)
        value = torch.full_like(problem.eps, float("-inf"))
        return State(point, point, value, torch.zeros_like(problem.y, dtype=torch.bool), nothing)

    def step(self, model: nn.Module, problem: Problem, state: State, loss: Loss) -> State:
        """One forward and one input gradient at `state.point`, then one step uphill."""
        logits, value, gradient = input_gradient(model, state.point, problem.y, loss)
        state = self._remember(problem, state, logits, value)
        if self.norm == "l1":
            # The one entry that moves must have room: at a face of the box, outward would leave the point where it is.
            low, high = self.box
            stuck = torch.where(gradient > 0, state.point >= high, state.point <= low)
            gradient = gradient.masked_fill(stuck, 0)
        size = self.step_size(problem.eps, self.steps) if callable(self.step_size) else self.step_size
        stride = geometry.column(geometry.per_sample(size, problem.x), problem.x)
        delta = (state.point - problem.x) + stride * geometry.steepest(gradient, self.norm)
        point = geometry.place(problem.x, delta, problem.eps, self.norm, self.box)
        if self.keep == "first_flip":
            point = torch.where(geometry.column(state.flipped, point), state.kept, point)
        return replace(state, point=point)

    def _remember(self, problem: Problem, state: State, logits: Tensor, value: Tensor) -> State:
        """Take account of what a forward at `state.point` said."""
        now = problem.achieved(logits)
        survived = state.survived + ~(state.flipped | now)
        if self.keep == "worst":
            better = (now & ~state.flipped) | ((now == state.flipped) & (value > state.value))
        elif self.keep == "first_flip":
            better = ~state.flipped
        else:
            better = torch.ones_like(now)
        kept = torch.where(geometry.column(better, state.point), state.point, state.kept)
        value = torch.where(better, value.to(state.value.dtype), state.value)
        return State(state.point, kept, value, state.flipped | now, survived)

    def _run(self, model: nn.Module, problem: Problem, loss: Loss | None, judge: bool) -> Adversarial:
        ascended = problem.objective(self.loss if loss is None else loss)
        state = self.start_state(problem)
        for _ in range(self.steps):
            state = self.step(model, problem, state, ascended)
        survived, spent = state.survived, 2 * self.steps
        success: Tensor | None = None
        if judge or self.keep != "last" or self.restarts > 1:
            with torch.no_grad():
                logits = model(state.point)
                state = self._remember(problem, state, logits, ascended(logits, problem.y))
            spent += 1
            success = problem.achieved(logits) if self.keep == "last" else state.flipped
        else:
            state = replace(state, kept=state.point)
        return Adversarial(state.kept.detach(), success, survived, torch.full_like(survived, spent))

    def _again(
        self, model: nn.Module, problem: Problem, loss: Loss | None, found: Adversarial, restart: int
    ) -> Adversarial:
        """Run the rows that are still unbroken once more, and keep what is new.

        A loss that an objective asks for is tied to its batch (TRADES' clean logits): then all rows run.
        """
        assert found.success is not None
        unbroken = ~found.success
        left = torch.arange(len(unbroken), device=unbroken.device) if loss else unbroken.nonzero().squeeze(1)
        if not len(left):
            return found
        part = problem.rows(left)
        again = self._run(model, replace(part, noise=part.noise.fold("restart", restart)), loss, judge=True)
        assert again.success is not None
        new = again.success & unbroken[left]
        won = left[new]
        x, success = found.x.clone(), found.success.clone()
        x[won], success[won] = again.x[new], True
        evaluations = found.evaluations.index_add(0, left, again.evaluations)
        survived = found.survived.index_add(0, left, again.survived)
        return Adversarial(x, success, survived, evaluations)


@dataclass(frozen=True, kw_only=True)
class FGSM(PGD):
    """The fast gradient sign method (Goodfellow et al. 2015): one steepest step of length eps from the clean input.

    With `start="uniform"` and `step_size=ScaledStep(1.25)` it is the training attack of "Fast is better than free"
    (Wong et al. 2020). In l2 and l1 the step is the steepest one of that norm.
    """

    steps: int = 1
    step_size: float | ScaledStep = ScaledStep(1.0)
    start: Start = "none"
