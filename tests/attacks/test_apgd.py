"""APGD: its schedule, its decisions on losses made by hand, known maxima, and what the authors' code reaches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attack_oracles import Counting, linear, network, predicted
from torch import Tensor, nn

from wideberth import geometry, losses
from wideberth.attacks.apgd import APGD, APGDState, checkpoints, l1_checkpoints, stages
from wideberth.attacks.drivers import run_steps
from wideberth.attacks.pgd import PGD
from wideberth.attacks.state import AttackInputs
from wideberth.checks import InputError, Norm
from wideberth.losses import Loss
from wideberth.randomness import Noise

WIDE = (-100.0, 100.0)
DUAL: dict[Norm, float] = {"linf": 1, "l2": 2, "l1": math.inf}
each_norm = pytest.mark.parametrize("norm", list(DUAL))


def inputs_of(x: Tensor, y: Tensor, eps: float | Tensor, target: Tensor | None = None) -> AttackInputs:
    return AttackInputs(x, y, geometry.per_sample(eps, x), Noise(torch.arange(len(x))), target, target_only=False)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (100, [22, 41, 57, 70, 80, 87, 93, 99]),
        (50, [11, 21, 30, 38, 45]),
        (40, [8, 15, 21, 26, 30, 33, 35, 37, 39]),
        (30, [6, 11, 15, 18, 20, *range(21, 31)]),
        (20, [4, 7, 9, *range(10, 21)]),
        (1, [1]),
    ],
)
def test_checkpoints_are_the_published_ones(steps: int, expected: list[int]) -> None:
    found = checkpoints(steps)
    assert list(found) == expected
    assert list(found.values()) == [b - a for a, b in zip([0, *expected], expected, strict=False)]


def test_l1_checks_every_four_percent_and_larger_radii_share_the_steps() -> None:
    assert list(l1_checkpoints(100)) == list(range(4, 101, 4))
    assert list(l1_checkpoints(30)) == list(range(1, 31))
    assert stages(100) == [(3, 30), (2, 30), (1, 40)]
    assert stages(25) == [(3, 8), (2, 8), (1, 9)]
    for steps in range(1, 30):
        assert sum(length for _, length in stages(steps)) == steps
        assert min(length for _, length in stages(steps)) >= 0


# ---- decisions on losses made by hand -------------------------------------------------------------------------------


class Scripted(nn.Module):
    """Whatever it is asked, the loss at iteration t is `script[:, t]`; it always seems to rise along the first axis."""

    def __init__(self, script: Tensor) -> None:
        super().__init__()
        self.script, self.asked = script, 0

    def forward(self, x: Tensor) -> Tensor:
        slope = x.sum(1)
        loss = self.script[:, self.asked] + slope - slope.detach()
        self.asked += 1
        return torch.stack([loss, torch.full_like(loss, 1e9)], dim=1)  # far from a mistake


def first_logit(logits: Tensor, y: Tensor) -> Tensor:
    return logits[:, 0]


def sizes(script: list[list[float]], steps: int = 100) -> tuple[Tensor, list[APGDState]]:
    """Step sizes (rows, iterations) after each look at a loss of the script, and all states."""
    losses_seen = torch.tensor(script, dtype=torch.float64)
    assert losses_seen.shape[1] == steps + 1
    x = torch.zeros(len(script), 2, dtype=torch.float64)
    inputs = inputs_of(x, torch.ones(len(script), dtype=torch.int64), 1.0)
    attack, model = APGD(box=WIDE, steps=steps, loss=first_logit), Scripted(losses_seen)
    states = [attack.init(inputs)]
    for _ in range(attack.num_steps):
        states.append(attack.update(model, inputs, states[-1]))
    return torch.stack([state.step_size for state in states[1:]], dim=1), states


def halvings(size: Tensor) -> list[list[int]]:
    """At which iterations each row halved its step."""
    begun = torch.full_like(size[:, :1], 2)
    before = torch.cat([begun, size[:, :-1]], dim=1)
    assert torch.equal(size, torch.where(size < before, before / 2, before))
    return [(row < was).nonzero().squeeze(1).tolist() for row, was in zip(size, before, strict=True)]


def up_then_down(rises: int, falls: int, begin: float = 0.0) -> list[float]:
    up = [begin + t for t in range(1, rises + 1)]
    return up + [begin + rises - t for t in range(1, falls + 1)]


def test_a_loss_that_rises_keeps_the_step_and_one_that_falls_halves_it_at_every_checkpoint() -> None:
    up = [float(t) for t in range(101)]
    size, _ = sizes([up, [-v for v in up]])
    assert halvings(size) == [[], list(checkpoints(100))]


def test_a_step_is_halved_where_three_quarters_of_the_interval_did_not_rise() -> None:
    """Of the first 22 losses 16 rise (16.5 are three quarters), or 17; later, all do."""
    later = [1000.0 + t for t in range(78)]
    size, _ = sizes([[0.0, *up_then_down(16, 6), *later], [0.0, *up_then_down(17, 5), *later]])
    assert halvings(size) == [[22], []]


def test_the_first_loss_counts_as_a_rise_only_if_it_rose() -> None:
    """16 rises after a fall from the start; the published code would count a 17th, because the loss is positive."""
    later = [1000.0 + t for t in range(78)]
    size, _ = sizes([[10.0, 5.0, *up_then_down(16, 5, begin=5.0), *later]])
    assert halvings(size) == [[22]]


def test_a_step_is_halved_where_the_best_loss_stands_still_but_not_twice_in_a_row() -> None:
    """After a deep fall nearly every loss rises, without coming back to the best; not looked at in the first check."""
    fallen = [-1000.0 + t for t in range(78)]
    best_at_22 = [float(t) for t in range(23)] + fallen
    best_at_start = [1000.0, *[float(t) for t in range(100)]]
    size, _ = sizes([best_at_22, best_at_start])
    assert halvings(size) == [[41, 70, 87, 99]] * 2


def test_a_halved_row_goes_back_to_its_best_point_and_the_gradient_there() -> None:
    fall, rise = [-float(t) for t in range(101)], [float(t) for t in range(101)]
    size, states = sizes([fall, rise])
    assert size[:, 22].tolist() == [1, 2]
    before, after = states[22], states[23]
    assert torch.equal(after.origin[0], states[0].point[0])
    assert not torch.equal(after.origin[0], before.point[0])
    assert torch.equal(after.origin[1], before.point[1])
    # From there: a full step up the gradient, then three quarters of it and a quarter of the (backward) move.
    start, last = states[0].point[0], before.origin[0]
    stepped = (start + 1.0).clamp(-1, 1)
    expected = (start + 0.75 * (stepped - start) + 0.25 * (start - last)).clamp(-1, 1)
    torch.testing.assert_close(after.point[0], expected)


def slopes(eps: Tensor) -> tuple[nn.Module, AttackInputs]:
    """Ten slopes, the last the steepest, and one row at zero for each radius; far from a mistake."""
    x = torch.zeros(len(eps), 10, dtype=eps.dtype)
    steep = torch.linspace(1, 2, 10, dtype=eps.dtype)
    model = linear(torch.stack([steep * 0, steep]), torch.tensor([100.0, 0.0]))
    return model, inputs_of(x, torch.zeros(len(eps), dtype=torch.int64), eps)


def test_l1_follows_the_sparsity_of_the_best_point() -> None:
    """A fifth of the entries moves at first, then two thirds of those that the best point moved."""
    model, inputs = slopes(torch.tensor([0.3], dtype=torch.float64))
    attack = APGD(norm="l1", steps=100)
    state = attack.init(inputs)
    assert state.active.tolist() == [2]
    for iteration in range(101):
        old, state = state, attack.update(model, inputs, state)
        if iteration in l1_checkpoints(100):
            support = int(((state.highest_point - inputs.x).abs() > 1e-9).sum())
            sparser = support < 0.95 * int(old.support)
            assert state.support.tolist() == [support]
            stuck = support == old.active.item() == 2
            assert state.active.tolist() == [1 if stuck else math.ceil(2 * support / 3)]
            expected = 1.0 if sparser else max(float(old.step_size) / 1.5, 0.1)
            assert state.step_size.item() == pytest.approx(expected)
            if sparser:
                assert torch.equal(state.origin, state.highest_point)
        else:
            assert torch.equal(state.step_size, old.step_size)
            assert torch.equal(state.active, old.active)
    assert (int(state.support), state.step_size.item()) == (1, pytest.approx(0.1))


def test_l1_entries_that_came_back_but_for_rounding_do_not_count() -> None:
    """Of ten entries three were moved, and of seven a projection left 1e-8 in float32."""
    model, inputs = slopes(torch.tensor([0.3]))
    attack = APGD(norm="l1", steps=30)
    best = torch.tensor([[0.1] * 3 + [1e-8] * 7])
    begun = attack.update(model, inputs, attack.init(inputs))
    state = attack.update(model, inputs, replace(begun, highest_point=best, highest_loss=torch.tensor([math.inf])))
    assert state.iteration.tolist() == [2]  # the first checkpoint is behind it
    assert (state.support.tolist(), state.active.tolist()) == ([3], [2])


def test_l1_where_two_are_left_one_moves_every_other_time() -> None:
    model, inputs = slopes(torch.tensor([0.3]))
    attack = APGD(norm="l1", steps=30)
    best = torch.tensor([[0.1, 0.1] + [0.0] * 8])
    state, active = attack.update(model, inputs, attack.init(inputs)), []
    for _ in range(4):
        still = replace(state, highest_point=best, highest_loss=torch.tensor([math.inf]))
        state = attack.update(model, inputs, still)
        active += state.active.tolist()
    assert active == [1, 2, 1, 2]


# ---- what is found --------------------------------------------------------------------------------------------------


def wave(*shape: int, pace: float) -> Tensor:
    count = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return torch.sin(pace * count).view(shape)


def wavy(x: Tensor) -> Tensor:
    """Five logits of any number of entries."""
    return 2 * torch.tanh(2 * (x - 0.5) @ wave(16, x.shape[1], pace=1.7).T) @ wave(5, 16, pace=2.3).T


class Wavy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return wavy(x)


def wavy_problem(entries: int, eps: float, aimed: bool) -> AttackInputs:
    """Four rows at a fixed place; `aimed` at the second likeliest class."""
    x = 0.5 + 0.5 * wave(4, entries, pace=0.9)
    y = wavy(x).argmax(1)
    return inputs_of(x, y, eps, losses.likeliest(wavy(x), y)[:, 1] if aimed else None)


def from_start(attack: APGD, inputs: AttackInputs) -> list[APGDState]:
    """The states of a run from a point on the boundary that is known to the last digit."""
    order = {"linf": math.inf, "l2": 2, "l1": 1}[attack.norm]
    direction = wave(*inputs.x.shape, pace=3.1)
    radius = (3 if attack.large_eps else 1) * inputs.eps[:, None]
    start = (inputs.x + radius * direction / direction.norm(p=order, dim=1, keepdim=True)).clamp(0, 1)
    states = [replace(attack.init(inputs), point=start, origin=start)]
    for _ in range(attack.num_steps):
        states.append(attack.update(Wavy(), inputs, states[-1]))
    return states


PUBLISHED: list[tuple[Norm, Loss, bool, bool, list[float]]] = [
    ("linf", losses.cross_entropy, False, False, [1.5543607009, 1.0094590223, 1.5984999247, 1.3009693797]),
    ("linf", losses.dlr_loss, False, False, [0.5000675638, -0.4689147487, 1.0, 0.1027400685]),
    ("l2", losses.cross_entropy, False, False, [1.6937276018, 1.1938508107, 1.8218581838, 1.4515969345]),
    ("l2", losses.dlr_loss, False, False, [1.0, -0.2906651637, 1.0, 0.1937404668]),
    ("l1", losses.cross_entropy, False, False, [3.7807999261, 4.2057207404, 3.1011561589, 3.6617232719]),
    ("l1", losses.cross_entropy, False, True, [3.7720911299, 4.1746057082, 2.7527941614, 3.5371915707]),
    ("l1", losses.dlr_loss, True, False, [0.5727154928, 1.2411459514, 2.2291242193, -0.0137680754]),
    ("l1", losses.dlr_loss, True, True, [-0.3266101222, 1.2343919693, 0.9322347526, 0.849722346]),
]
RADIUS: dict[Norm, float] = {"linf": 0.05, "l2": 0.2, "l1": 2.0}


@pytest.mark.parametrize(("norm", "loss", "aimed", "large_eps", "expected"), PUBLISHED)
def test_twenty_steps_reach_what_the_published_code_reaches(
    norm: Norm, loss: Loss, aimed: bool, large_eps: bool, expected: list[float]
) -> None:
    """Best losses of the authors' implementation, run in float64 (its projection too) from the same start."""
    attack = APGD(norm=norm, steps=20, loss=loss, large_eps=large_eps)
    state = from_start(attack, wavy_problem(12, RADIUS[norm], aimed))[-1]
    torch.testing.assert_close(state.highest_loss, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def nearest(x: Tensor, delta: Tensor, eps: float) -> Tensor:
    """The point of l1 ball and box nearest to x + delta, (d,): shrink all entries alike, found by bisection."""
    size, room = delta.abs(), torch.where(delta > 0, 1 - x, x)
    low, high = 0.0, float(size.max())
    for _ in range(100):
        middle = (low + high) / 2
        fits = torch.minimum((size - middle).clamp_min(0), room).sum() <= eps
        low, high = (low, middle) if fits else (middle, high)
    return x + delta.sign() * torch.minimum((size - high).clamp_min(0), room)


def l1_search(
    ask: Callable[[Tensor], tuple[float, Tensor]], x: Tensor, start: Tensor, eps: float, steps: int, fresh: bool
) -> tuple[list[Tensor], Tensor]:
    """The points that one search of the paper asks about, and the best of them; one row, (d,)."""

    def perturbed(point: Tensor) -> int:
        return int(((point - x).abs() > 1e-9).sum())

    point, points, size = start, [start], eps
    value, gradient = ask(point)
    best, top, best_gradient = point, value, gradient
    support = len(x) if fresh else perturbed(point)
    count = math.ceil(len(x) / 5) if fresh else math.ceil(2 * support / 3)
    for done in range(1, steps + 1):
        least = gradient.abs().sort(descending=True).values[count - 1]
        signs = gradient.sign() * (gradient.abs() >= least)
        point = nearest(x, point - x + size * signs / signs.abs().sum(), eps)
        points.append(point)
        value, gradient = ask(point)
        if value > top:
            best, top, best_gradient = point, value, gradient
        if done % max(4 * steps // 100, 1):
            continue
        before, support = support, perturbed(best)
        assert support > 2, "two is where we do otherwise"
        count = math.ceil(2 * support / 3)
        if support < 0.95 * before:
            point, gradient, size = best, best_gradient, eps
        else:
            size = max(size / 1.5, eps / 10)
    return points, best


@pytest.mark.parametrize("large_eps", [False, True])
@pytest.mark.parametrize("aimed", [False, True])
def test_l1_asks_about_the_points_of_the_paper(aimed: bool, large_eps: bool) -> None:
    """Step by step, each row by itself."""
    inputs = wavy_problem(48, 2.0, aimed)
    loss = losses.dlr_loss if aimed else losses.cross_entropy
    states = from_start(APGD(norm="l1", steps=50, loss=loss, large_eps=large_eps), inputs)
    for row in range(4):
        alone = inputs.rows(torch.tensor([row]))
        ascended = alone.attack_loss(loss)

        def ask(point: Tensor, ascended: Callable[[Tensor], Tensor] = ascended) -> tuple[float, Tensor]:
            asked = point[None].requires_grad_()
            value = ascended(wavy(asked))
            return value.item(), torch.autograd.grad(value.sum(), asked)[0][0]

        x, best, points = alone.x[0], states[0].point[row], list[Tensor]()
        for factor, steps in [(3, 15), (2, 15), (1, 20)] if large_eps else [(1, 50)]:
            start = nearest(x, best - x, 2.0 * factor)
            asked, best = l1_search(ask, x, start, 2.0 * factor, steps, fresh=not large_eps)
            points += asked
        ours = torch.stack([state.point[row] for state in states[:-1]])
        torch.testing.assert_close(ours, torch.stack(points), rtol=0, atol=1e-9)
        torch.testing.assert_close(states[-1].highest_point[row], best, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("norm", "large_eps"), [("linf", False), ("l2", False), ("l1", False), ("l1", True)])
def test_reaches_the_worst_loss_of_the_ball(norm: Norm, large_eps: bool) -> None:
    """Two classes: the margin falls by eps times the dual norm of the weights' difference, and no further."""
    weight, x, y = drawn(2, 7), drawn(9, 7, seed=1), torch.arange(9) % 2
    eps = torch.linspace(0.1, 2, 9, dtype=torch.float64)
    model = linear(weight, torch.tensor([0.3, -0.2]))
    attack = APGD(norm=norm, box=WIDE, large_eps=large_eps)
    inputs = inputs_of(x, y, eps)
    state = run_steps(attack, model, inputs)
    worst = losses.logit_margin(predicted(model, x), y) - eps * (weight[0] - weight[1]).norm(p=DUAL[norm])
    torch.testing.assert_close(losses.logit_margin(predicted(model, state.highest_point), y), worst, rtol=0, atol=1e-6)
    assert torch.equal(state.adversarial, worst <= 0)
    held = worst > 0
    assert 0 < held.sum() < 9
    assert torch.equal(state.best[held], state.highest_point[held])


def test_reaches_the_worst_corner_of_ball_and_box() -> None:
    """In linf ball and box are one box."""
    weight, y = drawn(2, 7), torch.arange(9) % 2
    x = torch.rand(9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    corner = (x + 0.4 * (weight[1 - y] - weight[y]).sign()).clamp(0, 1)
    state = run_steps(APGD(), linear(weight), inputs_of(x, y, 0.4))
    torch.testing.assert_close(state.highest_point, corner, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
@each_norm
def test_is_at_least_as_strong_as_as_many_steps_of_pgd(norm: Norm, seed: int) -> None:
    model = network(features=12, classes=5, seed=seed).eval()
    x = torch.rand(40, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y, eps = predicted(model, x).argmax(1), {"linf": 0.1, "l2": 0.25, "l1": 0.5}[norm]
    theirs = PGD(norm=norm, steps=100, keep="worst")(model, x, y, eps=eps)
    state = run_steps(APGD(norm=norm), model, inputs_of(x, y, eps))
    assert theirs.success is not None
    assert 0 < theirs.success.sum() < 40
    assert state.adversarial.sum() >= theirs.success.sum()
    at_theirs = losses.cross_entropy(predicted(model, theirs.x), y)
    held = ~theirs.success
    assert state.highest_loss[held].mean() >= at_theirs[held].mean() - 1e-9


def test_keeps_the_first_mistake_even_if_a_later_one_is_worse() -> None:
    """On a line that is crossed early, later points have a higher loss; a row that was broken stays as it was."""
    model = linear(torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64), torch.tensor([0.2, 0.0]))
    inputs = inputs_of(torch.zeros(6, 2, dtype=torch.float64), torch.zeros(6, dtype=torch.int64), 1.0)
    attack = APGD(norm="l2", box=WIDE, steps=10)
    state, first = attack.init(inputs), torch.full((6, 2), math.nan, dtype=torch.float64)
    for _ in range(attack.num_steps):
        new = losses.misclassified(predicted(model, state.point), inputs.y) & ~state.adversarial
        first = torch.where(new[:, None], state.point, first)
        state = attack.update(model, inputs, state)
    assert state.adversarial.all()
    assert torch.equal(state.best, first)
    assert (state.highest_loss >= state.best_loss).all()
    assert (state.highest_loss > state.best_loss).any()


def test_larger_radii_count_a_mistake_only_within_the_radius() -> None:
    """Beyond 0.5 all is class 1: out of reach at 0.4, though 3 eps goes there; at 0.6 within reach."""
    model = linear(torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64), torch.tensor([0.5, 0.0]))
    inputs = inputs_of(torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), 1.0)
    inputs = replace(inputs, eps=torch.tensor([0.4, 0.6], dtype=torch.float64))
    attack = APGD(norm="l1", box=WIDE, steps=20, large_eps=True)
    state, reached = attack.init(inputs), torch.zeros(2, dtype=torch.float64)
    for _ in range(attack.num_steps):
        reached = torch.maximum(reached, state.point.abs().sum(1) / inputs.eps)
        state = attack.update(model, inputs, state)
        assert (state.best.abs().sum(1) <= inputs.eps * (1 + 1e-9)).all()
    assert (reached > 2.9).all()
    assert state.adversarial.tolist() == [False, True]


# ---- the contract ---------------------------------------------------------------------------------------------------


def test_starts_on_the_boundary() -> None:
    x = torch.zeros(50, 3, 4, dtype=torch.float64)
    eps = torch.linspace(0.1, 3, 50, dtype=torch.float64)
    inputs = inputs_of(x, torch.zeros(50, dtype=torch.int64), eps)
    for norm in DUAL:
        attack = APGD(norm=norm, box=WIDE)
        torch.testing.assert_close(geometry.norm(attack.init(inputs).point, norm), eps)
    large = APGD(norm="l1", box=WIDE, large_eps=True).init(inputs)
    torch.testing.assert_close(geometry.norm(large.point, "l1")[:20], 3 * eps[:20])
    assert torch.equal(large.best, x)


@each_norm
def test_rows_at_different_iterations_do_what_they_do_alone(norm: Norm) -> None:
    """As an evaluation does: rows join a batch that is under way, and leave it."""
    model = network().eval()
    x = torch.rand(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = inputs_of(x, predicted(model, x).argmax(1), 0.2)
    attack = APGD(norm=norm, steps=12, large_eps=norm == "l1")
    alone = run_steps(attack, model, inputs)
    early, late = inputs.rows(torch.arange(3)), inputs.rows(torch.arange(3, 6))
    state = attack.init(early)
    for _ in range(5):
        state = attack.update(model, early, state)
    together, both = state.joined(attack.init(late)), early.joined(late)
    for _ in range(attack.num_steps - 5):
        together = attack.update(model, both, together)
    late_state = together.rows(torch.arange(3, 6))
    for _ in range(5):
        late_state = attack.update(model, late, late_state)
    for name in (
        "best",
        "best_loss",
        "adversarial",
        "steps_survived",
        "highest_point",
        "highest_loss",
        "iteration",
        "evaluations",
    ):
        found = torch.cat([getattr(together, name)[:3], getattr(late_state, name)])
        torch.testing.assert_close(found, getattr(alone, name), rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize(("large_eps", "looks"), [(False, 13), (True, 15)])
def test_spends_a_forward_and_a_gradient_per_look_and_draw(large_eps: bool, looks: int) -> None:
    model = Counting(network().eval())
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    attack = APGD(norm="l1", steps=12, draws=3, large_eps=large_eps)
    state = run_steps(attack, model, inputs_of(x, predicted(model.inner, x).argmax(1), 0.1))
    assert attack.num_steps == looks
    assert model.forwards == model.backwards == 4 * looks * 3
    assert state.evaluations.tolist() == [2 * looks * 3] * 4


def test_every_target_is_tried_in_turn_until_one_is_reached() -> None:
    """The second likeliest class is near by weight, but only the third can be reached: APGD-T finds it."""
    weight = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    model = linear(weight, torch.tensor([1.0, 0.9, 0.0, -5.0]))
    x, y = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0])
    attack = APGD(box=WIDE, steps=10, loss=losses.dlr_loss, targets=2)
    found = attack(model, x, y, eps=0.4)
    assert found.success is not None
    assert found.success.tolist() == [True]
    assert predicted(model, found.x).argmax(1).tolist() == [2]
    once = replace(attack, targets=1)(model, x, y, eps=0.2)
    assert once.success is not None
    assert once.success.tolist() == [False]


class Holes(nn.Module):
    """NaN logits wherever the first entry is positive."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([1 - x[:, 0], x[:, 0] / (x[:, 0] <= 0).to(x.dtype)], dim=1)


@each_norm
def test_logits_that_are_no_numbers_leave_the_points_alone(norm: Norm) -> None:
    x = torch.zeros(8, 3, dtype=torch.float64)
    inputs = inputs_of(x, torch.zeros(8, dtype=torch.int64), 0.5)
    state = run_steps(APGD(norm=norm, box=(-1.0, 1.0), steps=20), Holes(), inputs)
    for point in (state.best, state.point, state.highest_point):
        assert point.isfinite().all()
        assert (geometry.norm(point, norm) <= 0.5 + 1e-9).all()


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"draws": 0}, {"rho": -0.1}, {"rho": 1.1}, {"large_eps": True}, {"large_eps": True, "norm": "l2"}],
)
def test_refuses_what_makes_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        APGD(**options)  # type: ignore[arg-type]
