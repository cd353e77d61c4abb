"""The attacks of Carlini and Wagner (2017): distance and success in one objective, whose weights are searched for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.adam import adam_step
from wideberth.attacks.base import Attack, input_gradient
from wideberth.attacks.minimum_norm import largest_distance, record_closer, refuse_restarts
from wideberth.attacks.state import AttackInputs, AttackState
from wideberth.checks import InputError, Norm
from wideberth.losses import Loss

_INSIDE = 0.99
"""Largest |tanh(w)|: closer to 1, where its derivative vanishes, Adam hardly moves points."""
_PROGRESS = 0.9999
"""A search whose objective is above this factor of its last value makes no progress."""
_RAISE = 10.0
"""Factor by which c grows until a search succeeds."""
_LARGEST = 20.0
"""linf: where c stops growing."""
_SHRINK = 0.9
"""linf: the next tau, in units of the distance reached."""
_CLOSE = 0.01
"""linf: the search ends where the distance reached and the largest tau that failed are so close, relatively."""


@dataclass(frozen=True)
class CarliniWagnerState(AttackState):
    """The state of a row's searches: one search is a run of Adam at fixed c and tau.

    Attributes:
        w: (B, ...) the point in tanh space.
        mean: (B, ...) Adam's running mean of the gradient.
        square: (B, ...) Adam's running mean of its square.
        c: (B,) weight of the misclassification term against the distance.
        tau: (B,) largest entry of a perturbation that costs nothing; linf only.
        lower: (B,) the largest c (linf: tau) that has failed.
        upper: (B,) the smallest c that has succeeded.
        searches: (B,) int64, how many have ended.
        step: (B,) int64, steps taken in this search.
        cuts: (B,) int64, cuts of the learning rate in this search.
        succeeded: (B,) bool, whether this search had a success since its last check of progress.
        last_objective: (B,) the objective at that check.
    """

    w: Tensor
    mean: Tensor
    square: Tensor
    c: Tensor
    tau: Tensor
    lower: Tensor
    upper: Tensor
    searches: Tensor
    step: Tensor
    cuts: Tensor
    succeeded: Tensor
    last_objective: Tensor


@dataclass(frozen=True, kw_only=True)
class CarliniWagner(Attack[CarliniWagnerState]):
    """Adam on distance + c * hinge of the margin, in the tanh space of the box (Carlini and Wagner, S&P 2017).

    l2: the distance is squared; c grows tenfold until a search succeeds, then it is bisected. linf: the distance is the
    sum of what the entries exceed tau by; c grows until a search succeeds, then tau shrinks. The searches of a row
    depend on that row alone. Each query costs a forward and a backward; a row that is finished stands at its last
    iteration (`ends_early`).

    What we do differently:

    - A search that makes no progress over a tenth of its steps goes on with a tenth of its learning rate, `cuts` times,
      before it ends; at a fixed rate Adam keeps crossing the boundary. `cuts=0` is the authors' early abort, row by
      row: at worst 1.4 % too far on the linear models we tried, against 0.03 % with `cuts=2`, which takes some 2.5
      times the queries. On small trained nets the medians of all differ by less than 0.1 %.
    - A search succeeds where its last tenth does: Adam's first steps cross boundaries that its c would not hold at, and
      the bisection would then stay below the smallest c that works (25 % too far where a step is longer than the
      distance).
    - 1,000 steps a search, not 10,000. No confidence parameter, since the boundary itself is sought.
    - linf: points are clipped to tau before the query; the entries oscillate around tau, and would nearly always exceed
      it. c grows by ten, not two. A tau that fails does not end the row: the next lies half-way to the distance
      reached, until the two are within 1 %.

    Attributes:
        norm: "l2" or "linf".
        box: finite.
        steps: of one search, at most.
        search_steps: l2: how many searches. In both norms, a row takes at most `search_steps * steps` steps.
        learning_rate: Adam's, in tanh space: there the box is some 4 wide.
        initial_c: the first c.
        cuts: of the learning rate, before a search that makes no progress ends.
        loss: (logits, y) -> (B,); has to be zero on the boundary, and positive beyond it.
    """

    norm: Norm = "l2"
    steps: int = 1000
    search_steps: int = 9
    learning_rate: float = 0.01
    initial_c: float = 1e-3
    cuts: int = 1
    loss: Loss = losses.margin_loss

    minimum_norm: ClassVar[bool] = True
    ends_early: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        super().__post_init__()
        checks.choice("norm", self.norm, ("l2", "linf"))
        checks.at_least("steps", self.steps, 1)
        checks.at_least("search_steps", self.search_steps, 1)
        checks.at_least("learning_rate", self.learning_rate, 0)
        checks.at_least("initial_c", self.initial_c, 0)
        checks.at_least("cuts", self.cuts, 0)
        if not all(map(math.isfinite, self.box)):
            raise InputError(f"box={self.box}: must be finite, tanh space lies between its faces")
        refuse_restarts(type(self).__name__, self.restarts)

    @property
    def num_steps(self) -> int:
        """At most."""
        return self.search_steps * self.steps

    def init(self, inputs: AttackInputs) -> CarliniWagnerState:
        """At the clean input."""
        w, zero = self.hidden(inputs.x, inputs.x), torch.zeros_like(inputs.eps)
        none, infinite = torch.zeros_like(inputs.y, dtype=torch.int64), torch.full_like(zero, float("inf"))
        return CarliniWagnerState.initial(
            inputs,
            inputs.x,
            w=w,
            mean=torch.zeros_like(w),
            square=torch.zeros_like(w),
            c=torch.full_like(zero, self.initial_c),
            tau=largest_distance(inputs, self.norm, self.box),
            lower=zero,
            upper=infinite,
            searches=none,
            step=none,
            cuts=none,
            succeeded=none.bool(),
            last_objective=infinite,
        )

    def update(self, model: nn.Module, inputs: AttackInputs, state: CarliniWagnerState) -> CarliniWagnerState:
        """One forward and one input gradient at `state.point`; then a step of Adam, and maybe the next search."""
        logits, loss, gradient = input_gradient(model, state.point, inputs.attack_loss(self.loss))
        distance = geometry.norm((state.point - inputs.x).to(state.w.dtype), self.norm)
        success = inputs.goal_reached(logits)
        finished = state.iteration >= self.num_steps
        state = record_closer(inputs, state, success, distance, cost=2)
        state = replace(state, succeeded=state.succeeded | success)
        cost, cost_gradient = self.penalty(self.perturbation(inputs.x, state.w), state.tau)
        # An objective of zero cannot improve, and counts as no progress; but 0 > factor * 0 would not say so.
        objective = (cost + state.c * (-loss).clamp_min(0)).clamp_min(torch.finfo(cost.dtype).tiny)
        check = state.step % max(1, self.steps // 10) == 0
        stuck = check & (objective > _PROGRESS * state.last_objective)
        last = torch.where(check, objective.to(state.last_objective.dtype), state.last_objective)
        state = replace(state, last_objective=last, cuts=state.cuts + stuck)
        hinge_gradient = geometry.column(state.c * (loss < 0), cost_gradient) * gradient
        state = self.adam(state, cost_gradient - hinge_gradient)
        over = (state.cuts > self.cuts) | (state.step >= self.steps)
        if self.norm == "linf":
            # All points are within tau, so that a success ends the search, and the next has a smaller tau.
            over = over | success
        state = self.next_tau(inputs, state, over) if self.norm == "linf" else self.next_c(inputs, state, over)
        finished = finished | (state.searches >= self.search_steps)
        return replace(
            state,
            point=self.point(inputs, state),
            succeeded=state.succeeded & ~check,
            iteration=state.iteration.masked_fill(finished, self.num_steps),
        )

    def _off(self, dtype: torch.dtype) -> float:
        """The rounding error of going to tanh space and back."""
        low, high = self.box
        return 4 * torch.finfo(dtype).eps * (high - low + max(abs(low), abs(high)))

    # ---- tanh space ---------------------------------------------------------------------------------------------

    @property
    def _centre(self) -> tuple[float, float]:
        """The middle of the box, and how far its faces are."""
        return (self.box[0] + self.box[1]) / 2, (self.box[1] - self.box[0]) / 2

    def hidden(self, x: Tensor, point: Tensor) -> Tensor:
        """Where a point (B, ...) lies in the tanh space of the input, in at least float32."""
        middle, reach = self._centre
        wide = torch.promote_types(x.dtype, torch.float32)
        origin = _INSIDE * (x.to(wide) - middle) / reach
        return torch.atanh((origin + (point.to(wide) - x) / reach).clamp(-_INSIDE, _INSIDE))

    def perturbation(self, x: Tensor, w: Tensor) -> Tensor:
        """The point of `w` minus the input, dtype of `w`; it may leave the box by a little."""
        middle, reach = self._centre
        delta = reach * torch.tanh(w) - _INSIDE * (x.to(w.dtype) - middle)
        # Adam's step does not depend on the gradient's size: rounding, which differs from batch to batch, must be zero.
        return torch.where(delta.abs() > self._off(w.dtype), delta, 0)

    def point(self, inputs: AttackInputs, state: CarliniWagnerState) -> Tensor:
        """The next query, (B, ...), dtype of x."""
        delta = self.perturbation(inputs.x, state.w)
        radius = state.tau if self.norm == "linf" else torch.full_like(state.tau, float("inf"))
        return geometry.place(inputs.x, delta, radius, self.norm, self.box)

    # ---- one search ---------------------------------------------------------------------------------------------

    def penalty(self, delta: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """The distance term of a perturbation, (B,), and its gradient, (B, ...)."""
        if self.norm == "l2":
            return delta.flatten(1).square().sum(1), 2 * delta
        excess = delta.abs() - geometry.column(tau, delta)
        return excess.clamp_min(0).flatten(1).sum(1), torch.where(excess > 0, delta.sign(), 0)

    def adam(self, state: CarliniWagnerState, gradient: Tensor) -> CarliniWagnerState:
        """One step of Adam (Kingma and Ba 2015) against a gradient with respect to the point, row by row."""
        _, reach = self._centre
        gradient = gradient * reach * (1 - torch.tanh(state.w).square())
        step = state.step + 1
        direction, mean, square = adam_step(gradient, state.mean, state.square, step)
        direction = direction.nan_to_num(0, 0, 0)  # a gradient that overflows has no step, rather than a NaN for one
        rate = geometry.column(self.learning_rate * 0.1 ** state.cuts.to(mean.dtype), mean)
        return replace(state, w=state.w - rate * direction, mean=mean, square=square, step=step)

    # ---- from search to search ----------------------------------------------------------------------------------

    def next_c(self, inputs: AttackInputs, state: CarliniWagnerState, over: Tensor) -> CarliniWagnerState:
        """l2, where a search is over: bisect c, or raise it where none has succeeded yet, and begin at the input."""
        upper = torch.where(over & state.succeeded, torch.minimum(state.upper, state.c), state.upper)
        lower = torch.where(over & ~state.succeeded, torch.maximum(state.lower, state.c), state.lower)
        c = torch.where(torch.isfinite(upper), (lower + upper) / 2, _RAISE * state.c)
        state = replace(
            state, upper=upper, lower=lower, c=torch.where(over, c, state.c), searches=state.searches + over
        )
        return self.next_search(state, over, self.hidden(inputs.x, inputs.x))

    def next_tau(self, inputs: AttackInputs, state: CarliniWagnerState, over: Tensor) -> CarliniWagnerState:
        """linf, where a search is over: raise c at the same tau, or choose another tau, from the best point so far."""
        best = -state.best_loss
        weak = over & ~state.succeeded & (state.c < _LARGEST)
        lower = torch.where(over & ~state.succeeded & ~weak, state.tau, state.lower)
        other = over & ~weak
        tau = torch.where(other & state.adversarial, torch.maximum(_SHRINK * best, (lower + best) / 2), state.tau)
        # Where even the largest tau has failed, no other is tried.
        ended = other & (~state.adversarial | (best - lower <= _CLOSE * best))
        c = torch.where(weak, (_RAISE * state.c).clamp_max(_LARGEST), state.c)
        searches = torch.where(ended, self.search_steps, state.searches)
        w = torch.where(geometry.column(other & state.adversarial, state.w), self.hidden(inputs.x, state.best), state.w)
        return self.next_search(replace(state, tau=tau, lower=lower, c=c, searches=searches), over, w)

    def next_search(self, state: CarliniWagnerState, over: Tensor, w: Tensor) -> CarliniWagnerState:
        """The state with a new search from `w` (B, ...) where one is over."""
        at = geometry.column(over, w)
        return replace(
            state,
            w=torch.where(at, w, state.w),
            mean=state.mean.masked_fill(at, 0),
            square=state.square.masked_fill(at, 0),
            step=state.step.masked_fill(over, 0),
            cuts=state.cuts.masked_fill(over, 0),
            succeeded=state.succeeded & ~over,
            last_objective=state.last_objective.masked_fill(over, float("inf")),
        )
