"""Norm balls against definitions, optimality conditions and independent solvers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import beta, kstest, uniform
from torch import Tensor

from wideberth import geometry
from wideberth.checks import InputError, Norm
from wideberth.randomness import Noise

NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
ORDER: dict[Norm, float] = {"linf": float("inf"), "l2": 2, "l1": 1}
DUAL: dict[Norm, Norm] = {"linf": "l1", "l2": "l2", "l1": "linf"}

each_norm = pytest.mark.parametrize("p", NORMS)
number = st.floats(-3, 3, allow_subnormal=False) | st.sampled_from([0.0, 1.0, -1.0, 0.5])
radius = st.floats(0, 5) | st.sampled_from([0.0, 1.0])
share = st.floats(0, 1) | st.sampled_from([0.0, 1.0])


def rows(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def order(delta: Tensor, p: Norm) -> Tensor:
    """The norm of each row by numpy."""
    return torch.from_numpy(np.linalg.norm(delta.double().flatten(1).numpy(), ord=ORDER[p], axis=1))


def vectors(count: int) -> st.SearchStrategy[list[list[float]]]:
    """`count` vectors of the same dimension, 1 to 6."""
    return st.integers(1, 6).flatmap(
        lambda size: st.lists(st.lists(number, min_size=size, max_size=size), min_size=count, max_size=count)
    )


def furthest(g: Tensor, eps: float, low: Tensor, high: Tensor) -> float:
    """max <g, z> over ||z||_1 <= eps and low <= z <= high, by linear programming in z = a - b."""
    size = len(g)
    bounds = [(0, max(0.0, h)) for h in high.tolist()] + [(0, max(0.0, -v)) for v in low.tolist()]
    cost = np.concatenate([-g.numpy(), g.numpy()])
    found = linprog(cost, A_ub=np.ones((1, 2 * size)), b_ub=[eps], bounds=bounds, method="highs")
    assert found.success
    return -float(found.fun)


@each_norm
def test_norm_and_dual_are_those_of_numpy(p: Norm) -> None:
    delta = torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(geometry.norm(delta, p), order(delta, p))
    assert geometry.dual(p) == DUAL[p]


@pytest.mark.parametrize("value", [0.25, torch.tensor(0.25), torch.full((3,), 0.25, dtype=torch.float64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_radius_becomes_one_per_sample_in_at_least_float32(value: float | Tensor, dtype: torch.dtype) -> None:
    found = geometry.per_sample(value, torch.zeros(3, 2, dtype=dtype))
    assert found.tolist() == [0.25] * 3
    assert found.dtype == torch.promote_types(dtype, torch.float32)


@each_norm
@given(vectors(2))
def test_steepest_has_unit_norm_and_attains_the_dual_norm(p: Norm, values: list[list[float]]) -> None:
    gradient = rows(values)
    step = geometry.steepest(gradient, p)
    moves = gradient.abs().amax(1) > 0
    torch.testing.assert_close((gradient * step).sum(1), order(gradient, DUAL[p]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(order(step, p), moves.double(), rtol=1e-9, atol=1e-9)


@each_norm
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_steepest_of_a_tiny_or_huge_gradient_is_that_of_its_direction(p: Norm, size: float) -> None:
    direction = torch.tensor([[3.0, -4.0, 0.0]])
    torch.testing.assert_close(geometry.steepest(direction * size, p), geometry.steepest(direction, p))
    assert order(geometry.steepest(direction, p), p).item() == pytest.approx(1)


@each_norm
def test_steepest_keeps_rank_and_rows_apart(p: Norm) -> None:
    gradient = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    step = geometry.steepest(gradient, p)
    for i in range(4):
        torch.testing.assert_close(step[i : i + 1], geometry.steepest(gradient[i : i + 1], p))


@each_norm
@given(vectors(3), st.lists(radius, min_size=3, max_size=3))
def test_projection_is_inside_and_nearest(p: Norm, values: list[list[float]], radii: list[float]) -> None:
    """P is nearest exactly if no point z of the ball has <delta - P, z - P> > 0: the largest is eps ||.||_dual."""
    delta, eps = rows(values), rows(radii)
    found = geometry.project(delta, eps, p)
    assert (order(found, p) <= eps * (1 + 1e-9)).all()
    rest = delta - found
    assert (eps * order(rest, DUAL[p]) - (rest * found).sum(1) <= 1e-7).all()
    torch.testing.assert_close(geometry.project(found, eps, p), found, rtol=1e-9, atol=1e-12)


@given(vectors(1), radius, st.data())
def test_l1_projection_with_room_is_inside_and_nearest(
    values: list[list[float]], eps: float, data: st.DataObject
) -> None:
    size = len(values[0])
    room = rows([data.draw(st.lists(st.floats(0, 2) | st.just(float("inf")), min_size=size, max_size=size))])
    delta = rows(values)
    found = geometry.project_l1(delta, rows([eps]), room)
    assert order(found, "l1").item() <= eps * (1 + 1e-9)
    assert (found.abs() <= room).all()
    rest = (delta - found)[0]
    reach = room[0].clamp_max(10)
    assert furthest(rest, eps, -reach, reach) - float(rest @ found[0]) <= 1e-7


@given(vectors(1), radius, st.data())
def test_l1_placing_is_nearest_within_ball_and_box(values: list[list[float]], eps: float, data: st.DataObject) -> None:
    delta = rows(values)
    x = rows([data.draw(st.lists(share, min_size=delta.shape[1], max_size=delta.shape[1]))])
    found = geometry.place(x, delta, rows([eps]), "l1", (0.0, 1.0)) - x
    rest = (delta - found)[0]
    assert furthest(rest, eps, -x[0], 1 - x[0]) - float(rest @ found[0]) <= 1e-7


@pytest.mark.parametrize("size", [100, 3072])
@pytest.mark.parametrize("eps", [0.01, 0.5, 12.0])
@each_norm
def test_float32_stays_inside_when_steps_dwarf_the_radius(p: Norm, eps: float, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.rand(16, size, generator=generator), torch.randn(16, size, generator=generator)
    found = geometry.place(x, delta, torch.full((16,), eps), p, (0.0, 1.0))
    assert (order(found.double() - x.double(), p) <= eps * (1 + 1e-6)).all()


@each_norm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@given(vectors(2), st.lists(share, min_size=12, max_size=12), radius)
def test_placing_stays_in_ball_and_box_of_the_dtype(
    p: Norm, dtype: torch.dtype, values: list[list[float]], shares: list[float], eps: float
) -> None:
    delta = rows(values)
    box = (-0.3, 0.7)
    x = (rows(shares).view(2, 6)[:, : delta.shape[1]] - 0.3).to(dtype).clamp(*box)
    radii = geometry.per_sample(eps, x)
    found = geometry.place(x, delta.to(radii.dtype), radii, p, box)
    assert found.dtype == dtype
    assert torch.equal(found, found.clamp(*box))
    assert (order(found.double() - x.double(), p) <= radii.double() * (1 + 1e-6)).all()


@each_norm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_placing_at_radius_zero_is_the_input(p: Norm, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 2, 3, generator=generator).to(dtype)
    delta = 100 * torch.randn(4, 2, 3, generator=generator)
    eps = torch.tensor([0.0, 1.0, 0.0, 1.0])
    found = geometry.place(x, delta, eps.to(torch.promote_types(dtype, torch.float32)), p, (0.0, 1.0))
    assert torch.equal(found[eps == 0], x[eps == 0])
    assert (found != x).flatten(1).any(1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inward_rounds_towards_the_input_and_by_less_than_one_step(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 50, generator=generator).to(dtype)
    delta = 0.03 * torch.randn(200, 50, generator=generator)
    found, wanted = geometry.inward(x, delta), x.double() + delta.double()
    # Subtracting in float32 sees excesses down to one part in ten million of the larger operand.
    assert ((found.double() - x.double()).abs() <= delta.double().abs() + 1e-7).all()
    ulp = torch.finfo(dtype).eps * wanted.abs().clamp_min(2.0**-10)
    assert ((found.double() - wanted).abs() <= 1.01 * ulp).all()
    assert ((x + delta).to(dtype) != found).any(), "nothing here had to be rounded inward"


@pytest.mark.parametrize(("p", "marginal"), [("linf", uniform()), ("l2", beta(0.5, 3)), ("l1", beta(1, 5))])
def test_uniform_start_is_uniform_in_the_ball(p: Norm, marginal: Any) -> None:
    """In d dimensions (length / eps)**d is uniform; the law of one entry's size (in l2: its square) is known."""
    size, count = 5, 4000
    x = torch.zeros(count, size, dtype=torch.float64)
    eps = torch.linspace(0.5, 2, count, dtype=torch.float64)
    found = geometry.random_start(x, eps, p, "uniform", Noise(torch.arange(count), seed=5)) / eps[:, None]
    assert kstest(order(found, p).numpy() ** size, "uniform").pvalue > 0.01
    for entry in found.T:
        magnitude = entry.square() if p == "l2" else entry.abs()
        assert kstest(magnitude.numpy(), marginal.cdf).pvalue > 0.01
        assert abs((entry > 0).double().mean() - 0.5) < 0.03
    assert (torch.corrcoef(found.T) - torch.eye(size)).abs().max() < 0.06


