"""Projected gradient ascent: FGSM (Goodfellow et al. 2015), PGD (Madry et al. 2018), N-FGSM (de Jorge et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.attacks.base import Attack, Keep, raw_gradient
from wideberth.attacks.state import AttackInputs, AttackState, E, ProjectedState, S
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


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient ascent (Madry et al. 2018) with a radius, a step and a random start per sample.

    A k-step attack costs k forwards and k input gradients; judging the returned point takes one more forward.

    Attributes:
        steps: how many, >= 1.
        step_size: absolute, in units of the input, or a `ScaledStep` that follows each sample's radius.
        start: "uniform" over the ball, "gaussian" (0.001 * N(0, 1), as TRADES and MART) or "none".
        loss: what is ascended; (logits, y) -> (B,).
        keep: what is returned. "last": the last iterate. "worst": the misclassified iterate of highest loss, or the
            iterate of highest loss where none was misclassified. "first_flip": the first misclassified iterate, where
            the row then stays; the last iterate where there was none.
        draws: passes that a gradient is the mean of, for randomised models (see `input_gradient`).
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
        """As many as there are steps; where the last one led is for the judge to see."""
        return self.steps

    def result(self, state: AttackState) -> Tensor:
        """The point found, or else the last, about which the model was not asked."""
        return geometry.choose(state.broken, state.kept, state.point)

    @property
    def judges(self) -> bool:
        """Only "last" with one run can leave the judging to others."""
        return self.keep != "last"

    def init(self, inputs: AttackInputs) -> ProjectedState:
        """Begin at the clean inputs or at a random point near them."""
        return self.started(inputs, ProjectedState.within(inputs, inputs.x, self.norm, self.box))

    def started(self, inputs: AttackInputs, state: E) -> E:
        """The state with its first point: as far from the clean inputs as `start` says."""
        delta = geometry.random_start(inputs.x, inputs.eps, self.norm, self.start, inputs.noise)
        point = state.moved(inputs, inputs.x, delta, self.norm, self.box)
        return replace(state, point=point, kept=point)

    def step(self, model: nn.Module, inputs: AttackInputs, state: AttackState, loss: Loss | None = None) -> AttackState:
        """One forward and one input gradient at `state.point`, then one step uphill."""
        logits, value, gradient = self.ask(model, inputs, state, loss)
        state = self.remember(inputs, state, logits, value, cost=2 * self.draws)
        return self.onward(inputs, state, logits, gradient)

    def ask(
        self, model: nn.Module, inputs: AttackInputs, state: AttackState, loss: Loss | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, losses and raw gradient (see `raw_gradient`) at `state.point`."""
        ascended = inputs.loss(self.loss if loss is None else loss)
        return raw_gradient(model, state.point, ascended, self.draws)

    def onward(self, inputs: AttackInputs, state: AttackState, logits: Tensor, gradient: Tensor) -> AttackState:
        """The state with the point to ask about next: what a subclass that moves otherwise has of its own.

        Args:
            inputs: the rows.
            state: with `point` as it was asked about, and `iteration` already one higher; what else `remember` knows is
                up to date unless `keep` is "last".
            logits: (B, K) there.
            gradient: (B, ...) there, raw: to be left as it is.
        """
        del logits
        assert isinstance(state, ProjectedState)
        move = self.uphill(inputs, state.point, gradient)
        point = state.moved(inputs, state.point, move, self.norm, self.box)
        if self.keep == "first_flip":
            point = geometry.choose(state.broken, state.kept, point)
        return replace(state, point=point)

    def uphill(self, inputs: AttackInputs, point: Tensor, direction: Tensor) -> Tensor:
        """The step from `point` that ascends fastest along a direction (B, ...), such as the gradient.

        The step is in memory of its own, to work on in place; entries of the direction that are NaN do not move.
        """
        if self.norm == "l1":
            # The one entry that moves must have room: at a face of the box, outward would leave the point where it is.
            low, high = self.box
            direction = direction.masked_fill(torch.where(direction > 0, point >= high, point <= low), 0)
        size = self.step_size(inputs.eps, self.steps) if callable(self.step_size) else self.step_size
        stride = size if isinstance(size, float) else geometry.column(geometry.per_sample(size, inputs.x), inputs.x)
        wide = torch.promote_types(inputs.x.dtype, inputs.eps.dtype)
        if self.norm == "linf":
            # The sign of NaN is 0, and one pass over memory less than to take it out first.
            return direction.sign().to(wide).mul_(stride)
        return geometry.steepest(direction.nan_to_num(nan=0.0).to(wide), self.norm).mul_(stride)

    def remember(self, inputs: AttackInputs, state: S, logits: Tensor, value: Tensor, cost: int) -> S:
        """Take account of what a forward at `state.point` said."""
        if self.keep == "worst":
            return state.after(inputs, logits, value, cost)
        if self.keep == "first_flip":
            kept = geometry.choose(state.broken, state.kept, state.point)
            return replace(state.after(inputs, logits, value, cost), kept=kept)
        now = inputs.goal_reached(logits)
        return replace(
            state,
            kept=state.point,
            value=value.to(state.value.dtype),
            broken=now,
            steps_survived=state.steps_survived + (~now & (state.steps_survived == state.iteration)),
            iteration=state.iteration + 1,
            spent=state.spent + cost,
        )

    def run(
        self, model: nn.Module, inputs: AttackInputs, *, loss: Loss | None = None, judge: bool = True
    ) -> AttackState:
        """k steps cost k forwards and k input gradients; the last look, where it is wanted, one forward more."""
        state: AttackState = self.init(inputs)
        # A subclass whose step is another is run by that, as the schedule of an evaluation does.
        if self.keep == "last" and type(self).step is PGD.step and type(self).remember is PGD.remember:
            state = self._steps(model, inputs, state, loss)
        else:
            for _ in range(self.steps):
                state = self.step(model, inputs, state, loss)
        if not (judge or self.judges):
            return replace(state, kept=state.point)
        survived = state.steps_survived
        with torch.no_grad():
            logits = model(state.point)
            value = inputs.loss(self.loss if loss is None else loss)(logits)
        return replace(self.remember(inputs, state, logits, value, cost=1), steps_survived=survived)

    def _steps(self, model: nn.Module, inputs: AttackInputs, state: AttackState, loss: Loss | None) -> AttackState:
        """All of them, with the same points as by `step`, where none of what is remembered decides where to go.

        Then it can wait: right after a network, a CPU finds none of the code of a dozen small sums in its caches, and
        takes as long for them as for the step itself.
        """
        answers = []
        for _ in range(self.steps):
            logits, _, gradient = self.ask(model, inputs, state, loss)
            answers.append(logits.clone())  # a model may use the memory of its answers again
            state = self.onward(inputs, replace(state, iteration=state.iteration + 1), logits, gradient)
            del gradient  # a CPU finds its memory still in the cache
        held = torch.stack([~inputs.goal_reached(logits) for logits in answers])
        survived = state.steps_survived + held.long().cumprod(0).sum(0)
        return replace(state, steps_survived=survived, spent=state.spent + 2 * self.draws * self.steps)


