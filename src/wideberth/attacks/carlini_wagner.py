"""The attacks of Carlini and Wagner (2017): distance and success in one objective, whose weights are searched for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.attacks.base import Attack, input_gradient
from wideberth.attacks.minimum_norm import farthest, nearer, one_run
from wideberth.attacks.state import AttackInputs, AttackState
from wideberth.checks import InputError, Norm
from wideberth.losses import Loss

_INSIDE = 0.99
"""Of the way from the middle of the box to a face is as far as tanh space is used: beyond, Adam hardly moves points."""
_PROGRESS = 0.9999
"""A search whose objective has not come below so much of what it was makes no progress."""
_MEMORY = (0.9, 0.999)
"""Of Adam's two running means."""
_RAISE = 10.0
"""How c grows until it succeeds."""
_LARGEST = 20.0
"""linf: where c stops growing."""
_SHRINK = 0.9
"""linf: the next tau, in units of the distance reached."""
_CLOSE = 0.01
"""linf: the search ends where the distance reached and the largest tau that failed are so close, relatively."""


@dataclass(frozen=True)
class Search(AttackState):
    """Where a row stands in its searches.

    Attributes:
        w: (B, ...) the point in tanh space.
        mean: (B, ...) Adam's running mean of the gradient.
        square: (B, ...) Adam's running mean of its square.
        c: (B,) how much success counts against distance.
        tau: (B,) how far an entry may go at no cost; linf only.
        lower: (B,) the largest c (linf: tau) that has failed.
        upper: (B,) the smallest c that has succeeded.
        searches: (B,) int64, how many have ended.
        taken: (B,) int64, steps in this one.
        cuts: (B,) int64, of the learning rate in this one.
        reached: (B,) bool, whether this one has succeeded since progress was last looked at.
        before: (B,) the objective then.
    """

    w: Tensor
    mean: Tensor
    square: Tensor
    c: Tensor
    tau: Tensor
    lower: Tensor
    upper: Tensor
    searches: Tensor
    taken: Tensor
    cuts: Tensor
    reached: Tensor
    before: Tensor


