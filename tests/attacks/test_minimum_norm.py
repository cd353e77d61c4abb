"""Attacks that look for the smallest perturbation, on models whose distances are known exactly."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from attack_oracles import linear, predicted
from torch import Tensor, nn

from wideberth import geometry
from wideberth.attacks import DDN, FMN, Adversarial, Attack, AttackInputs, AttackState, CarliniWagner
from wideberth.attacks.drivers import perturb_batch, run_steps
from wideberth.checks import Box, InputError, Norm
from wideberth.modes import lent
from wideberth.randomness import Noise

FEATURES = 12
WIDE: Box = (-1.0, 2.0)
DUAL: dict[Norm, float] = {"linf": 1, "l2": 2, "l1": float("inf")}
REACH: dict[Norm, tuple[float, float]] = {"linf": (0.03, 0.3), "l2": (0.1, 0.8), "l1": (0.1, 0.9)}
"""Distances that samples are chosen to have: further than rounding, nearer than the box."""


@dataclass(frozen=True)
class Method:
    """A minimum-norm attack in the table: another one joins by a row.

    Attributes:
        name: of the tests.
        attack: with its hyper-parameters; norm and box are set by the tests.
        within: for each norm that it has, how close to the exact distance it must come, relatively.
    """

    name: str
    attack: Attack
    within: dict[Norm, float] = field(default_factory=lambda: {"linf": 0.02, "l2": 0.01, "l1": 0.02})


SHORT = CarliniWagner(steps=150, search_steps=6, learning_rate=0.04, initial_c=0.01)
TABLE = (
    Method("ddn", DDN(), {"l2": 0.01}),
    Method("fmn", FMN()),
    Method("carlini-wagner", SHORT, {"l2": 0.01, "linf": 0.02}),
)

every_method = pytest.mark.parametrize(
    ("method", "norm"), [pytest.param(row, norm, id=f"{row.name}-{norm}") for row in TABLE for norm in row.within]
)


@dataclass(frozen=True)
class Case:
    """Samples, all classified correctly, and how far each is from the nearest boundary."""

    model: nn.Module
    x: Tensor
    y: Tensor
    distance: Tensor

    def rows(self, where: slice) -> Case:
        return Case(self.model, self.x[where], self.y[where], self.distance[where])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_region(classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A net of rectifiers that all stay on their side within distance 2: the model, and what it is there, (W, b)."""
    first, second = drawn(40, FEATURES, seed=3) / FEATURES**0.5, 20 * drawn(classes, 40, seed=4)
    offset = torch.where(drawn(40, seed=5) > 0, 8.0, -8.0)
    hidden = linear(first, offset - first.sum(1) / 2)
    live = (offset > 0).double()
    weight, bias = second * live @ first, second @ (live * (offset - first.sum(1) / 2))
    # The classes meet in the middle of the box.
    shift = bias + weight.sum(1) / 2
    return nn.Sequential(hidden, nn.ReLU(), linear(second, -shift)), weight, bias - shift


@cache
def samples(kind: str, norm: Norm) -> Case:
    """64 samples around the middle of the box, to which one class is more than twice as near as any other.

    Elsewhere a descent may rightly end at the second nearest boundary.
    """
    if kind == "region":
        model, weight, bias = one_region(3)
    else:
        weight = 20 * drawn({"two classes": 2, "four classes": 4}[kind], FEATURES, seed=1)
        bias = -weight.sum(1) / 2
        model = linear(weight, bias)
    x = 0.5 + 0.2 * drawn(5_000, FEATURES, seed=2)
    logits = predicted(model, x)
    torch.testing.assert_close(logits, x @ weight.T + bias)
    y = logits.argmax(1)
    gaps = (logits.gather(1, y[:, None]) - logits) / (weight[y][:, None] - weight).norm(p=DUAL[norm], dim=2)
    near = gaps.scatter(1, y[:, None], float("inf")).sort(1).values
    low, high = REACH[norm]
    fit = (near[:, 0] > low) & (near[:, 0] < high) & (near[:, 1] > 2 * near[:, 0]) & ((x - 0.5).abs() < 0.5).all(1)
    chosen = fit.nonzero().squeeze(1)[:64]
    assert len(chosen) == 64
    return Case(model, x[chosen], y[chosen], near[chosen, 0])


