"""Square: where its windows lie and how large they are, what fills them, and what it finds without a gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attack_oracles import linear, predicted, schedule_of
from torch import Tensor, nn

from wideberth import geometry, losses
from wideberth.attacks import PGD, AttackInputs, Square, square_candidates
from wideberth.attacks import square_windows as windows
from wideberth.attacks.square_candidates import move_mass, projected_l1
from wideberth.attacks.state import AttackState, ProjectedState
from wideberth.checks import Box, InputError, Norm
from wideberth.randomness import Noise

WIDE = (-100.0, 100.0)
DUAL: dict[Norm, float] = {"linf": 1, "l2": 2, "l1": float("inf")}
ORDER: dict[Norm, float] = {"linf": float("inf"), "l2": 2, "l1": 1}
each_norm = pytest.mark.parametrize("norm", list(DUAL))
each_shape = pytest.mark.parametrize("shape", [(9,), (2, 9), (1, 1, 9), (3, 8, 8), (2, 5, 12), (2, 2, 6, 7)], ids=str)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(x: Tensor, y: Tensor, eps: float | Tensor, seed: int = 0) -> AttackInputs:
    return AttackInputs(x, y, geometry.per_sample(eps, x), Noise(torch.arange(len(x)), seed))


def indifferent(features: int) -> nn.Module:
    """The same logits everywhere, label 0 ahead: nothing is ever accepted after the first point."""
    return linear(torch.zeros(2, features, dtype=torch.float64), torch.tensor([1.0, 0.0]))


def begun(attack: Square, shape: tuple[int, ...], batch: int = 8, eps: float = 0.1) -> tuple[AttackInputs, AttackState]:
    x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    given = problem(x, torch.zeros(batch, dtype=torch.int64), eps)
    return given, attack.init(given)


def extent(changed: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns between the first and the last that holds a change, each (B,)."""

    def span(axis: Tensor) -> Tensor:
        place = torch.arange(axis.shape[1])
        last = torch.where(axis, place, -1).amax(1)
        return last - torch.where(axis, place, axis.shape[1]).amin(1) + 1

    return span(changed.any(1).any(2)), span(changed.any(1).any(1))


# ---- windows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rescaled", "expected"),
    [
        (False, {0: 29, 10: 29, 11: 20, 50: 20, 51: 14, 201: 10, 501: 7, 1001: 5, 2001: 4, 4001: 3, 4999: 3}),
        (True, {0: 29, 501: 5, 1001: 4, 2001: 3, 4001: 1, 4999: 1}),
    ],
    ids=["not rescaled", "rescaled"],
)
def test_candidates_differ_from_the_incumbent_in_squares_of_the_published_sides(
    rescaled: bool, expected: dict[int, int]
) -> None:
    """Stripes hold both signs, so that a window shows in all its rows; each row is at its own iteration."""
    attack = Square(rescaled=rescaled)
    given, state = begun(attack, (1, 32, 32), batch=len(expected))
    state = replace(state, queries=torch.tensor(list(expected))[:, None], age=1000)
    state = attack.update(indifferent(1024), given, state)
    rows, columns = extent(state.point != state.best)
    side = torch.tensor(list(expected.values()))
    assert torch.equal(rows, side)
    assert (columns <= side).all()


def test_windows_of_vectors_and_oblong_images_cover_the_fraction() -> None:
    for norm in ("linf", "l2", "l1"):
        assert [windows.sides(p, 1, 10, norm) for p in (0.8, 0.4, 0.1, 0.01)] == [(1, 8), (1, 4), (1, 1), (1, 1)]
        assert windows.sides(0.8, 1, 2, norm) == (1, 2)
        assert windows.sides(1, 10, 1, norm) == (10, 1)
        assert windows.sides(0.5, 4, 100, norm) == (4, 50)
        assert windows.sides(0.5, 100, 4, norm) == (50, 4)
        assert windows.sides(1, 2, 3, norm)[0] == 2
    # Odd and at least 3, so that a bump has a middle; smaller only where the image is.
    assert [windows.sides(p, 32, 32, "l2") for p in (0.4, 0.05, 0.001)] == [(21, 21), (7, 7), (3, 3)]
    assert windows.sides(0.001, 2, 9, "l1") == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_position_is_drawn_and_as_often(dtype: torch.dtype) -> None:
    plan = windows.plan(0.4, 7, 9, "linf", dtype, torch.device("cpu"))
    where = Noise(torch.arange(20_000)).uniform((2,), dtype)
    where[0], where[1] = 0, 1 - torch.finfo(dtype).eps / 2  # the largest number that is drawn
    window = plan.draw(torch.zeros(len(where), dtype=torch.int64), where, 7, 9)
    side = int(window.rows[0])
    for first, length in ((window.top, 7), (window.left, 9)):
        share = first.bincount(minlength=length - side + 1) / len(where)
        torch.testing.assert_close(share, torch.full((length - side + 1,), 1 / (length - side + 1)), rtol=0.1, atol=0)