@dataclass(frozen=True, kw_only=True)
class CarliniWagner(Attack):
    """Adam on distance + c * hinge of the margin, in the tanh space of the box (Carlini and Wagner, S&P 2017).

    l2: the distance is squared; c grows tenfold until a search succeeds, then the two sides are bisected. linf: the
    distance is what the entries exceed tau by, in total; c grows until a search succeeds, then tau shrinks. The
    searches of a row depend on that row alone. Each point asked about costs a forward and a backward; a row that is
    done counts as at its last iteration, so that a schedule lets it go.

    What we do differently:

    - A search that makes no progress over a tenth of its steps goes on with a tenth of its learning rate, `cuts` times,
      before it is given up; at a fixed rate Adam keeps crossing the boundary. `cuts=0` is the authors' early abort, row
      by row: at worst 1.4 % too far on the linear models we tried, against 0.03 % with `cuts=2`, which takes some 2.5
      times the points. On small trained nets the medians of all differ by less than 0.1 %.
    - A search succeeds where its last tenth does: Adam's first strides cross boundaries that its c would not hold at,
      and the bisection would then stay below the smallest c that works (25 % too far where a stride is longer than
      the distance).
    - 1,000 steps a search, not 10,000. No confidence: it is the boundary that is looked for.
    - linf: points are clipped to tau before the model is asked about them; the entries waver around tau, and would
      nearly always exceed it. c grows by ten, not two. A tau that fails is not the end: the next lies half-way to the
      distance reached, until the two are within 1 %.

    Attributes:
        norm: "l2" or "linf".
        box: finite.
        steps: of one search, at most.
        search_steps: l2: how many searches. In both norms, a row takes at most `search_steps * steps` steps.
        learning_rate: Adam's, in tanh space: there the box is some 4 wide.
        initial_c: the first c.
        cuts: of the learning rate, before a search that makes no progress is given up.
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
        one_run(type(self).__name__, self.restarts)

    @property
    def num_steps(self) -> int:
        """At most."""
        return self.search_steps * self.steps

    def init(self, inputs: AttackInputs) -> Search:
        """Begin at the inputs."""
        w, zero = self.hidden(inputs.x, inputs.x), torch.zeros_like(inputs.eps)
        none, infinite = torch.zeros_like(inputs.y, dtype=torch.int64), torch.full_like(zero, float("inf"))
        return Search.at(
            inputs,
            inputs.x,
            w=w,
            mean=torch.zeros_like(w),
            square=torch.zeros_like(w),
            c=torch.full_like(zero, self.initial_c),
            tau=farthest(inputs, self.norm, self.box),
            lower=zero,
            upper=infinite,
            searches=none,
            taken=none,
            cuts=none,
            reached=none.bool(),
            before=infinite,
        )

    def step(self, model: nn.Module, inputs: AttackInputs, state: AttackState, loss: Loss | None = None) -> Search:
        """One forward and one input gradient at `state.point`, then a step of Adam, or on to the next search."""
        assert isinstance(state, Search)
        ascended = inputs.loss(self.loss if loss is None else loss)
        logits, value, gradient = input_gradient(model, state.point, ascended)
        distance = geometry.norm((state.point - inputs.x).to(state.w.dtype), self.norm)
        now = inputs.goal_reached(logits)
        done = state.iteration >= self.num_steps
        state = nearer(inputs, state, now, distance, cost=2)
        # In linf, points within tau are all there are, and success at once asks for less.
        state = replace(state, reached=state.reached | now)
        paid, pull = self.penalty(self.perturbation(inputs.x, state.w), state.tau)
        # An objective of zero has nothing to gain, and is stuck; but 0 > share * 0 would not say so.
        objective = (paid + state.c * (-value).clamp_min(0)).clamp_min(torch.finfo(paid.dtype).tiny)
        look = state.taken % max(1, self.steps // 10) == 0
        stuck = look & (objective > _PROGRESS * state.before)
        state = replace(
            state, before=torch.where(look, objective.to(state.before.dtype), state.before), cuts=state.cuts + stuck
        )
        state = self.adam(state, pull - geometry.column(state.c * (value < 0), pull) * gradient)
        over = (state.cuts > self.cuts) | (state.taken >= self.steps)
        if self.norm == "linf":
            over = over | now
        state = self.next_tau(inputs, state, over) if self.norm == "linf" else self.next_c(inputs, state, over)
        done = done | (state.searches >= self.search_steps)
        return replace(
            state,
            point=self.point(inputs, state),
            reached=state.reached & ~look,
            iteration=state.iteration.masked_fill(done, self.num_steps),
        )

    def _off(self, dtype: torch.dtype) -> float:
        """How far tanh space and back may lead by rounding."""
        low, high = self.box
        return 4 * torch.finfo(dtype).eps * (high - low + max(abs(low), abs(high)))

    def run(
        self, model: nn.Module, inputs: AttackInputs, *, loss: Loss | None = None, judge: bool = True
    ) -> AttackState:
        """One run of all rows; those that are done leave, unless a `loss` is tied to the batch."""
        del judge
        state, left = self.init(inputs), torch.arange(len(inputs.y), device=inputs.y.device)
        ended, order = [state.rows(left[:0])], [left[:0]]
        for _ in range(self.num_steps):
            state = self.step(model, inputs, state, loss)
            over = state.iteration >= self.num_steps
            if loss is None and bool(over.any()):
                ended.append(state.rows(over))
                order.append(left[over])
                state, inputs, left = state.rows(~over), inputs.rows(~over), left[~over]
                if not len(left):
                    break
        whole = reduce(Search.joined, [*ended, state])
        return whole.rows(torch.cat([*order, left]).argsort())

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
        """What leads from the input to the point of `w`, dtype of `w`; it may lead out of the box by a little."""
        middle, reach = self._centre
        delta = reach * torch.tanh(w) - _INSIDE * (x.to(w.dtype) - middle)
        # Adam takes a stride by a gradient however small: rounding, which differs from batch to batch, must be none.
        return torch.where(delta.abs() > self._off(w.dtype), delta, 0)

    def point(self, inputs: AttackInputs, state: Search) -> Tensor:
        """What the model is asked about, dtype of x."""
        delta = self.perturbation(inputs.x, state.w)
        radius = state.tau if self.norm == "linf" else torch.full_like(state.tau, float("inf"))
        return geometry.place(inputs.x, delta, radius, self.norm, self.box)

    # ---- one search ---------------------------------------------------------------------------------------------

    def penalty(self, delta: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """What a perturbation costs, (B,), and the gradient of that, (B, ...)."""
        if self.norm == "l2":
            return delta.flatten(1).square().sum(1), 2 * delta
        excess = delta.abs() - geometry.column(tau, delta)
        return excess.clamp_min(0).flatten(1).sum(1), torch.where(excess > 0, delta.sign(), 0)

    def adam(self, state: Search, gradient: Tensor) -> Search:
        """One step of Adam (Kingma and Ba 2015) against a gradient with respect to the point, row by row."""
        _, reach = self._centre
        gradient = gradient * reach * (1 - torch.tanh(state.w).square())
        mean = _MEMORY[0] * state.mean + (1 - _MEMORY[0]) * gradient
        square = _MEMORY[1] * state.square + (1 - _MEMORY[1]) * gradient.square()
        taken = state.taken + 1
        first, second = (geometry.column(1 - memory ** taken.to(mean.dtype), mean) for memory in _MEMORY)
        # A gradient that overflows has no step, rather than a NaN for one.
        stride = ((mean / first) / ((square / second).sqrt() + 1e-8)).nan_to_num(0, 0, 0)
        rate = geometry.column(self.learning_rate * 0.1 ** state.cuts.to(mean.dtype), mean)
        return replace(state, w=state.w - rate * stride, mean=mean, square=square, taken=taken)

    # ---- from search to search ----------------------------------------------------------------------------------

    def next_c(self, inputs: AttackInputs, state: Search, over: Tensor) -> Search:
        """l2, where a search is over: bisect c, or raise it where none has succeeded yet, and begin at the input."""
        upper = torch.where(over & state.reached, torch.minimum(state.upper, state.c), state.upper)
        lower = torch.where(over & ~state.reached, torch.maximum(state.lower, state.c), state.lower)
        c = torch.where(torch.isfinite(upper), (lower + upper) / 2, _RAISE * state.c)
        state = replace(
            state, upper=upper, lower=lower, c=torch.where(over, c, state.c), searches=state.searches + over
        )
        return self.anew(state, over, self.hidden(inputs.x, inputs.x))

    def next_tau(self, inputs: AttackInputs, state: Search, over: Tensor) -> Search:
        """linf, where a search is over: raise c at the same tau, or ask for another tau from the best point so far."""
        best = -state.value
        weak = over & ~state.reached & (state.c < _LARGEST)
        lower = torch.where(over & ~state.reached & ~weak, state.tau, state.lower)
        other = over & ~weak
        tau = torch.where(other & state.broken, torch.maximum(_SHRINK * best, (lower + best) / 2), state.tau)
        # Where all of box and radius has failed, nothing is left to ask for either.
        ended = other & (~state.broken | (best - lower <= _CLOSE * best))
        c = torch.where(weak, (_RAISE * state.c).clamp_max(_LARGEST), state.c)
        searches = torch.where(ended, self.search_steps, state.searches)
        begun = torch.where(geometry.column(other & state.broken, state.w), self.hidden(inputs.x, state.kept), state.w)
        return self.anew(replace(state, tau=tau, lower=lower, c=c, searches=searches), over, begun)

    def anew(self, state: Search, over: Tensor, w: Tensor) -> Search:
        """The state with a new search from `w` (B, ...) where one is over."""
        at = geometry.column(over, w)
        return replace(
            state,
            w=torch.where(at, w, state.w),
            mean=state.mean.masked_fill(at, 0),
            square=state.square.masked_fill(at, 0),
            taken=state.taken.masked_fill(over, 0),
            cuts=state.cuts.masked_fill(over, 0),
            reached=state.reached & ~over,
            before=state.before.masked_fill(over, float("inf")),
        )
