"""Square (Andriushchenko et al. 2020): random search with windows, which needs no gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.attacks import square_windows as windows
from wideberth.attacks.base import Attack
from wideberth.attacks.state import AttackInputs, ProjectedState
from wideberth.checks import Norm
from wideberth.losses import Loss

_NEWTON_STEPS = 6
"""Newton steps towards the threshold of an l1 projection; what little they leave above the radius is scaled away."""

_DRAWN = 64
"""Queries whose random numbers are drawn together."""

_FEW = 1 / 16
"""Of the input: windows that cover no more are filled entry by entry, larger ones by a mask of all entries."""

_NOTHING = 1e-4
"""Of the radius: a window with less mass counts as empty."""


@dataclass(frozen=True, kw_only=True)
class SquareState(ProjectedState):
    """The state of Square; `best` is the incumbent of the random search.

    Random numbers are drawn for many queries at once, which costs no more than for one.

    Attributes:
        points: (B, k, ...) where the model is queried next: candidate i is the one that follows if those before it are
            rejected; `point` is the first of them.
        queries: (B, k) int64, the numbers of these queries; `iteration` is the first of them.
        draws: (B, n, m) uniform numbers, for n queries from number `since` (B,) on.
        spots: (B, n, 4 or 8) int64: their windows, one in linf and two in the other norms, as `Window` has them.
        since: (B,) int64.
        age: queries since they were drawn; each uses at most two of them.
    """

    points: Tensor
    queries: Tensor
    draws: Tensor
    spots: Tensor
    since: Tensor
    age: int = 0

    def joined(self, other: Self) -> Self:
        """These rows, followed by those of `other`; the older draws decide when new ones are due."""
        k = min(self.queries.shape[1], other.queries.shape[1])
        one, two = (replace(part, points=part.points[:, :k], queries=part.queries[:, :k]) for part in (self, other))
        return replace(super(SquareState, one).joined(two), age=max(self.age, other.age))


@dataclass(frozen=True, kw_only=True)
class Square(Attack[SquareState]):
    """Random search with square windows that shrink (Andriushchenko et al. 2020): one forward a query, no gradient.

    It does not depend on gradients, and finds what masked gradients hide. linf: all entries of a window and channel go
    to one face of the ball. l2, l1: the mass of two windows, and what is left of the radius, goes to one of them, as
    its old content plus a bump of random sign. A candidate becomes the incumbent if its loss is higher or it is
    adversarial; a row with a success stays there.

    Inputs of any rank: windows cover part of the last two axes of images (B, ..., H, W), and part of the last axis of
    vectors (B, d) and sequences (B, C, T), where they have the length p * d; all axes before are channels.

    What we do differently: windows, signs and orientations are drawn per row (there a batch shares them), so that a
    result does not depend on the batch; all positions are drawn (there, never the last); in linf, a window that would
    change nothing gets the opposite faces, and the query that the original wastes on it counts without being made; in
    l1, a candidate is clipped to the box and then projected onto the ball, by Newton's method instead of a sort; for
    vectors and sequences in l2 and l1, windows shrink to single entries, and how much leaves the second window and
    the weight of the bump are drawn too (on 10 features of a linear model, 1,000 queries then reach 99 % of the largest
    l2 effect instead of 77 %); the initial point counts as a query.

    Attributes:
        queries: forwards per restart, with those that are saved; the first is at the initial point.
        p_init: fraction of the input that the first windows cover; it halves after 10, 50, 200, 500, 1000, 2000, 4000,
            6000 and 8000 iterations.
        rescaled: whether that schedule, made for 10,000 queries, shrinks to `queries` (AutoAttack leaves it as it is).
        parallel_queries: query up to so many candidates of a row together where the batch has room (see
            `AttackInputs.points_per_row`): a model answers many points faster than a few, and late in a search nearly
            all candidates are rejected. The search is the same, up to rounding. Queries beyond an accepted candidate
            are wasted; they do not count as evaluations, since their number depends on the rest of the batch.
        loss: what is ascended; (logits, y) -> (B,).
    """

    queries: int = 5000
    p_init: float = 0.8
    rescaled: bool = False
    parallel_queries: int = 4
    loss: Loss = losses.margin_loss

    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        super().__post_init__()
        checks.at_least("queries", self.queries, 1)
        checks.at_least("p_init", self.p_init, 0)
        checks.at_least("parallel_queries", self.parallel_queries, 1)
        if 2 * self.parallel_queries > _DRAWN:
            raise checks.InputError(f"parallel_queries={self.parallel_queries}: must be at most {_DRAWN // 2}")
        if self.p_init > 1:
            raise checks.InputError(f"p_init={self.p_init}: must be a fraction of the input, at most 1")

    @property
    def num_steps(self) -> int:
        """One for each query."""
        return self.queries

    def init(self, inputs: AttackInputs) -> SquareState:
        """At vertical stripes (linf; single entries of vectors and sequences) or at a grid of bumps (l2, l1)."""
        x, eps = inputs.x, inputs.eps
        noise = inputs.noise.fold("square", "start")
        start = windows.image(x)
        if self.norm == "linf":
            low, high = geometry.faces(x, eps, self.box)
            stripes = noise.sign((start.shape[1], 1, start.shape[3]), eps.dtype)
            point = torch.where((stripes > 0).expand_as(start).reshape(x.shape), high, low)
            return self._initial(inputs, point, low=low, high=high)
        delta = windows.tiles(noise, start.shape, self.norm, eps.dtype).view_as(x)
        # In l1 what is longer than the radius is projected, not scaled: that leaves fewer, larger entries.
        length = geometry.norm(delta, self.norm)
        stretch = self._radius(inputs) / length
        delta = delta * geometry.column(stretch if self.norm == "l2" else stretch.clamp_min(1), x)
        return self._initial(inputs, geometry.place(x, delta, eps, self.norm, self.box))

    def _initial(self, inputs: AttackInputs, point: Tensor, **faces: Tensor) -> SquareState:
        first = torch.zeros_like(inputs.y, dtype=torch.int64)
        drawn = self._drawn(inputs, first)
        return SquareState.initial(inputs, point, points=point[:, None], queries=first[:, None], **drawn, **faces)

    @torch.no_grad()
    def update(self, model: nn.Module, inputs: AttackInputs, state: SquareState) -> SquareState:
        """One forward at `state.points`, then candidates that differ from the incumbent in a window each."""
        logits = model(state.points.flatten(0, 1)).unflatten(0, state.queries.shape).unbind(1)
        attack_loss = inputs.attack_loss(self.loss)
        loss = torch.stack([attack_loss(each) for each in logits], 1).to(state.best_loss.dtype)
        success = torch.stack([inputs.goal_reached(each) for each in logits], 1)
        # Rows of a batch come to their last query at different times.
        searching = ~state.adversarial[:, None] & (state.queries < self.queries)
        better = searching & (success | (loss > state.best_loss[:, None]))
        accepted = better.any(1)
        # The candidates after the first that is accepted differ from an incumbent that has been replaced.
        first, count = better.to(torch.int8).argmax(1), searching.sum(1).clamp_min(1)
        last = torch.where(accepted, first, count - 1)[:, None]
        won = accepted & success.gather(1, last).squeeze(1)
        iteration = state.queries.gather(1, last).squeeze(1)
        survived = torch.where(won, iteration, state.steps_survived)
        state = replace(
            state,
            best=_accepted(accepted, state.points, last, state.best),
            best_loss=torch.where(accepted, loss.gather(1, last).squeeze(1), state.best_loss),
            adversarial=state.adversarial | won,
            evaluations=state.evaluations + last.squeeze(1) + 1,
        )
        count_next = max(1, min(self.parallel_queries, inputs.points_per_row))
        if 2 * (state.age + count_next) > _DRAWN:
            state = replace(state, **self._drawn(inputs, iteration), age=0)
        points, queries = self._candidates(inputs, state, iteration, count_next)
        survived = torch.where(searching[:, 0] & ~won, queries[:, 0].clamp_max(self.queries), survived)
        state = replace(state, points=points, queries=queries, age=state.age + count_next)
        return replace(state, point=points[:, 0], iteration=queries[:, 0], steps_survived=survived)

    def _candidates(
        self, inputs: AttackInputs, state: SquareState, iteration: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """The next points after queries (B,), (B, count, ...), and the numbers of their queries, (B, count)."""
        best = windows.image(state.best)
        points = best.new_empty(len(best), count, *best.shape[1:])
        queries: list[Tensor] = []
        for point in points.unbind(1):
            saved = self._candidate(inputs, state, iteration, point)
            # A row with a success stands at its next query, and goes on from there if verification refuses the success.
            iteration = iteration + 1 + (saved if queries else torch.where(state.adversarial, 0, saved))
            queries.append(iteration)
        return points.view(len(best), count, *inputs.x.shape[1:]), torch.stack(queries, 1)

    def _candidate(self, inputs: AttackInputs, state: SquareState, iteration: Tensor, point: Tensor) -> Tensor:
        """Write the candidate after queries (B,) to `point` (B, C, H, W); returns how many queries (B,) it saves."""
        best, wide = windows.image(state.best), inputs.eps.dtype
        height, width = best.shape[2:]
        here = torch.arange(len(iteration), device=iteration.device), iteration - state.since
        draws, spots = state.draws[here], state.spots[here].unbind(1)
        sign, window = 1 - 2 * (draws[:, 7:] < 0.5).to(wide), windows.Window(*spots[:4])
        if state.low is not None and state.high is not None:
            low, high = windows.image(state.low), windows.image(state.high)
            return _fill(point, best, low, high, window, sign, self._size(inputs)).to(iteration.dtype)
        plan, other = self._plan(inputs), windows.Window(*spots[4:])
        bump = plan.bump(self._stage(plan, iteration), (draws[:, 4] < 0.5).to(torch.int64), window, height, width)
        one, two = window.mask(height, width, wide), other.mask(height, width, wide)
        if min(height, width) == 1:
            # Few entries want fine moves: whole masses and bumps of equal weight lead to a few points only.
            two = two * _column((2 * draws[:, 5]).clamp_max(1))
            sign = sign * (draws[:, 6:7] / (1 - draws[:, 6:7]))
        base, radius = windows.image(inputs.x).to(wide), _column(self._radius(inputs))
        delta = _moved(best - base, one, two, bump, _column(sign), radius, self.norm)
        if self.norm == "l1":
            delta = _shortened(delta.add_(base).clamp_(*self.box).sub_(base), radius)
        # Shorter by half a unit in the last place, an entry may be rounded either way and stays within its length.
        grain = _column(self._size(inputs)) * (torch.finfo(best.dtype).eps / 2)
        least = torch.minimum(delta, grain)
        delta.sub_(torch.maximum(least, -grain, out=least))
        point.copy_(delta.add_(base).to(best.dtype).clamp_(*self.box))
        return torch.zeros_like(iteration)

    def _drawn(self, inputs: AttackInputs, since: Tensor) -> dict[str, Tensor]:
        """What each row draws for its queries from `since` (B,) on, as `SquareState` holds it.

        For each: two positions, what concerns the bump, and a sign per channel.
        """
        query = (since[:, None] + torch.arange(_DRAWN, device=since.device)).flatten()
        each = torch.arange(len(since), device=since.device).repeat_interleave(_DRAWN)
        noise = inputs.noise.fold("square").rows(each).then(query)
        channels, height, width = windows.image(inputs.x[:1]).shape[1:]
        draws, plan = noise.uniform((7 + channels,), inputs.eps.dtype), self._plan(inputs)
        places = (draws[:, :2],) if self.norm == "linf" else (draws[:, :2], draws[:, 2:4])
        drawn = [plan.draw(self._stage(plan, query), place, height, width) for place in places]
        spots = torch.stack([part for window in drawn for part in window], 1)
        whole = (len(since), _DRAWN, -1)
        return {"draws": draws.view(whole), "spots": spots.view(whole), "since": since}

    def _plan(self, inputs: AttackInputs) -> windows.Plan:
        height, width = windows.image(inputs.x[:1]).shape[2:]
        return windows.plan(self.p_init, height, width, self.norm, inputs.eps.dtype, inputs.x.device)

    def _stage(self, plan: windows.Plan, query: Tensor) -> Tensor:
        return plan.stage(query * 10_000 // self.queries if self.rescaled else query)

    def _radius(self, inputs: AttackInputs) -> Tensor:
        """(B,), no more than the box has room for, and a little less than eps for what float32 sums may be off."""
        entries = inputs.x[0].numel()
        across = (self.box[1] - self.box[0]) * (entries if self.norm == "l1" else math.sqrt(entries))
        # Its square is to be a number too, in a box without end.
        largest = math.sqrt(torch.finfo(inputs.eps.dtype).max) / 2
        return inputs.eps.clamp_max(min(across, largest)) * (1 - 1e-6)

    def _size(self, inputs: AttackInputs) -> Tensor:
        """(B,), what no entry of a point exceeds in absolute value."""
        bound = max(abs(face) for face in self.box)
        if math.isfinite(bound):
            return torch.full_like(inputs.eps, bound)
        reach = inputs.eps if self.norm == "linf" else self._radius(inputs)
        return inputs.x.flatten(1).abs().amax(1) + reach


def _column(value: Tensor) -> Tensor:
    """(B,) or (B, C) lifted to (B, 1, 1, 1) or (B, C, 1, 1)."""
    return value.view(len(value), -1, 1, 1)


def _accepted(new: Tensor, points: Tensor, which: Tensor, best: Tensor) -> Tensor:
    """Rows of `points` (B, k, ...), the one that `which` (B, 1) names, where `new` (B,), and of `best` elsewhere.

    It may be `best` itself: not to be changed in place.
    """
    if new.device.type != "cpu":
        each = torch.arange(len(new), device=new.device)
        return torch.where(geometry.column(new, best), points[each, which.squeeze(1)], best)
    rows = new.nonzero().squeeze(1)  # cheap on a CPU: few are new, late in a search
    return best.index_copy(0, rows, points[rows, which.squeeze(1)[rows]]) if len(rows) else best


def _fill(
    point: Tensor, best: Tensor, low: Tensor, high: Tensor, window: windows.Window, sign: Tensor, size: Tensor
) -> Tensor:
    """Write `best` (B, C, H, W) with each channel's window at the face that its sign (B, C) names to `point`.

    Returned is where that is `best` itself, (B,) bool: there the window is turned over, to the other faces.
    """
    few = _FEW * best[0, 0].numel()
    # Looking is cheap on a CPU alone: on a GPU it would be a host synchronisation.
    if best.device.type != "cpu":
        return _fill_by_mask(point, best, low, high, window, sign, size)
    area = window.rows * window.columns
    if int(area.max()) <= few:
        return _fill_by_entry(point, best, low, high, window, sign)
    large = area > few
    if 2 * int(large.sum()) > len(large):
        return _fill_by_mask(point, best, low, high, window, sign, size)
    # The large ones, of rows that began later than most, count as single entries here and are filled after.
    small = window._replace(rows=window.rows.masked_fill(large, 1), columns=window.columns.masked_fill(large, 1))
    repeated = _fill_by_entry(point, best, low, high, small, sign)
    rows = large.nonzero().squeeze(1)
    there, some = windows.Window(*(part[rows] for part in window)), point[rows]
    repeated[rows] = _fill_by_mask(some, best[rows], low[rows], high[rows], there, sign[rows], size[rows])
    point[rows] = some
    return repeated


def _fill_by_entry(
    point: Tensor, best: Tensor, low: Tensor, high: Tensor, window: windows.Window, sign: Tensor
) -> Tensor:
    """The same at the cost of the largest window; on a CPU, since that is looked up."""
    places = window.places(best.shape[3])[:, None].expand(-1, best.shape[1], -1)
    was, least, most = (part.flatten(2).gather(2, places) for part in (best, low, high))
    up = sign[:, :, None] > 0
    repeated = (torch.where(up, most, least) == was).flatten(1).all(1)
    turned = torch.where(up != repeated[:, None, None], most, least)
    point.copy_(best).view(*best.shape[:2], -1).scatter_(2, places, turned)
    return repeated


def _fill_by_mask(
    point: Tensor, best: Tensor, low: Tensor, high: Tensor, window: windows.Window, sign: Tensor, size: Tensor
) -> Tensor:
    """The same at the cost of whole images, whatever the windows."""
    height, width = best.shape[2:]
    mask = window.mask(height, width, best.dtype)
    # Pushed far beyond the face and clamped to it: exact, and faster than to select.
    most = torch.finfo(best.dtype).max
    push = _column((4 * size[:, None] * sign).clamp(-most, most)).to(best.dtype)
    torch.addcmul(best, push, mask, out=point).clamp_(low, high)
    # Differences, not bools: those would not run in vectors.
    repeated = (point - best).abs_().flatten(1).amax(1) == 0
    if best.device.type != "cpu":
        push = push * _column(1 - 2 * repeated.to(push.dtype))
        torch.addcmul(best, push, mask, out=point).clamp_(low, high)
        return repeated
    rows = repeated.nonzero().squeeze(1)
    if len(rows):
        point[rows] = torch.addcmul(best[rows], -push[rows], mask[rows]).clamp_(low[rows], high[rows])
    return repeated


def _moved(delta: Tensor, one: Tensor, two: Tensor, bump: Tensor, sign: Tensor, radius: Tensor, norm: Norm) -> Tensor:
    """`delta` (B, C, H, W), in place, with the mass of both windows, and what the ball has left, in window one.

    Masses are squares in l2 and absolute values in l1. As in the original, l1 hands out too much where there are
    several channels, for the projection to cut down everywhere. `two` is the share that is taken from each entry;
    `sign` is also the bump's weight against what was in window one.
    """

    def length(part: Tensor, axes: tuple[int, ...] = (2, 3)) -> Tensor:
        if norm == "l1":
            return part.abs().sum(axes, keepdim=True)
        euclidean: Tensor = torch.linalg.vector_norm(part, dim=axes, keepdim=True)
        return euclidean

    power = 2 if norm == "l2" else 1
    channels = delta.shape[1]
    share, inside = torch.maximum(one, two), delta * one
    total = length(delta, (1, 2, 3)) ** power
    taken = length(delta * share ** (1 / power)) ** power
    # What was there and the bump are of one length before they are weighed. The direction of next to nothing counts
    # for nothing: it is rounding, and would make the search depend on who else is in the batch.
    shape = inside.addcmul_(sign * torch.maximum(length(inside), _NOTHING * radius), bump)
    given = (radius**power - total).clamp_min(0) / channels + taken
    scale, rest = 1 / _positive(length(shape)), (1 - share) ** (1 / power)
    if norm == "l1":
        return delta.mul_(rest).addcmul_(shape, channels * given * scale)
    # What rounding has added to the length does not stay.
    after = total + (given - taken).sum(1, keepdim=True)
    fit = (radius / _positive(after.sqrt())).clamp_max(1)
    return delta.mul_(fit * rest).addcmul_(shape, fit * given.sqrt() * scale)


def _shortened(delta: Tensor, radius: Tensor) -> Tensor:
    """`delta` (B, C, H, W) projected onto the l1 ball, by Newton's method from below instead of a sort.

    The length as a function of the threshold is convex and piecewise linear, so that a few steps reach its corner.
    """
    size = delta.abs()
    threshold = torch.zeros_like(radius)
    for _ in range(_NEWTON_STEPS if delta.shape[1] > 1 else 0):  # of one channel, _moved hands out no more than fits
        left = (size - threshold).clamp_min_(0)
        missing = left.sum((1, 2, 3), keepdim=True) - radius
        count = left.sign_().sum((1, 2, 3), keepdim=True)
        threshold = threshold + missing.clamp_min(0) / count.clamp_min(1)
    left = (size - threshold).clamp_min_(0)
    fit = (radius / _positive(left.sum((1, 2, 3), keepdim=True))).clamp_max(1)
    return left.mul_(fit).copysign_(delta)


def _positive(value: Tensor) -> Tensor:
    """The value, and 1 instead of 0: to divide by."""
    return torch.where(value > 0, value, 1)