def inputs_of(x: Tensor, y: Tensor, eps: float = float("inf")) -> AttackInputs:
    return AttackInputs(x, y, geometry.per_sample(eps, x), Noise(torch.arange(len(x))))


def search(attack: Attack, model: nn.Module, x: Tensor, y: Tensor) -> Adversarial:
    """The whole search, without a radius."""
    with lent(model):
        return perturb_batch(attack, model, inputs_of(x, y))


def distances(found: Tensor, x: Tensor, norm: Norm) -> Tensor:
    return (found - x).flatten(1).norm(p={"linf": float("inf"), "l2": 2, "l1": 1}[norm], dim=1)


def assert_smallest(found: Adversarial, x: Tensor, exact: Tensor, norm: Norm, within: float) -> None:
    """Every sample is broken, and by a perturbation as small as any, or hardly larger."""
    assert found.success is not None
    assert found.success.all()
    ratio = distances(found.x, x, norm) / exact
    assert ratio.min() >= 1 - 1e-9
    assert ratio.max() <= 1 + within, f"{ratio.max() - 1:.4f} too far"


@pytest.mark.parametrize(
    ("kind", "batch", "shape"),
    [
        ("two classes", 64, (12,)),
        ("four classes", 1, (12,)),
        ("four classes", 3, (3, 4)),
        ("four classes", 64, (1, 3, 4)),
        ("region", 64, (3, 4)),
    ],
)
@every_method
def test_finds_the_exact_distance(method: Method, norm: Norm, kind: str, batch: int, shape: tuple[int, ...]) -> None:
    case = samples(kind, norm).rows(slice(batch))
    x = case.x.view(-1, *shape)
    found = search(replace(method.attack, norm=norm, box=WIDE), case.model, x, case.y)
    assert_smallest(found, x, case.distance, norm, method.within[norm])


def boxed_distance(normal: Tensor, gap: Tensor, x: Tensor, norm: Norm) -> Tensor:
    """How far (B,) the nearest points of the unit box are at which `normal` has gained `gap`, by bisection."""
    room = torch.where(normal > 0, 1 - x, x)
    if norm == "l1":  # the largest entries first
        order = normal.abs().argsort(descending=True)
        gain, width = normal.abs()[order], room[:, order]
        used = (width * gain).cumsum(1)
        taken = torch.minimum(width, ((gap[:, None] - used + width * gain) / gain).clamp_min(0))
        return taken.sum(1)
    direction = normal.abs() if norm == "l2" else torch.ones_like(normal)
    low, high = torch.zeros_like(gap), torch.full_like(gap, 1e3)
    for _ in range(100):
        middle = (low + high) / 2
        enough = torch.minimum(middle[:, None] * direction, room) @ normal.abs() >= gap
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return distances(torch.minimum(high[:, None] * direction, room), torch.zeros_like(x), norm)


