"""Square (Andriushchenko et al. 2020): a random search that changes windows of the input and needs no gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.attacks import square_windows as windows
from wideberth.attacks.base import Attack
from wideberth.attacks.square_candidates import column, fill, move_mass, projected_l1
from wideberth.attacks.state import AttackInputs, ProjectedState
from wideberth.losses import Loss

_QUERIES_PER_DRAW = 64
"""The number of queries whose random numbers are drawn together."""

# The columns of `SquareState.draws`.
_FIRST, _SECOND = slice(0, 2), slice(2, 4)
"""The positions of the first and of the second window."""
_ORIENTATION = 4
"""The orientation of the bump."""
_FRACTION = 5
"""The fraction that is removed from the second window (vectors and sequences)."""
_WEIGHT = slice(6, 7)
"""The weight of the bump (vectors and sequences)."""
_SIGNS = slice(7, None)
"""One sign per channel."""


@dataclass(frozen=True, kw_only=True)
class SquareState(ProjectedState):
    """The state of Square; `best` is the incumbent of the random search.

    Random numbers are drawn for many queries at once, which takes no longer than to draw them for one.

    Attributes:
        points: (B, k, ...) the candidates at which the model is queried next. Candidate i is used if all candidates
            before it are rejected. `point` is the first candidate.
        queries: (B, k) int64, the query numbers of the candidates; `iteration` is that of the first candidate.
        draws: (B, n, m) uniform random numbers for the n queries that begin with number `since`. The m columns are:
            0:2 and 2:4 the positions of the first and the second window, 4 the orientation of the bump, 5 the fraction
            removed from the second window, 6 the weight of the bump, 7: one sign per channel.
        bounds: (B, n, 4 or 8) int64, the windows of the same n queries: (top, left, rows, columns) of the one window
            in linf, of the first and of the second window in l2 and l1.
        since: (B,) int64, the first query number that `draws` and `bounds` cover.
        age: the number of candidates built since the last draw; each advances the query number by at most two.
    """

    points: Tensor
    queries: Tensor
    draws: Tensor
    bounds: Tensor
    since: Tensor
    age: int = 0

    def joined(self, other: Self) -> Self:
        """Return these rows followed by those of `other`.

        Every row keeps as many candidates as the state with fewer has. `age` is the larger one, so that new numbers are
        drawn before any row has used up its own.
        """
        k = min(self.queries.shape[1], other.queries.shape[1])
        these, those = (replace(part, points=part.points[:, :k], queries=part.queries[:, :k]) for part in (self, other))
        return replace(super(SquareState, these).joined(those), age=max(self.age, other.age))


@dataclass(frozen=True, kw_only=True)
class Square(Attack[SquareState]):
    """Random search with square windows that shrink (Andriushchenko et al. 2020): one forward per query, no gradient.

    Because it uses no gradients, it finds adversarial points of models whose gradients are masked. Each candidate
    changes windows of the incumbent:

    - linf: each channel's entries of the window are set to the upper or lower bound of ball and box.
    - l2, l1: the perturbation in two windows is removed; the freed and the unused budget go to the first window, in
      the direction of its old perturbation plus a bump of random sign. A bump consists of two hills of opposite signs
      next to each other and has unit norm.

    A candidate becomes the incumbent if its loss is higher or if it is adversarial. After a success, the incumbent of a
    row no longer changes.

    Inputs may have any rank. In images (B, ..., H, W), a window covers part of the last two axes. In vectors (B, d) and
    sequences (B, C, T), it covers a fraction p of the last axis. All axes before are channels.

    Differences from the original:

    - Windows, signs and orientations are drawn for each row, so that a result does not depend on the batch. The
      original draws them once for a batch.
    - All positions of a window can be drawn. The original never draws the last one.
    - In linf, where a window would not change the incumbent, the opposite bounds are used. The original queries the
      unchanged point; here that query is counted but skipped.
    - In l1, a candidate is clipped to the box and then projected onto the ball. The projection uses Newton's method
      instead of a sort.
    - In l2 and l1, windows of vectors and sequences shrink to single entries. The fraction that is removed from the
      second window and the weight of the bump are drawn too. On 10 features of a linear model, 1,000 queries then
      reach 99 % of the largest l2 effect instead of 77 %.
    - The initial point counts as a query.

    Attributes:
        queries: the number of queries per restart, including the skipped ones; the first is at the initial point.
        p_init: the fraction of the input that the first windows cover; it is halved after 10, 50, 200, 500, 1000, 2000,
            4000, 6000 and 8000 iterations.
        rescaled: whether that schedule, which is made for 10,000 queries, is scaled to `queries`. AutoAttack does not
            scale it.
        parallel_queries: the largest number of candidates of a row that are queried together where the batch has room
            (see `AttackInputs.points_per_row`). This is faster, because a model evaluates large batches more
            efficiently and nearly all candidates are rejected late in a search. The search is the same, up to rounding.
            Queries after an accepted candidate are wasted. They do not count as evaluations, because their number
            depends on the rest of the batch.
        loss: the loss that the attack maximises; (logits, y) -> (B,).
    """

    queries: int = 5000
    p_init: float = 0.8
    rescaled: bool = False
    parallel_queries: int = 4
    loss: Loss = losses.margin_loss

    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raise `InputError` for invalid hyper-parameters."""
        super().__post_init__()
        checks.at_least("queries", self.queries, 1)
        checks.at_least("p_init", self.p_init, 0)
        checks.at_least("parallel_queries", self.parallel_queries, 1)
        if 2 * self.parallel_queries > _QUERIES_PER_DRAW:
            limit = _QUERIES_PER_DRAW // 2
            raise checks.InputError(f"parallel_queries={self.parallel_queries}: must be at most {limit}")
        if self.p_init > 1:
            raise checks.InputError(f"p_init={self.p_init}: must be a fraction of the input, at most 1")

    @property
    def num_steps(self) -> int:
        """The number of updates: `queries`, since each update makes at least one query."""
        return self.queries

    def init(self, inputs: AttackInputs) -> SquareState:
        """Return the initial state: at vertical stripes in linf, at a grid of bumps in l2 and l1.

        The stripes of vectors and sequences are single entries.
        """
        x, eps = inputs.x, inputs.eps
        noise = inputs.noise.fold("square", "start")
        start = windows.image(x)
        if self.norm == "linf":
            low, high = geometry.faces(x, eps, self.box)
            stripes = noise.sign((start.shape[1], 1, start.shape[3]), eps.dtype)
            point = torch.where((stripes > 0).expand_as(start).reshape(x.shape), high, low)
            return self._initial(inputs, point, low=low, high=high)
        delta = windows.tiles(noise, start.shape, self.norm, eps.dtype).view_as(x)
        scale = self._radius(inputs) / geometry.norm(delta, self.norm)
        # In l1, a perturbation that is longer than the radius is not scaled: `place` projects it, which leaves fewer
        # and larger entries.
        delta = delta * geometry.column(scale if self.norm == "l2" else scale.clamp_min(1), x)
        return self._initial(inputs, geometry.place(x, delta, eps, self.norm, self.box))

    def _initial(self, inputs: AttackInputs, point: Tensor, **faces: Tensor) -> SquareState:
        """Return the state before the first query, which is at `point` (B, ...)."""
        first = torch.zeros_like(inputs.y, dtype=torch.int64)
        drawn = self._drawn(inputs, first)
        return SquareState.initial(inputs, point, points=point[:, None], queries=first[:, None], **drawn, **faces)

    @torch.no_grad()
    def update(self, model: nn.Module, inputs: AttackInputs, state: SquareState) -> SquareState:
        """Query the model at `state.points`, accept at most one candidate per row, and build the next candidates."""
        logits = model(state.points.flatten(0, 1)).unflatten(0, state.queries.shape).unbind(1)
        attack_loss = inputs.attack_loss(self.loss)
        loss = torch.stack([attack_loss(each) for each in logits], 1).to(state.best_loss.dtype)
        success = torch.stack([inputs.goal_reached(each) for each in logits], 1)
        # The rows of a batch may be at different query numbers; some have made their last query already.
        searching = ~state.adversarial[:, None] & (state.queries < self.queries)
        better = searching & (success | (loss > state.best_loss[:, None]))
        accepted = better.any(1)
        # Candidates after the first accepted one are ignored: they were built from an incumbent that is now replaced.
        first, count = better.to(torch.int8).argmax(1), searching.sum(1).clamp_min(1)
        last = torch.where(accepted, first, count - 1)[:, None]
        won = accepted & success.gather(1, last).squeeze(1)
        iteration = state.queries.gather(1, last).squeeze(1)
        # In rows that succeed now, the number of queries before the successful one.
        survived = torch.where(won, iteration, state.steps_survived)
        state = replace(
            state,
            best=_accepted(accepted, state.points, last, state.best),
            best_loss=torch.where(accepted, loss.gather(1, last).squeeze(1), state.best_loss),
            adversarial=state.adversarial | won,
            evaluations=state.evaluations + last.squeeze(1) + 1,
        )
        count_next = max(1, min(self.parallel_queries, inputs.points_per_row))
        if 2 * (state.age + count_next) > _QUERIES_PER_DRAW:
            state = replace(state, **self._drawn(inputs, iteration), age=0)
        points, queries = self._candidates(inputs, state, iteration, count_next)
        # In rows that still search, the number of queries so far, including the skipped ones.
        survived = torch.where(searching[:, 0] & ~won, queries[:, 0].clamp_max(self.queries), survived)
        state = replace(state, points=points, queries=queries, age=state.age + count_next)
        return replace(state, point=points[:, 0], iteration=queries[:, 0], steps_survived=survived)

    def _candidates(
        self, inputs: AttackInputs, state: SquareState, iteration: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Build the `count` candidates that follow the queries with numbers `iteration` (B,).

        Returns:
            The candidates (B, count, ...) and their query numbers (B, count).
        """
        best = windows.image(state.best)
        points = best.new_empty(len(best), count, *best.shape[1:])
        queries: list[Tensor] = []
        for point in points.unbind(1):
            skipped = self._candidate(inputs, state, iteration, point)
            # The next query number of a row with a success leaves out skipped queries: it says at which query the row
            # succeeded. If verification refuses the success, the row continues from that number.
            iteration = iteration + 1 + (skipped if queries else torch.where(state.adversarial, 0, skipped))
            queries.append(iteration)
        return points.view(len(best), count, *inputs.x.shape[1:]), torch.stack(queries, 1)

    def _candidate(self, inputs: AttackInputs, state: SquareState, iteration: Tensor, point: Tensor) -> Tensor:
        """Write the candidate that follows the queries `iteration` (B,) to `point` (B, C, H, W).

        Returns:
            (B,) int64, the number of queries that are skipped before this candidate: 1 in linf where the drawn window
            would not change the incumbent, else 0.
        """
        best, dtype = windows.image(state.best), inputs.eps.dtype
        height, width = best.shape[2:]
        entry = torch.arange(len(iteration), device=iteration.device), iteration - state.since
        draws, bounds = state.draws[entry], state.bounds[entry].unbind(1)
        sign, window = 1 - 2 * (draws[:, _SIGNS] < 0.5).to(dtype), windows.Window(*bounds[:4])
        if state.low is not None and state.high is not None:
            low, high = windows.image(state.low), windows.image(state.high)
            return fill(point, best, low, high, window, sign, self._largest_entry(inputs)).to(iteration.dtype)
        sizes, second_window = self._window_sizes(inputs), windows.Window(*bounds[4:])
        orientation = (draws[:, _ORIENTATION] < 0.5).to(torch.int64)
        bump = sizes.bump(self._stage(sizes, iteration), orientation, window, height, width)
        first, second = window.mask(height, width, dtype), second_window.mask(height, width, dtype)
        if min(height, width) == 1:
            # Vectors have few entries: if a window were always removed entirely and the bump always had weight 1, only
            # a few points could be reached.
            second = second * column((2 * draws[:, _FRACTION]).clamp_max(1))
            sign = sign * (draws[:, _WEIGHT] / (1 - draws[:, _WEIGHT]))
        clean, radius = windows.image(inputs.x).to(dtype), column(self._radius(inputs))
        delta = move_mass(best - clean, first, second, bump, column(sign), radius, self.norm)
        if self.norm == "l1":
            delta = projected_l1(delta.add_(clean).clamp_(*self.box).sub_(clean), radius)
        # Every entry of the perturbation is shortened by half a unit in the last place, so that rounding the sum below
        # cannot make it longer than it was.
        half_unit = column(self._largest_entry(inputs)) * (torch.finfo(best.dtype).eps / 2)
        shortening = torch.minimum(delta, half_unit)
        delta.sub_(torch.maximum(shortening, -half_unit, out=shortening))
        point.copy_(delta.add_(clean).to(best.dtype).clamp_(*self.box))
        return torch.zeros_like(iteration)

    def _drawn(self, inputs: AttackInputs, since: Tensor) -> dict[str, Tensor]:
        """Draw the random numbers of each row for `_QUERIES_PER_DRAW` queries from number `since` (B,) on.

        Returns:
            The fields `draws`, `bounds` and `since` of `SquareState`.
        """
        query = (since[:, None] + torch.arange(_QUERIES_PER_DRAW, device=since.device)).flatten()
        row = torch.arange(len(since), device=since.device).repeat_interleave(_QUERIES_PER_DRAW)
        noise = inputs.noise.fold("square").rows(row).then(query)
        channels, height, width = windows.image(inputs.x[:1]).shape[1:]
        draws, sizes = noise.uniform((_SIGNS.start + channels,), inputs.eps.dtype), self._window_sizes(inputs)
        positions = (draws[:, _FIRST],) if self.norm == "linf" else (draws[:, _FIRST], draws[:, _SECOND])
        drawn = [sizes.draw(self._stage(sizes, query), position, height, width) for position in positions]
        bounds = torch.stack([part for window in drawn for part in window], 1)
        shape = (len(since), _QUERIES_PER_DRAW, -1)
        return {"draws": draws.view(shape), "bounds": bounds.view(shape), "since": since}

    def _window_sizes(self, inputs: AttackInputs) -> windows.Plan:
        """Return the window sizes and bumps of all stages, for inputs of this shape; they are cached."""
        height, width = windows.image(inputs.x[:1]).shape[2:]
        return windows.plan(self.p_init, height, width, self.norm, inputs.eps.dtype, inputs.x.device)

    def _stage(self, sizes: windows.Plan, query: Tensor) -> Tensor:
        """Return the stage of the schedule at each query number, same shape: the number of halvings so far."""
        return sizes.stage(query * 10_000 // self.queries if self.rescaled else query)

    def _radius(self, inputs: AttackInputs) -> Tensor:
        """Return the radii (B,) of the search in l2 and l1.

        They are at most the diameter of the box, and slightly below eps, which leaves room for rounding errors of
        float32 sums.
        """
        entries = inputs.x[0].numel()
        diameter = (self.box[1] - self.box[0]) * (entries if self.norm == "l1" else math.sqrt(entries))
        # In an unbounded box the diameter is infinite, but the square of the radius must be finite.
        largest = math.sqrt(torch.finfo(inputs.eps.dtype).max) / 2
        return inputs.eps.clamp_max(min(diameter, largest)) * (1 - 1e-6)

    def _largest_entry(self, inputs: AttackInputs) -> Tensor:
        """Return upper bounds (B,) on the absolute value of every entry of every point in ball and box."""
        bound = max(abs(face) for face in self.box)
        if math.isfinite(bound):
            return torch.full_like(inputs.eps, bound)
        radius = inputs.eps if self.norm == "linf" else self._radius(inputs)
        return inputs.x.flatten(1).abs().amax(1) + radius


def _accepted(accepted: Tensor, points: Tensor, which: Tensor, best: Tensor) -> Tensor:
    """Return the new incumbents (B, ...): `points[i, which[i]]` in rows i that are `accepted`, else `best[i]`.

    `accepted` is (B,) bool, `points` (B, k, ...), `which` (B, 1) int64. The result may be `best` itself: do not change
    it in place.
    """
    if accepted.device.type != "cpu":
        # `nonzero` would need a host synchronisation on a GPU: all rows are selected with a mask.
        row = torch.arange(len(accepted), device=accepted.device)
        return torch.where(geometry.column(accepted, best), points[row, which.squeeze(1)], best)
    rows = accepted.nonzero().squeeze(1)  # on a CPU, to copy these rows is faster: late in a search they are few
    return best.index_copy(0, rows, points[rows, which.squeeze(1)[rows]]) if len(rows) else best
