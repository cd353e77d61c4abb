"""Shortest ways to hyperplanes inside the box, against closed forms and independent solvers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor

from wideberth import geometry
from wideberth.checks import Box, Norm
from wideberth.hyperplanes import shortest_step

NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
UNIT = (0.0, 1.0)
NO_BOX = (float("-inf"), float("inf"))

each_norm = pytest.mark.parametrize("p", NORMS)


def instances(
    count: int, size: int, box: Box = UNIT, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points, some on faces; normals, some entries zero; wanted rises of both signs; the most that the box holds."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, size, generator=generator, dtype=torch.float64)
    x[::4] = x[::4].round()
    x = box[0] + (box[1] - box[0]) * x
    normal = torch.randn(count, size, generator=generator, dtype=torch.float64)
    normal[:, 1::3] *= torch.rand(normal[:, 1::3].shape, generator=generator, dtype=torch.float64) > 0.3
    sign = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0).double()
    toward = normal * sign[:, None]
    most = (toward * torch.where(toward > 0, box[1] - x, box[0] - x)).sum(1)
    rise = sign * most * 1.3 * torch.rand(count, generator=generator, dtype=torch.float64)
    return x.to(dtype), normal.to(dtype), rise.to(dtype), most.to(dtype)


def gained(normal: Tensor, step: Tensor) -> Tensor:
    return (normal * step).flatten(1).sum(1)


def solved(x: Tensor, normal: Tensor, rise: float, p: Norm, box: Box) -> float | None:
    """The least norm of one row, by a general solver; None where the box does not hold so much."""
    w, size = normal.numpy(), len(normal)
    room = [(box[0] - v, box[1] - v) for v in x.tolist()]
    if p == "linf":  # the perturbation, and a bound on its entries
        eye, one = np.eye(size), np.ones((size, 1))
        above = np.block([[eye, -one], [-eye, -one]])
        cost, equal = np.append(np.zeros(size), 1), np.append(w, 0)[None]
        found = linprog(cost, above, np.zeros(2 * size), equal, [rise], [*room, (0, None)])
    else:  # what is added, and what is taken away
        bounds = [(0, high) for _, high in room] + [(0, -low) for low, _ in room]
        found = linprog(np.ones(2 * size), A_eq=np.append(w, -w)[None], b_eq=[rise], bounds=bounds)
    if found.status == 2:
        return None
    assert found.status == 0
    if p != "l2":
        return float(found.fun)
    best = minimize(
        lambda d: d @ d,
        found.x[:size] - found.x[size:],
        jac=lambda d: 2 * d,
        method="SLSQP",
        bounds=room,
        constraints={"type": "eq", "fun": lambda d: w @ d - rise, "jac": lambda d: w},
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert best.success
    return float(np.sqrt(best.fun))


@pytest.mark.parametrize("box", [UNIT, (-0.5, 2.0)])
@pytest.mark.parametrize("size", [1, 2, 6])
@each_norm
def test_no_solver_finds_a_shorter_way(p: Norm, size: int, box: Box) -> None:
    x, normal, rise, _ = instances(24, size, box)
    step = shortest_step(x, normal, rise, p, box)
    lengths, far = geometry.norm(step, p), 0
    for i in range(len(x)):
        least = solved(x[i], normal[i], rise[i].item(), p, box)
        far += least is None
        if least is not None:
            assert lengths[i] == pytest.approx(least, rel=1e-6, abs=1e-7)
            assert gained(normal, step)[i] == pytest.approx(rise[i].item(), abs=1e-12)
    assert 1 <= far < len(x) - 5  # both kinds have been seen


@each_norm
def test_out_of_reach_leads_to_the_farthest_corner(p: Norm) -> None:
    x, normal, _, most = instances(20, 5)
    sign = torch.where(torch.arange(20) % 2 == 0, 1.0, -1.0).double()
    step = shortest_step(x, normal, 1.01 * sign * most + sign, p, UNIT)
    corner = (normal * sign[:, None] > 0).double()
    assert torch.equal(x + step, torch.where(normal == 0, x, corner))


@each_norm
def test_without_a_box_it_is_the_distance_to_the_hyperplane(p: Norm) -> None:
    x, normal, rise, _ = instances(20, 7)
    step = shortest_step(x, normal, rise, p, NO_BOX)
    torch.testing.assert_close(geometry.norm(step, p), rise.abs() / geometry.norm(normal, geometry.dual(p)))
    torch.testing.assert_close(gained(normal, step), rise)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_norm
def test_meets_hyperplane_and_box_with_many_entries(p: Norm, dtype: torch.dtype) -> None:
    """Rises up to a thousandth below the most there is, gains over ten orders of magnitude, rooms over six."""
    generator = torch.Generator().manual_seed(2)
    x = 1 - torch.exp(-14 * torch.rand(40, 500, generator=generator, dtype=torch.float64))
    normal = torch.randn(40, 500, generator=generator).double()
    normal[20:] *= torch.exp(-24 * torch.rand(20, 500, generator=generator, dtype=torch.float64))
    x, normal = x.to(dtype), normal.to(dtype)
    wide, exact = torch.promote_types(dtype, torch.float32), normal.double()
    most = (exact * torch.where(exact > 0, 1 - x.double(), -x.double())).sum(1)
    share = torch.tensor([0.01, 0.5, 0.9, 0.99, 0.999]).repeat(8).double()
    step = shortest_step(x, normal, (share * most).to(wide), p, UNIT)
    assert step.dtype == wide
    precise = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(gained(exact, step.double()), share * most, rtol=precise, atol=0)
    assert ((x + step >= 0) & (x + step <= 1)).all()


@each_norm
def test_optimal_with_many_entries(p: Norm) -> None:
    """Entries inside the box share one level (linf, l2); in l1 none that moves gains less than one that could."""
    x, normal, rise, most = instances(30, 300, seed=3)
    rise = rise.sign() * torch.minimum(rise.abs(), 0.98 * most)
    step = shortest_step(x, normal, rise, p, UNIT)
    toward = normal * rise.sign()[:, None]
    room, gain = torch.where(toward > 0, 1 - x, x), toward.abs()
    free = (step.abs() < room - 1e-12) & (gain > 0)
    assert (step * toward >= 0).all()
    if p == "l1":
        poorest = torch.where(step != 0, gain, float("inf")).amin(1)
        assert (torch.where(free, gain, 0).amax(1) <= poorest).all()
        return
    level = step.abs() if p == "linf" else torch.where(gain > 0, step.abs() / gain, 0)
    top = level.amax(1, keepdim=True)
    torch.testing.assert_close(level[free], top.expand_as(level)[free])
    assert free.any(1).all()


@each_norm
def test_nothing_to_do(p: Norm) -> None:
    """A normal of zeros has no hyperplane to go to, and a rise of zero is there already."""
    x, normal, rise, _ = instances(6, 4)
    assert torch.equal(shortest_step(x, torch.zeros_like(x), rise, p, UNIT), torch.zeros_like(x))
    assert torch.equal(shortest_step(x, normal, torch.zeros_like(rise), p, UNIT), torch.zeros_like(x))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@each_norm
def test_length_of_the_normal_does_not_matter(p: Norm, scale: float) -> None:
    x, normal, rise, most = instances(20, 8, dtype=torch.float32)
    rise = 0.5 * rise.sign() * torch.minimum(rise.abs(), most)
    expected = shortest_step(x, normal, rise, p, UNIT)
    torch.testing.assert_close(shortest_step(x, normal * scale, rise * scale, p, UNIT), expected, rtol=1e-4, atol=1e-6)


@each_norm
def test_rows_are_independent_and_of_any_rank(p: Norm) -> None:
    x, normal, rise, _ = instances(12, 12)
    together = shortest_step(x, normal, rise, p, UNIT)
    images = shortest_step(x.view(12, 3, 2, 2), normal.view(12, 3, 2, 2), rise, p, UNIT)
    assert torch.equal(images, together.view(12, 3, 2, 2))
    for i in (0, 5, 11):
        assert torch.equal(shortest_step(x[i : i + 1], normal[i : i + 1], rise[i : i + 1], p, UNIT)[0], together[i])


@each_norm
@pytest.mark.parametrize("box", [UNIT, NO_BOX, (0.0, float("inf"))])
def test_autocast_plays_no_part(p: Norm, box: Box) -> None:
    """Attacks run inside training steps: products that autocast narrows would take the digits away, or overflow."""
    x, normal, rise, _ = (part.float() for part in instances(20, 12))
    expected = shortest_step(x, normal, rise, p, box)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(shortest_step(x, normal, rise, p, box), expected)