@every_method
def test_finds_the_distance_where_the_box_binds(method: Method, norm: Norm) -> None:
    """Many entries begin on a face, and the cheapest directions lead out of the box."""
    normal = 20 * drawn(FEATURES, seed=6)
    x = torch.rand(500, FEATURES, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x = torch.where(x < 0.3, 0.0, torch.where(x > 0.7, 1.0, x))
    model = linear(torch.stack([torch.zeros_like(normal), normal]), torch.tensor([normal.clamp_min(0).sum() / 2, 0.0]))
    logits = predicted(model, x)
    gap = logits[:, 0] - logits[:, 1]
    exact = boxed_distance(normal, gap, x, norm)
    bound = (gap > 1) & (exact > 1.1 * gap / normal.norm(p=DUAL[norm])) & (exact < 2 * REACH[norm][1])
    x, exact = x[bound][:16], exact[bound][:16]
    assert len(x) == 16
    attack = replace(method.attack, norm=norm)
    found = search(attack, model, x, torch.zeros(16, dtype=torch.int64))
    assert_smallest(found, x, exact, norm, 0.02)


@every_method
def test_with_a_radius_it_is_a_verdict(method: Method, norm: Norm) -> None:
    """Samples nearer than the radius are broken within it, those further away come back as they were."""
    case = samples("two classes", norm).rows(slice(12))
    share = torch.tensor([0.5, 0.99, 1.03, 2.0, 0.0, 1e3] * 2, dtype=torch.float64)
    eps = share * case.distance
    found = replace(method.attack, norm=norm, box=WIDE)(case.model, case.x, case.y, eps=eps)
    assert found.success is not None
    assert torch.equal(found.success, share > 1)
    assert torch.equal(found.x[share < 1], case.x[share < 1])
    assert (distances(found.x, case.x, norm) <= eps * (1 + 1e-6)).all()


@every_method
def test_what_is_misclassified_already_needs_nothing(method: Method, norm: Norm) -> None:
    case = samples("two classes", norm).rows(slice(4))
    found = search(replace(method.attack, norm=norm, box=WIDE), case.model, case.x, 1 - case.y)
    assert found.success is not None
    assert found.success.all()
    assert torch.equal(found.x, case.x)
    assert found.steps_survived.tolist() == [0] * 4


@every_method
def test_value_is_minus_the_distance_of_what_is_kept(method: Method, norm: Norm) -> None:
    case = samples("four classes", norm).rows(slice(6))
    with lent(case.model):
        state = run_steps(replace(method.attack, norm=norm, box=WIDE), case.model, inputs_of(case.x, case.y))
    torch.testing.assert_close(-state.best_loss, distances(state.best, case.x, norm))
    # Most points of a search are on the right side or further away; each was counted until the first that was not.
    assert ((state.steps_survived > 0) & (state.steps_survived < state.iteration)).all()


@every_method
def test_rows_at_different_stages_share_a_batch(method: Method, norm: Norm) -> None:
    """Three rows begin, three join them 17 steps later, one leaves before all: each finds what it finds alone."""
    case = samples("four classes", norm).rows(slice(6))
    attack = replace(method.attack, norm=norm, box=WIDE)
    inputs = inputs_of(case.x, case.y)
    early, late = torch.arange(3), torch.arange(3, 6)

    def stepped(state: AttackState, part: AttackInputs, steps: int) -> AttackState:
        for _ in range(steps):
            state = attack.update(case.model, part, state)
        return state

    with lent(case.model):
        alone = [stepped(attack.init(part), part, 90) for part in (inputs.rows(early), inputs.rows(late))]
        first = stepped(attack.init(inputs.rows(early)), inputs.rows(early), 17)
        both = first.joined(attack.init(inputs.rows(late)))
        both = stepped(both, inputs, 73)
        rest = torch.tensor([5, 3, 4])
        rest_state = stepped(both.rows(rest), inputs.rows(rest), 17)
    assert both.iteration.tolist() == [90] * 3 + [73] * 3
    for name in ("best", "best_loss", "point", "evaluations", "steps_survived"):
        torch.testing.assert_close(getattr(both, name)[:3], getattr(alone[0], name))
        torch.testing.assert_close(getattr(rest_state, name), getattr(alone[1], name)[rest - 3])


class Plateau(nn.Module):
    """Flat, with no gradient at all, within l1 distance 0.4 of the middle; class 1 beyond 0.6."""

    def __init__(self, nan: bool = False) -> None:
        super().__init__()
        self.nan = nan

    def forward(self, x: Tensor) -> Tensor:
        away = (x - 0.5).abs().flatten(1).sum(1)
        rise = torch.relu(away - 0.4)
        if self.nan:
            # The root has no derivative at zero, and autograd says NaN.
            rise = rise.square().sqrt()
        return torch.stack([torch.full_like(rise, 0.2), rise], dim=1)


@pytest.mark.parametrize("nan", [False, True])
@every_method
def test_no_gradient_makes_no_nan(method: Method, norm: Norm, nan: bool) -> None:
    x, y = torch.full((5, FEATURES), 0.5, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    found = search(replace(method.attack, norm=norm), Plateau(nan), x, y)
    assert found.x.isfinite().all()
    if not isinstance(method.attack, CarliniWagner):
        # A random direction leads off the plateau, one for each row.
        assert found.success is not None
        assert found.success.all()
        assert (found.x[1:] != found.x[:-1]).any(1).all()


# ---- DDN and FMN ------------------------------------------------------------------------------------------------


def test_ddn_rounds_to_levels_where_asked() -> None:
    """Points of an 8-bit image stay points of an 8-bit image, and only a little further away."""
    case = samples("two classes", "l2")
    x = (case.x * 255).round() / 255
    plain, rounded = (
        search(DDN(box=WIDE), case.model, x, case.y),
        search(DDN(levels=766, box=WIDE), case.model, x, case.y),
    )
    on_grid = (255 * rounded.x - (255 * rounded.x).round()).abs() < 1e-9
    assert on_grid.all()
    assert not (255 * plain.x - (255 * plain.x).round()).abs().amax() < 1e-3
    assert rounded.success is not None
    assert rounded.success.all()
    assert (distances(rounded.x, x, "l2") <= 1.05 * distances(plain.x, x, "l2")).all()


def test_ddn_changes_length_by_gamma_and_nothing_else() -> None:
    """Before the first success every point is 1.05 times as far away as the last one was."""
    case = samples("two classes", "l2").rows(slice(3))
    attack, inputs = DDN(box=WIDE, init_eps=0.01), inputs_of(case.x, case.y)
    state = attack.init(inputs)
    for k in range(5):
        state = attack.update(case.model, inputs, state)
        far = distances(state.point, case.x, "l2")
        torch.testing.assert_close(far, torch.full_like(far, 0.01 * 1.05 ** (k + 1)))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fmn_projection_only_shortens(norm: Norm) -> None:
    """A projection that scales everything to the sphere would lengthen what is inside."""
    attack, inputs = FMN(norm=norm, box=WIDE), inputs_of(torch.full((1, 4), 0.5, dtype=torch.float64), torch.zeros(1))
    delta = torch.tensor([[0.1, -0.05, 0.0, 0.02]], dtype=torch.float64)
    inside = attack.placed(inputs, delta, torch.tensor([1.0], dtype=torch.float64))
    torch.testing.assert_close(inside - inputs.x, delta)
    outside = attack.placed(inputs, 100 * delta, torch.tensor([1.0], dtype=torch.float64))
    torch.testing.assert_close(distances(outside, inputs.x, norm), torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fmn_crosses_a_boundary_that_it_knows_exactly(dtype: torch.dtype) -> None:
    """On a linear model the first estimate is exact, and a step to it that rounding leaves short finds nothing."""
    case = samples("two classes", "l2")
    model = linear(case.model[1].weight.detach().to(dtype), case.model[1].bias.detach().to(dtype))
    found = search(FMN(norm="l2", box=WIDE, steps=3), model, case.x.to(dtype), case.y)
    assert found.success is not None
    assert found.success.all()


# ---- Carlini and Wagner -----------------------------------------------------------------------------------------


def test_carlini_wagner_is_exact_where_the_first_stride_is_longer_than_the_distance() -> None:
    """Strides of Adam cross the boundary whatever c is; a bisection that took this for success would go astray."""
    weight = drawn(2, 200, seed=8)
    model = linear(weight, -weight.sum(1) / 2)
    x = 0.5 + 0.1 * drawn(64, 200, seed=9)
    logits = predicted(model, x)
    y = logits.argmax(1)
    exact = (logits[:, 0] - logits[:, 1]).abs() / (weight[0] - weight[1]).norm()
    near = (exact > 0.02) & (exact < 0.07)
    assert near.sum() >= 5
    found = search(CarliniWagner(steps=100, box=(-0.5, 1.5)), model, x[near], y[near])
    assert_smallest(found, x[near], exact[near], "l2", 0.02)


def test_carlini_wagner_gives_up_row_by_row() -> None:
    """A row without gradient ends its searches early and is no longer asked about, in whatever company."""
    case = samples("two classes", "l2").rows(slice(3))
    attack = replace(SHORT, box=WIDE)

    class Half(nn.Module):
        """Flat where the first entry is 2."""

        def forward(self, x: Tensor) -> Tensor:
            flat = torch.tensor([1.0, 0.0], dtype=x.dtype)
            return torch.where(x[:, :1] == 2, flat, case.model(x))

    x = torch.cat([case.x, torch.full((1, FEATURES), 2.0, dtype=torch.float64)])
    y = torch.cat([case.y, torch.zeros(1, dtype=torch.int64)])
    together = search(attack, Half(), x, y)
    alone = search(attack, case.model, case.x, case.y)
    assert together.success is not None
    assert together.success.tolist() == [True, True, True, False]
    torch.testing.assert_close(together.x[:3], alone.x)
    assert torch.equal(together.evaluations[:3], alone.evaluations)
    # A look at 15 and at 30 steps shows no progress: two rates, six searches.
    assert together.evaluations[3] <= 2 * 6 * 32
    assert (together.evaluations[:3] > 2 * together.evaluations[3]).all()
    assert (together.evaluations <= 2 * attack.num_steps).all()


def test_more_runs_of_the_same_are_refused() -> None:
    for kind in (DDN, FMN, CarliniWagner):
        with pytest.raises(InputError, match="restarts=2"):
            kind(restarts=2)


@pytest.mark.parametrize(("kind", "norm"), [(DDN, "linf"), (DDN, "l1"), (CarliniWagner, "l1")])
def test_norms_that_an_attack_has_not_are_refused(kind: type[Attack], norm: Norm) -> None:
    with pytest.raises(InputError, match="norm"):
        kind(norm=norm)


@pytest.mark.parametrize("box", [(float("-inf"), float("inf")), (0.0, float("inf"))], ids=str)
@pytest.mark.parametrize(("kind", "options"), [(CarliniWagner, {}), (DDN, {"levels": 256})])
def test_a_box_without_faces_is_refused_where_they_are_needed(kind: type[Attack], options: Any, box: Box) -> None:
    """It found nothing there, and said so as if the model were robust."""
    with pytest.raises(InputError, match="finite"):
        kind(box=box, **options)


def test_carlini_wagner_follows_margins_that_are_small_beside_the_box() -> None:
    """A margin of 0.01, 150 away in a box of 3072 entries up to 255, where sums over all entries are off by more."""
    generator = torch.Generator().manual_seed(0)
    x = 20 + 20 * torch.rand(1, 3072, generator=generator, dtype=torch.float64)
    normal = -torch.rand(3072, generator=generator, dtype=torch.float64)
    normal *= 0.01 / 150 / normal.abs().sum()
    bias = 0.01 - x[0] @ normal
    model = linear(torch.stack([normal, torch.zeros_like(normal)]), torch.stack([bias, torch.zeros_like(bias)]))
    attack = CarliniWagner(norm="linf", box=(0.0, 255.0), steps=100)
    found = attack(model.float(), x.float(), torch.tensor([0]), eps=255.0)
    assert found.success.all()
    assert float((found.x - x).abs().max()) == pytest.approx(150, rel=0.05)


def test_carlini_wagner_gives_up_where_there_is_nothing_to_gain() -> None:
    """With c = 0 the objective is zero from the start, and stays so in every row, alone or in company."""
    x = torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = linear(torch.eye(2, 5, dtype=torch.float64))
    attack = CarliniWagner(steps=5, search_steps=1, initial_c=0.0, cuts=0)
    found = attack(model, x, model(x).argmax(1), eps=0.5)
    assert found.evaluations.tolist() == [2 * 2] * 5
    for row in range(5):
        alone = attack(model, x[row : row + 1], model(x[row : row + 1]).argmax(1), eps=0.5)
        assert alone.evaluations.tolist() == [2 * 2]