@each_norm
def test_gaussian_start_is_small_noise_within_the_ball(p: Norm) -> None:
    x = torch.zeros(2, 3000)
    found = geometry.random_start(x, torch.tensor([1e4, 1e-4]), p, "gaussian", Noise(torch.arange(2)))
    assert found[0].std().item() == pytest.approx(0.001, rel=0.05)
    assert order(found, p)[1].item() == pytest.approx(1e-4, rel=1e-4)


@each_norm
def test_no_start_is_zero_and_other_words_are_refused(p: Norm) -> None:
    x, eps, noise = torch.ones(2, 3), torch.ones(2), Noise(torch.arange(2))
    assert torch.equal(geometry.random_start(x, eps, p, "none", noise), torch.zeros(2, 3))
    word: Any = "halton"
    with pytest.raises(InputError, match="start='halton': accepted are uniform, gaussian, none"):
        geometry.random_start(x, eps, p, word, noise)


@each_norm
@pytest.mark.parametrize("start", ["uniform", "gaussian", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_start_is_at_least_float32_and_in_the_ball(p: Norm, start: Any, dtype: torch.dtype) -> None:
    x, eps = torch.zeros(50, 2, 3, dtype=dtype), torch.linspace(0, 2, 50)
    wide = torch.promote_types(dtype, torch.float32)
    found = geometry.random_start(x, eps.to(wide), p, start, Noise(torch.arange(50)))
    assert (found.dtype, found.shape) == (wide, x.shape)
    assert (order(found, p) <= eps.double() * (1 + 1e-6)).all()
    assert not found[0].any()