@dataclass(frozen=True, kw_only=True)
class FGSM(PGD):
    """The fast gradient sign method (Goodfellow et al. 2015): one steepest step of length eps from the clean input.

    With `start="uniform"` and `step_size=ScaledStep(1.25)` it is the training attack of "Fast is better than free"
    (Wong et al. 2020). In l2 and l1 the step is the steepest one of that norm.
    """

    steps: int = 1
    step_size: float | ScaledStep = ScaledStep(1.0)
    start: Start = "none"


@dataclass(frozen=True, kw_only=True)
class NFGSM(FGSM):
    """Noise FGSM (de Jorge et al. 2022): one signed step of length eps from strong noise, and no way back to the ball.

    The start is uniform within `noise` * eps of the input, inside the box; what the step leads to is kept in the box
    alone, up to (`noise` + 1) * eps away in linf. A training attack, cheap as FGSM: the noise is what keeps it from
    catastrophic overfitting. For a verdict it is of no use, because its points lie outside the ball.

    Attributes:
        noise: reach of the start in units of eps, >= 0; 2 in the paper, 3 or 4 where eps is large.
        norm: "linf" alone.
        start: "uniform" alone; how far, says `noise`.

    What we do differently: the model is attacked in the mode that training chooses (eval by default), theirs in train
    mode.
    """

    noise: float = 2.0
    start: Start = "uniform"

    norm_bounded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        super().__post_init__()
        checks.choice("norm", self.norm, ("linf",))
        checks.choice("start", self.start, ("uniform",))
        checks.at_least("noise", self.noise, 0)

    def init(self, inputs: AttackInputs) -> ProjectedState:
        """Begin at the noisy inputs, with the box as the only limit."""
        x = inputs.x
        delta = geometry.random_start(x, self.noise * inputs.eps, self.norm, self.start, inputs.noise)
        point = (x + delta).to(x.dtype).clamp(*self.box)
        # A row with radius 0 stays where it is, whatever the step size.
        free = geometry.column(inputs.eps > 0, x)
        low, high = (torch.where(free, torch.full_like(x, face).clamp(*self.box), x) for face in self.box)
        return ProjectedState.at(inputs, point, low=low, high=high)