@each_norm
@each_shape
def test_every_channel_may_change_but_only_inside_the_windows(norm: Norm, shape: tuple[int, ...]) -> None:
    """linf leaves everything outside one window; l2 and l1 empty a second one, and may rescale the rest."""
    attack = Square(norm=norm, queries=60, rescaled=True, parallel_queries=1)
    given, state = begun(attack, shape, batch=24, eps=0.2)
    model, seen = indifferent(given.x[0].numel()), torch.zeros_like(given.x, dtype=torch.bool)
    for iteration in range(40):
        state = attack.update(model, given, state)
        changed = windows.image(state.point != state.best)
        if norm == "linf":
            height, width = changed.shape[2:]
            most = windows.sides(0.8 / 2 ** int(stage_of(iteration, 60)), height, width, norm)
            rows, columns = extent(changed)
            assert (rows <= most[0]).all()
            assert (columns <= most[1]).all()
        seen |= state.point != state.best
    assert seen.any(0).all()


def stage_of(iteration: int, queries: int) -> Tensor:
    plan = windows.plan(0.8, 4, 4, "linf", torch.float64, torch.device("cpu"))
    return plan.stage(torch.tensor([iteration * 10_000 // queries]))


# ---- what fills them ---------------------------------------------------------------------------------------------


@each_shape
def test_linf_points_are_corners_of_ball_and_box_and_no_query_is_wasted(shape: tuple[int, ...]) -> None:
    attack = Square(queries=50, rescaled=True, parallel_queries=2)
    given, state = begun(attack, shape)
    assert isinstance(state, ProjectedState)
    low, high = state.low[:, None], state.high[:, None]
    model = linear(drawn(2, given.x[0].numel()))
    for _ in range(25):
        assert ((state.points == low) | (state.points == high)).all()
        state = attack.update(model, given, state)
        assert (state.points != state.best[:, None]).flatten(2).any(2).all()
    torch.testing.assert_close(state.high, (given.x + 0.1).clamp(0, 1), rtol=0, atol=1e-15)
    torch.testing.assert_close(state.low, (given.x - 0.1).clamp(0, 1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("channels", [1, 3])
def test_queries_that_would_repeat_the_incumbent_count_without_being_asked(channels: int) -> None:
    """And no others: a window that is turned over for it was all at one face in each channel, and all of it moves."""
    attack = Square(queries=600, parallel_queries=1)
    given, state = begun(attack, (channels, 12, 12), batch=32)
    assert isinstance(state, ProjectedState)
    model = indifferent(channels * 144)
    saved = 0
    while bool((state.iteration < attack.num_steps).any()):
        before = state
        state = attack.update(model, given, state)
        over = before.iteration >= attack.num_steps
        assert torch.equal(state.best[over], before.best[over])
        turned = state.iteration - before.iteration == 2
        saved += int(turned.sum())
        moved = (state.point != state.best)[turned]
        # A rectangle in every channel, and in every channel the same.
        down, across = moved.any(3, keepdim=True), moved.any(2, keepdim=True)
        assert torch.equal(moved, (down & across).expand_as(moved))
        assert torch.equal(moved, moved[:, :1].expand_as(moved))
        at_top = (state.best == state.high)[turned]
        assert ((at_top & moved).flatten(2).any(2) != (~at_top & moved).flatten(2).any(2)).all()
    assert saved > (100 if channels == 1 else 3)
    assert state.steps_survived.tolist() == [600] * 32


def test_small_windows_filled_entry_by_entry_and_whole_masks_lead_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose windows differ in size share a batch: half of them are 150 queries further."""
    attack, model, searches = Square(queries=400, rescaled=True, parallel_queries=1), linear(drawn(2, 432)), []
    for few in (0, 1 / 16, 1):  # none of them, those that are small, and all
        monkeypatch.setattr(square_candidates, "_SMALL_WINDOW", few)
        given, state = begun(attack, (3, 12, 12), batch=16)
        further = torch.arange(16) % 2 * 150
        state = replace(state, queries=further[:, None], **attack._drawn(given, further))
        points = []
        for _ in range(200):
            state = attack.update(model, given, state)
            points.append(state.point)
        searches.append((torch.stack(points), state.iteration))
    for points, iteration in searches[1:]:
        assert torch.equal(points, searches[0][0])
        assert torch.equal(iteration, searches[0][1])


def smooth(norm: Norm, shape: tuple[int, ...]) -> tuple[nn.Module, AttackInputs]:
    """24 samples, some of which can be broken. Where a rectifier is off, rounding would tell equal values apart."""
    given, _ = begun(Square(), shape, batch=24)
    eps = torch.linspace(0, {"linf": 0.3, "l2": 2.0, "l1": 10.0}[norm], 24, dtype=torch.float64)
    hidden = nn.Linear(given.x[0].numel(), 8, dtype=torch.float64)
    hidden.weight.data, hidden.bias.data = drawn(*hidden.weight.shape, seed=1), drawn(8, seed=2)
    model = nn.Sequential(nn.Flatten(), hidden, nn.Tanh(), linear(drawn(2, 8, seed=3))[-1])
    return model, replace(given, y=model(given.x).argmax(1), eps=eps)


def test_runs_side_by_side_cost_the_same_whoever_is_there() -> None:
    """Those that are cancelled have come as far as the one that broke the sample."""
    (model, given), costs = smooth("linf", (3, 12, 12)), []
    for batch_size in (3, 200):
        attack, cost = Square(queries=60, rescaled=True, restarts=3), torch.zeros(24, dtype=torch.int64)
        schedule = schedule_of(attack, model, given, batch_size=batch_size, parallel_restarts=3)
        while schedule.busy:
            for ended in schedule.step():
                cost.index_add_(0, ended.sample, schedule.confirm(ended, ~ended.state.adversarial))
        costs.append(cost)
    assert torch.equal(*costs)
    assert (costs[0] < costs[0].max()).any(), "some are broken early"


@each_norm
@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 9, 9), (7,)], ids=str)
@pytest.mark.parametrize("batch_size", [10, 60, 130])
def test_queries_at_once_find_what_they_find_one_after_the_other(
    norm: Norm, shape: tuple[int, ...], batch_size: int
) -> None:
    """Rows wait for their turn or not, the judge takes no first success, and what was asked in vain does not count."""
    (model, given), asked = smooth(norm, shape), []
    model.register_forward_hook(lambda *call: asked.append(len(call[-1])))
    searches = []
    for count in (1, 5):
        attack = Square(norm=norm, queries=150, rescaled=True, parallel_queries=count)
        schedule = schedule_of(attack, model, given, batch_size=batch_size)
        ends: dict[int, AttackState] = {}
        evaluations, refused = torch.zeros(24), torch.zeros(24, dtype=torch.bool)
        asked.clear()
        while schedule.busy:
            for ended in schedule.step():
                ends |= {row: ended.state.rows(torch.tensor([at])) for at, row in enumerate(ended.sample.tolist())}
                held = ~ended.state.adversarial | ~refused[ended.sample]
                refused[ended.sample] |= ended.state.adversarial
                evaluations[ended.sample] += schedule.confirm(ended, held)
        assert max(asked) <= 2 * batch_size
        searches.append((ends, evaluations, refused, len(asked)))
    (one, cost, again, often), (other, same, too, seldom) = searches
    for row in range(24):
        for name in ("best", "best_loss", "adversarial", "steps_survived", "iteration"):
            torch.testing.assert_close(getattr(one[row], name), getattr(other[row], name), rtol=1e-6, atol=1e-7)
    assert 0 < again.sum() < 24
    assert torch.equal(again, too)
    assert torch.equal(same, cost)
    assert seldom < often * 0.9


def test_a_call_asks_one_query_after_the_other() -> None:
    attack, model, asked = Square(queries=40, parallel_queries=4), linear(drawn(2, 48)), []
    given, _ = begun(attack, (3, 4, 4))
    model.register_forward_hook(lambda *call: asked.append(len(call[-1])))
    assert (attack(model, given.x, given.y, eps=0.02).evaluations == 40).all()
    assert asked == [1] + 40 * [8]


@pytest.mark.parametrize("count", [0, 33])
def test_too_many_queries_ahead_are_refused(count: int) -> None:
    with pytest.raises(InputError, match=f"parallel_queries={count}"):
        Square(parallel_queries=count)


def test_masks_reach_faces_far_out_in_half_precision() -> None:
    x = torch.tensor([[20_000.0, -20_000.0], [1.0, 0.0]], dtype=torch.float16)
    model = linear(torch.eye(2, dtype=torch.float16))
    attack = Square(queries=20, box=(-float("inf"), float("inf")))
    found = attack(model, x, torch.tensor([0, 0]), eps=1.0)
    assert torch.isfinite(found.x).all()
    assert found.success.tolist() == [False, True]


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_bumps_have_unit_norm_and_hills_of_opposite_sign(norm: Norm) -> None:
    for rows, columns in ((1, 1), (1, 4), (5, 1), (3, 3), (6, 7), (29, 29)):
        for turned in (False, True):
            bump = windows.bump(rows, columns, norm, turned=turned)
            assert bump.shape == (rows, columns)
            assert bump.norm(p=2 if norm == "l2" else 1) == pytest.approx(1)
            if rows * columns > 1:
                assert bump.clamp_min(0).norm(p=2 if norm == "l2" else 1) == pytest.approx(
                    bump.clamp_max(0).norm(p=2 if norm == "l2" else 1)
                )


def test_bump_of_two_by_two_by_hand() -> None:
    """Each row is a hill around its second entry: squares of heights 1 and 1/2^2 lie on it, only the larger beside."""
    hill = torch.tensor([1 / 4, 5 / 4], dtype=torch.float64)
    expected = torch.stack([hill, -hill]) / hill.norm() / 2**0.5
    torch.testing.assert_close(windows.bump(2, 2, "l2"), expected)
    torch.testing.assert_close(windows.bump(2, 2, "l2", turned=True), expected.T)
    hill = torch.tensor([1 / 16, 17 / 16], dtype=torch.float64)
    torch.testing.assert_close(windows.bump(2, 2, "l1"), torch.stack([hill, -hill]) / hill.sum() / 2)


def test_bumps_lie_in_their_rows_windows() -> None:
    plan = windows.plan(0.8, 11, 8, "l2", torch.float64, torch.device("cpu"))
    stage, turned = torch.arange(200) % 10, torch.arange(200) % 2
    window = plan.draw(stage, Noise(torch.arange(200)).uniform((2,), torch.float64), 11, 8)
    found = plan.bump(stage, turned, window, 11, 8)
    expected = torch.zeros_like(found)
    for i in range(200):
        (top, left), (rows, columns) = (int(window.top[i]), int(window.left[i])), plan.size[stage[i]].tolist()
        bump = windows.bump(rows, columns, "l2", turned=bool(turned[i]))
        expected[i, 0, top : top + rows, left : left + columns] = bump
    assert torch.equal(found, expected)
    assert torch.equal(found != 0, window.mask(11, 8, torch.float64) > 0)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("share", "weight"), [(1.0, 1.0), (0.3, 2.5)])
def test_mass_of_both_windows_and_what_was_unused_goes_to_one(
    norm: Norm, channels: int, share: float, weight: float
) -> None:
    """Spelled out for one row, with the formulas of the paper, where share and weight are 1."""
    p = 2 if norm == "l2" else 1
    delta = drawn(1, channels, 9, 9) * 0.1
    radius = 1.5 * float(delta.flatten().norm(p=p))
    one, two = torch.zeros(2, 1, 1, 9, 9, dtype=torch.float64)
    one[..., 1:4, 2:5], two[..., 3:6, 4:7] = 1, share
    bump = torch.zeros_like(one)
    bump[0, 0, 1:4, 2:5] = windows.bump(3, 3, norm)
    sign = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)[:channels].view(1, -1, 1, 1)
    found = move_mass(delta.clone(), one, two, bump, weight * sign, torch.full((1, 1, 1, 1), radius).double(), norm)
    unused = radius**p - float(delta.flatten().norm(p=p)) ** p
    in_one, in_two = (one > 0)[0, 0], ((two > 0) & (one == 0))[0, 0]
    for channel in range(channels):
        before, after = delta[0, channel], found[0, channel]
        torch.testing.assert_close(after[~in_one & ~in_two], before[~in_one & ~in_two])
        torch.testing.assert_close(after[in_two].abs() ** p, (1 - share) * before[in_two].abs() ** p)
        old = before[1:4, 2:5] / before[1:4, 2:5].norm(p=p)
        shape = old + weight * sign[0, channel] * windows.bump(3, 3, norm)
        mass = (before[in_one].abs() ** p).sum() + share * (before[in_two].abs() ** p).sum() + unused / channels
        length = mass**0.5 if norm == "l2" else channels * mass
        torch.testing.assert_close(after[1:4, 2:5], shape / shape.norm(p=p) * length)
    if norm == "l2" or channels == 1:
        assert found.flatten().norm(p=p) == pytest.approx(radius)


def test_l1_threshold_is_that_of_the_projection() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = drawn(50, 3, 6, 6) * torch.rand(50, 3, 6, 6, generator=generator) ** 8  # a few large entries, many small
    radius = torch.linspace(0.05, 1.2, 50, dtype=torch.float64) * delta.flatten(1).abs().sum(1)
    found = projected_l1(delta, radius.view(-1, 1, 1, 1))
    assert (found.flatten(1).abs().sum(1) <= radius * (1 + 1e-12)).all()
    torch.testing.assert_close(found, geometry.project(delta, radius, "l1"), rtol=0, atol=2e-3)


# ---- what it finds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [2, 5, 30])
def test_breaks_vectors_exactly_beyond_their_distance_in_linf(features: int) -> None:
    """On a linear model single entries decide, and the last windows are single entries."""
    weight, x = drawn(2, features), drawn(40, features, seed=1)
    model = linear(weight)
    y = predicted(model, x).argmax(1)
    distance = losses.logit_margin(predicted(model, x), y) / (weight[0] - weight[1]).norm(p=1)
    attack = Square(box=WIDE, queries=700 if features > 5 else 100, rescaled=True)
    assert not attack(model, x, y, eps=distance * (1 - 1e-6)).success.any()
    assert attack(model, x, y, eps=distance * (1 + 1e-6)).success.all()


@pytest.mark.parametrize(
    ("norm", "features", "queries", "share"),
    [
        ("linf", 2, 50, 1),
        ("linf", 30, 700, 1),
        ("l2", 2, 300, 0.96),
        ("l2", 10, 700, 0.95),
        ("l1", 2, 100, 1),
        ("l1", 10, 700, 0.9),
    ],
)
def test_comes_close_to_the_worst_loss_of_vectors(norm: Norm, features: int, queries: int, share: float) -> None:
    weight, x, y = drawn(2, features), drawn(20, features, seed=1), torch.zeros(20, dtype=torch.int64)
    weight[1] = weight[0] - weight[1].abs()  # label 0 stays far ahead: every query is spent on the loss
    model = linear(weight, torch.tensor([1e4, 0.0]))
    eps = torch.linspace(0.1, 2, 20, dtype=torch.float64)
    found = Square(norm=norm, box=WIDE, queries=queries, rescaled=True)(model, x, y, eps=eps)
    gained = losses.logit_margin(predicted(model, x), y) - losses.logit_margin(predicted(model, found.x), y)
    assert (gained / (eps * (weight[0] - weight[1]).norm(p=DUAL[norm])) >= share - 1e-5).all()


def test_finds_nearly_all_mistakes_at_the_corners_of_a_small_ball() -> None:
    """All 64 corners around inputs of 6 features are tried; a net is not linear, and single entries may not suffice."""
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=i))
    x, eps = drawn(200, 6, seed=9), 0.25
    y = predicted(model, x).argmax(1)
    corners = torch.cartesian_prod(*[torch.tensor([-eps, eps], dtype=torch.float64)] * 6)
    logits = predicted(model, (x[:, None] + corners).flatten(0, 1))
    exist = losses.misclassified(logits, y.repeat_interleave(64)).view(200, 64).any(1)
    found = Square(box=WIDE, queries=200, rescaled=True)(model, x, y, eps=eps)
    assert 40 < exist.sum() < 160
    assert not (found.success & ~exist).any()
    assert found.success.sum() >= 0.97 * exist.sum()


@each_norm
def test_finds_what_hides_from_gradients(norm: Norm) -> None:
    """Inputs are rounded to levels: the gradient is zero everywhere, and the loss is a staircase."""

    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            level = (x * 25).round() / 25
            return inner(level + 0 * x)

    inner = linear(drawn(3, 4, 1, 4, 1).expand(3, 4, 2, 4, 2).reshape(3, 64))  # no finer than the windows
    x = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = Rounded()
    y = predicted(model, x).argmax(1)
    eps: dict[Norm, float] = {"linf": 0.12, "l2": 1.0, "l1": 4.0}
    blind = PGD(norm=norm, steps=20, start="none")(model, x, y, eps=eps[norm])
    found = Square(norm=norm, queries=150, rescaled=True)(model, x, y, eps=eps[norm])
    assert blind.success.double().mean() < 0.2
    assert found.success.double().mean() > 0.6


def test_needs_no_gradient_and_builds_no_graph() -> None:
    class Verdict(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return torch.nn.functional.one_hot((x.sum(1) > 0).long(), 2).double()

    x = torch.full((4, 3), -0.01, dtype=torch.float64)
    found = Square(box=WIDE, queries=60)(Verdict(), x, torch.zeros(4, dtype=torch.int64), eps=0.1)
    assert found.success.all()
    assert not Square.needs_gradient


@each_norm
def test_more_queries_never_lower_the_loss_of_the_incumbent(norm: Norm) -> None:
    attack = Square(norm=norm, queries=60, rescaled=True, parallel_queries=1)
    given, state = begun(attack, (3, 8, 8))
    model = linear(drawn(2, 192), torch.tensor([1e4, 0.0]))
    values = []
    for _ in range(60):
        state = attack.update(model, given, state)
        torch.testing.assert_close(state.best_loss, losses.margin_loss(predicted(model, state.best), given.y))
        values.append(state.best_loss)
    rise = torch.stack(values).diff(dim=0)
    assert (rise >= 0).all()
    assert ((rise > 0).sum(0) > 2).all()


@each_norm
def test_a_broken_row_keeps_its_point(norm: Norm) -> None:
    attack = Square(norm=norm, queries=80, rescaled=True, parallel_queries=1)
    x = torch.rand(20, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = linear(drawn(3, 36))
    given = problem(x, predicted(model, x).argmax(1), {"linf": 0.2, "l2": 0.8, "l1": 3.0}[norm])
    state = attack.init(given)
    for _ in range(80):
        before, state = state, attack.update(model, given, state)
        assert torch.equal(state.best[before.adversarial], before.best[before.adversarial])
        assert torch.equal(state.steps_survived[before.adversarial], before.steps_survived[before.adversarial])
    assert state.adversarial.any()
    assert (state.steps_survived[state.adversarial] < 80).all()


@each_norm
def test_rows_at_different_iterations_share_a_batch(norm: Norm) -> None:
    attack = Square(norm=norm, queries=30, rescaled=True, parallel_queries=1)
    given, state = begun(attack, (2, 6, 6), batch=6)
    model = linear(drawn(2, 72), torch.tensor([1e4, 0.0]))
    alone = state
    for _ in range(24):
        alone = attack.update(model, given, alone)
    first = torch.arange(6) < 3
    early, late = given.rows(first), given.rows(~first)
    mixed = attack.init(early)
    for _ in range(10):
        mixed = attack.update(model, early, mixed)
    together, mixed = early.joined(late), mixed.joined(attack.init(late))
    for _ in range(14):
        mixed = attack.update(model, together, mixed)
    torch.testing.assert_close(mixed.point[:3], alone.point[:3], rtol=0, atol=1e-12)
    for _ in range(10):
        mixed = attack.update(model, together, mixed)
    torch.testing.assert_close(mixed.point[3:], alone.point[3:], rtol=0, atol=1e-12)


@each_norm
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("box", [(0.0, 1.0), (-0.3, 0.7), (float("-inf"), float("inf"))], ids=str)
@pytest.mark.parametrize("eps", [1e-4, 0.3, 1e4])
def test_every_query_lies_in_ball_and_box(norm: Norm, dtype: torch.dtype, box: Box, eps: float) -> None:
    """Not only what is returned: any candidate may become it."""
    attack = Square(norm=norm, box=box, queries=40, rescaled=True, parallel_queries=3)
    low, high = (0.0, 1.0) if box[0] == float("-inf") else box
    x = torch.rand(6, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    x = (low + (high - low) * x).to(dtype).clamp(*box)
    given = problem(x, torch.zeros(6, dtype=torch.int64), eps)
    model = linear(drawn(2, 147).to(dtype), torch.tensor([1e6, 0.0]))
    state = attack.init(given)
    for _ in range(20):
        distance = (state.points.double() - x.double()[:, None]).flatten(2).norm(p=ORDER[norm], dim=2)
        assert (distance <= given.eps.double()[:, None] * (1 + 1e-6)).all()
        assert torch.equal(state.points, state.points.clamp(*box))
        state = attack.update(model, given, state)


@pytest.mark.parametrize("options", [{"queries": 0}, {"p_init": -0.1}, {"p_init": 1.5}], ids=str)
def test_refuses(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Square(**options)
