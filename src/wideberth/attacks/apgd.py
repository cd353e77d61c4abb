"""APGD (Croce and Hein 2020, 2021): projected gradient ascent that adapts its step size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.attacks.base import Attack, Query, input_gradient
from wideberth.attacks.state import AttackInputs, ProjectedState
from wideberth.checks import InputError
from wideberth.losses import Loss

_MOMENTUM = 0.25
"""Weight of the last step in the next one."""
_FIRST_ACTIVE = 5
"""l1: one in so many entries moves, until the first checkpoint."""
_SPARSER = 0.95
"""l1: an optimum with less than this share of the entries that it had is worth another start with full steps."""
_ROUNDING = 1e-6
"""l1: an entry that is no further from the input, in units of the radius, came back to it but for rounding."""
_SHORTER, _SHORTEST = 1.5, 0.1
"""l1: what a step size is divided by at any other checkpoint, and its least value, in units of the radius."""


@dataclass(frozen=True, kw_only=True)
class APGDState(ProjectedState):
    """The state of APGD.

    Attributes:
        highest_point: (B, ...) the point of highest loss so far; with `large_eps`, since the radius last changed.
        highest_gradient: (B, ...) the gradient there.
        highest_loss: (B,) the loss there.
        origin: (B, ...) where the step to `point` began.
        step_size: (B,) in units of the radius.
        last_loss: (B,) the loss at the point queried before.
        rises: (B,) int64, how often the loss rose since the last checkpoint.
        checkpoint_loss: (B,) `highest_loss` as of the last checkpoint.
        halved: (B,) bool, whether the last checkpoint halved the step size.
        support: (B,) int64, in how many entries `highest_point` differed from the input at the last checkpoint (l1).
        active: (B,) int64, how many entries a step changes (l1).
    """

    highest_point: Tensor
    highest_gradient: Tensor
    highest_loss: Tensor
    origin: Tensor
    step_size: Tensor
    last_loss: Tensor
    rises: Tensor
    checkpoint_loss: Tensor
    halved: Tensor
    support: Tensor
    active: Tensor


@dataclass(frozen=True, kw_only=True)
class APGD(Attack[APGDState]):
    """Auto-PGD (Croce and Hein 2020; in l1, Croce and Hein 2021): projected gradient ascent that adapts its step size.

    A step has length 2 eps at first and momentum. At checkpoints that become denser, a row whose loss rose too seldom,
    or whose highest loss stands still, halves its step size and restarts from its point of highest loss. In l1 a step
    changes the largest entries of the gradient, fewer as the perturbation becomes sparser, and is projected onto ball
    and box together.

    It costs steps + 1 forwards and as many input gradients (`large_eps`: steps + 3). `APGD(loss=losses.dlr_loss,
    targets=9)` is what AutoAttack calls APGD-T.

    It returns the first misclassified point, at which an evaluation ends the row, or else the point of highest loss.

    What we do differently: the authors' code returns the last misclassified point, and the input where there is none.
    At the first checkpoint it tests whether the first loss is positive; we test whether it rose, as the paper does. In
    l1, its entries that come back to the input but for rounding still count as perturbed, and rounding may let one
    entry more move; ours do not. Where two perturbed entries are left, it goes on with both, and may get stuck; we go
    on with one of them every other time. Apart from that, the points in l1 are the same. With `large_eps`, a success
    within eps also counts while the radius is larger. With several `draws`, the loss is their mean, not the last.

    Attributes:
        steps: how many, >= 1.
        loss: what is ascended; (logits, y) -> (B,).
        rho: a row whose loss rose in no more than this fraction of the steps between two checkpoints halves its step
            size, in [0, 1]; unused in l1.
        large_eps: search at 3 eps for 30 % of the steps, at 2 eps for 30 %, and at eps for the rest; l1 only.
        draws: passes that a gradient is the mean of, for randomised models; the last decides about success.
    """

    steps: int = 100
    loss: Loss = losses.cross_entropy
    rho: float = 0.75
    large_eps: bool = False
    draws: int = 1

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        super().__post_init__()
        checks.at_least("steps", self.steps, 1)
        checks.at_least("draws", self.draws, 1)
        checks.at_least("rho", self.rho, 0)
        if self.rho > 1:
            raise InputError(f"rho={self.rho}: must be a share of the steps, at most 1")
        if self.large_eps and self.norm != "l1":
            raise InputError(f"large_eps=True with norm={self.norm!r}: the schedule of larger radii is for l1")

    @property
    def num_steps(self) -> int:
        """The steps, and a query of the first point at each of the radii."""
        return self.steps + (3 if self.large_eps else 1)

    def init(self, inputs: AttackInputs) -> APGDState:
        """On the boundary of the ball: linf and l2 in a random direction, l1 at projected Gaussian noise."""
        x, wide, noise = inputs.x, inputs.eps.dtype, inputs.noise.fold("apgd", "start")
        radius = inputs.eps * self._plan(inputs).factor[0]
        shape = x.shape[1:]
        delta = 2 * noise.uniform(shape, wide) - 1 if self.norm == "linf" else noise.normal(shape, wide)
        if self.norm != "l1":
            length = geometry.norm(delta, self.norm)
            delta = delta * geometry.column(radius / torch.where(length > 0, length, 1), x)
        point = geometry.place(x, delta, radius, self.norm, self.box)
        low = torch.full_like(inputs.eps, float("-inf"))
        none = torch.zeros_like(inputs.y)
        entries = x[0].numel()
        state = APGDState.initial_in_ball(
            inputs,
            point,
            self.norm,
            self.box,
            highest_point=point,
            highest_gradient=torch.zeros_like(x),
            highest_loss=low,
            origin=point,
            step_size=torch.full_like(inputs.eps, 1 if self.norm == "l1" else 2),
            last_loss=-low,
            rises=none,
            checkpoint_loss=low,
            halved=torch.ones_like(inputs.y, dtype=torch.bool),
            support=none + entries,
            active=none - (-entries // _FIRST_ACTIVE),
        )
        # A point of the larger balls may lie outside eps, and is not to be returned.
        return replace(state, best=x) if self.large_eps else state

    def update(self, model: nn.Module, inputs: AttackInputs, state: APGDState) -> APGDState:
        """One forward and one input gradient at `state.point`; then adapt the step size, and step."""
        plan = self._plan(inputs).at(state.iteration)
        logits, loss, gradient = input_gradient(model, state.point, inputs.attack_loss(self.loss), self.draws)
        # A loss that is NaN is no progress.
        loss = loss.to(state.best_loss.dtype).nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
        state = self._recorded(inputs, state, plan, Query(logits, loss, gradient, 2 * self.draws))
        if self.norm == "l1":
            state, restart = self._adapt_sparsity(inputs, state, plan)
        else:
            state, restart = self._adapt_step_size(state, plan, loss)
        origin = geometry.choose(restart, state.highest_point, state.point)
        gradient = geometry.choose(restart, state.highest_gradient, gradient).to(inputs.eps.dtype)
        point = self._step(inputs, state, plan, origin, gradient)
        return replace(state, point=point, origin=origin, iteration=state.iteration + 1)

    def _plan(self, inputs: AttackInputs) -> _Plan:
        return _plan(self.steps, self.norm == "l1", self.large_eps, inputs.y.device)

    def _recorded(self, inputs: AttackInputs, state: APGDState, plan: _Plan, query: Query) -> APGDState:
        """The state with the query recorded, but for the iteration."""
        final = plan.factor == 1
        success = inputs.goal_reached(query.logits)
        if self.large_eps:
            delta = state.point.to(inputs.eps.dtype) - inputs.x
            success = success & (final | (geometry.norm(delta, self.norm) <= inputs.eps))
        higher = plan.opening | (query.loss > state.highest_loss)
        better = ~state.adversarial & (success | (higher & final))
        return replace(
            state,
            best=geometry.choose(better, state.point, state.best),
            best_loss=torch.where(better, query.loss, state.best_loss),
            adversarial=state.adversarial | success,
            steps_survived=state.steps_survived + (~success & (state.steps_survived == state.iteration)),
            evaluations=state.evaluations + query.cost,
            highest_point=geometry.choose(higher, state.point, state.highest_point),
            highest_gradient=geometry.choose(higher, query.gradient, state.highest_gradient),
            highest_loss=torch.where(higher, query.loss, state.highest_loss),
        )

    def _adapt_step_size(self, state: APGDState, plan: _Plan, loss: Tensor) -> tuple[APGDState, Tensor]:
        """linf and l2: at checkpoints halve the step size of rows that oscillate or stall; these restart, (B,) bool."""
        rises = state.rises + (loss > state.last_loss)
        checkpoint = plan.interval > 0
        stalled = ~state.halved & (state.highest_loss <= state.checkpoint_loss)
        halve = checkpoint & ((rises <= self.rho * plan.interval) | stalled)
        state = replace(
            state,
            step_size=torch.where(halve, state.step_size / 2, state.step_size),
            last_loss=loss,
            rises=torch.where(checkpoint, 0, rises),
            checkpoint_loss=torch.where(checkpoint, state.highest_loss, state.checkpoint_loss),
            halved=torch.where(checkpoint, halve, state.halved),
        )
        return state, halve

    def _adapt_sparsity(self, inputs: AttackInputs, state: APGDState, plan: _Plan) -> tuple[APGDState, Tensor]:
        """l1: at checkpoints follow the sparsity of the highest point; rows that became sparser restart, (B,) bool."""
        if self.large_eps:
            # Each radius is a search of its own, which begins where the one before has ended.
            support = _support(state.point, inputs)
            state = replace(
                state,
                step_size=torch.where(plan.opening, 1, state.step_size),
                support=torch.where(plan.opening, support, state.support),
                active=torch.where(plan.opening, _two_thirds(support), state.active),
            )
        checkpoint = plan.interval > 0
        support = _support(state.highest_point, inputs)
        # Equal steps in two entries may keep two for ever where one is best: every other time, one moves alone.
        active = torch.where((support == 2) & (state.active == 2), 1, _two_thirds(support))
        sparser = checkpoint & (support < _SPARSER * state.support)
        size = torch.where(sparser, 1, (state.step_size / _SHORTER).clamp_min(_SHORTEST))
        state = replace(
            state,
            step_size=torch.where(checkpoint, size, state.step_size),
            support=torch.where(checkpoint, support, state.support),
            active=torch.where(checkpoint, active, state.active),
        )
        return state, sparser

    def _step(self, inputs: AttackInputs, state: APGDState, plan: _Plan, origin: Tensor, gradient: Tensor) -> Tensor:
        """The next point, (B, ...): a step from `origin`, with momentum in linf and l2."""
        x, wide = inputs.x, inputs.eps.dtype
        base, here = x.to(wide), origin.to(wide)
        length = geometry.column(state.step_size * inputs.eps * plan.factor, x)
        if self.norm == "l1":
            delta = (here - base) + length * _sparse(gradient, state.active)
            if self.large_eps:
                delta = torch.where(geometry.column(plan.closing, x), state.highest_point.to(wide) - base, delta)
            return geometry.place(x, delta, inputs.eps * plan.next_factor, self.norm, self.box)
        stepped = state.projected(inputs, here, geometry.steepest(gradient, self.norm) * length, self.norm, self.box)
        # The first step has no momentum.
        momentum = geometry.column(torch.where(plan.opening, 0, _MOMENTUM).to(wide), x)
        step = torch.lerp(stepped - here, here - state.origin.to(wide), momentum)
        return state.projected(inputs, origin, step, self.norm, self.box)


def _support(point: Tensor, inputs: AttackInputs) -> Tensor:
    """(B,) int64, in how many entries a point differs from the input by more than rounding."""
    away = (point.to(inputs.eps.dtype) - inputs.x).abs()
    return (away > geometry.column(_ROUNDING * inputs.eps, point)).flatten(1).sum(1)


def _two_thirds(support: Tensor) -> Tensor:
    """(B,) int64, two thirds of the support, rounded up: the next optimum is sought among fewer entries."""
    return -torch.div(-2 * support, 3, rounding_mode="floor")


def _sparse(gradient: Tensor, active: Tensor) -> Tensor:
    """The signs of the `active` (B,) largest entries, as a step of unit l1 norm; zero where the gradient is zero."""
    flat = gradient.flatten(1)
    size = flat.abs()
    rank = (active.clamp(1, flat.shape[1]) - 1)[:, None]
    least = size.sort(dim=1, descending=True).values.gather(1, rank)
    signs = flat.sign().masked_fill(size < least, 0)
    return (signs / signs.abs().sum(1, keepdim=True).clamp_min(1)).view_as(gradient)


# ---- the schedule ---------------------------------------------------------------------------------------------------


def checkpoints(steps: int) -> dict[int, int]:
    """After which iterations linf and l2 look back, and over how many steps.

    Of 100 steps: 22, 41, 57, 70, 80, 87, 93, 99. Intervals shrink by 3 % of the steps, from 22 % to 6 %.
    """
    shrink, least = max(3 * steps // 100, 1), max(6 * steps // 100, 1)
    interval = max(22 * steps // 100, 1)
    found, iteration = {}, interval
    while iteration <= steps:
        found[iteration] = interval
        interval = max(interval - shrink, least)
        iteration += interval
    return found


def l1_checkpoints(steps: int) -> dict[int, int]:
    """After which iterations l1 looks back: every 4 % of the steps."""
    interval = max(4 * steps // 100, 1)
    return dict.fromkeys(range(interval, steps + 1, interval), interval)


def stages(steps: int) -> list[tuple[int, int]]:
    """The schedule of larger radii: (radius in units of eps, steps) each."""
    part = -(-3 * steps // 10)
    second = min(part, steps - part)
    return [(3, part), (2, second), (1, steps - part - second)]


@dataclass(frozen=True)
class _Plan:
    """What each iteration is for; the first axis is the iteration, or the row that is at it.

    Attributes:
        factor: the radius in units of eps.
        next_factor: that of the point to ask about next.
        interval: steps since the last checkpoint at a checkpoint, 0 elsewhere.
        opening: bool, whether a search begins here.
        closing: bool, whether another radius comes next.
    """

    factor: Tensor
    next_factor: Tensor
    interval: Tensor
    opening: Tensor
    closing: Tensor

    def at(self, iteration: Tensor) -> _Plan:
        """The rows' own, (B,) each."""
        parts = (self.factor, self.next_factor, self.interval, self.opening, self.closing)
        return _Plan(*(part[iteration] for part in parts))


@cache
def _plan(steps: int, l1: bool, large_eps: bool, device: torch.device) -> _Plan:
    """The plan of all iterations, (num_steps,) each; cached, so that a step copies nothing to the device."""
    factor, interval, opening = [], [], []
    for scale, length in stages(steps) if large_eps else [(1, steps)]:
        found = l1_checkpoints(length) if l1 else checkpoints(length)
        for iteration in range(length + 1):
            factor.append(scale)
            interval.append(found.get(iteration, 0))
            opening.append(iteration == 0)

    def tensor(values: list[int] | list[bool]) -> Tensor:
        return torch.tensor(values, device=device)

    closing = [*opening[1:], False]
    return _Plan(tensor(factor), tensor([*factor[1:], 1]), tensor(interval), tensor(opening), tensor(closing))
