"""Wasserstein attacks: what they move, and how far, measured by exact linear programs on images of 5 x 5 pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attack_oracles import linear
from scipy.optimize import brentq, linprog
from scipy.sparse import coo_array
from torch import Tensor, nn

from wideberth.attacks import Wasserstein
from wideberth.attacks.wasserstein import Ball


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rising(weight: Tensor) -> nn.Module:
    """Logits (0, weight * x): for label 0, the worst point is the one of the largest product."""
    flat = weight.flatten()
    return linear(torch.stack([torch.zeros_like(flat), flat]))


def ways(side: int, order: float) -> tuple[np.ndarray, np.ndarray]:
    """Cost of moving from any pixel to any other of a square image, and the longer of the two coordinates."""
    row, column = np.divmod(np.arange(side * side), side)
    down, across = np.abs(row[:, None] - row), np.abs(column[:, None] - column)
    return (down**2 + across**2) ** (order / 2), np.maximum(down, across)


def leaving(pixels: int) -> tuple[coo_array, coo_array]:
    """Matrices that sum a plan, row by row, over where mass goes and over where it comes from."""
    sources, sinks = np.divmod(np.arange(pixels**2), pixels)
    ones, plan = np.ones(pixels**2), np.arange(pixels**2)
    return coo_array((ones, (sources, plan))), coo_array((ones, (sinks, plan)))


def distance(x: Tensor, z: Tensor, order: float) -> float:
    """The exact least cost of moving the mass of one square image to where that of another is, both scaled to one."""
    source, sink = (image.flatten().double().numpy() / image.double().sum().item() for image in (x, z))
    send, receive = leaving(len(source))
    cost = ways(x.shape[-1], order)[0].ravel()
    # Rounding may leave the two masses unequal by 1e-16: what arrives is implied by what leaves, but for one entry.
    constraints = np.vstack([send.toarray(), receive.toarray()[:-1]])
    result = linprog(cost, A_eq=constraints, b_eq=np.concatenate([source, sink[:-1]]), method="highs")
    assert result.success
    return float(result.fun)


def best_gain(x: Tensor, weight: Tensor, eps: float, attack: Wasserstein) -> float:
    """The exact most that a linear function can grow in the ball: a linear program over all plans within the window."""
    mass, side = x.flatten().numpy(), x.shape[-1]
    cost, away = ways(side, attack.order)
    send, receive = leaving(side * side)
    result = linprog(
        -np.tile(weight.flatten().numpy(), (side * side, 1)).ravel(),
        A_eq=send,
        b_eq=mass,
        A_ub=np.vstack([receive.toarray(), cost.ravel()]),
        b_ub=np.append(np.full(side * side, attack.box[1]), eps * mass.sum()),
        bounds=[(0, None if near else 0) for near in (away <= attack.window // 2).ravel()],
        method="highs",
    )
    assert result.success
    return float(-result.fun - (x.flatten() @ weight.flatten()))


def digits(count: int = 4) -> Tensor:
    """Images 5 x 5 with black and white pixels among the grey ones."""
    return (1.6 * picture(count, 1, 5, 5, seed=2) - 0.3).clamp(0, 1)


ATTACKS = {
    "default": Wasserstein(steps=6),
    "sign": Wasserstein(norm="linf", steps=6),
    "mean-distance": Wasserstein(order=1, steps=6),
    "next-pixels": Wasserstein(window=3, sharpness=30, steps=6),
    "blurred-few-iterations": Wasserstein(sharpness=1, iterations=3, steps=5),
}


@pytest.mark.parametrize("eps", [0.02, 0.3])
@pytest.mark.parametrize("name", list(ATTACKS))
def test_mass_is_kept_and_moves_no_further_than_eps(name: str, eps: float) -> None:
    """Measured by an exact linear program."""
    x, attack = digits(), ATTACKS[name]
    weight = picture(25, seed=4) - 0.5
    found = attack(rising(weight), x, torch.zeros(4, dtype=torch.int64), eps=eps).x
    torch.testing.assert_close(found.sum((1, 2, 3)), x.sum((1, 2, 3)), rtol=0, atol=1e-9)
    for i in range(4):
        reached = distance(x[i], found[i], attack.order)
        assert reached <= eps * (1 + 1e-6)
        if "blurred" not in name:
            assert reached >= 0.95 * eps


@pytest.mark.parametrize("eps", [0.02, 0.3])
@pytest.mark.parametrize("name", ["default", "mean-distance", "next-pixels"])
def test_it_gains_nearly_all_that_a_linear_function_can_gain(name: str, eps: float) -> None:
    x, attack = digits(), ATTACKS[name]
    weight = picture(25, seed=4) - 0.5
    found = attack(rising(weight), x, torch.zeros(4, dtype=torch.int64), eps=eps).x
    for i in range(4):
        gain = ((found[i] - x[i]).flatten() @ weight).item()
        most = best_gain(x[i], weight, eps, attack)
        assert 0.93 * most <= gain <= most * (1 + 1e-6)


@pytest.mark.parametrize("wanted", [(1.6, 0.2), (0.0, 2.0), (3.0, -1.0)])
@pytest.mark.parametrize("sharpness", [1.0, 10.0])
def test_projection_of_two_pixels_is_the_nearest_point(wanted: tuple[float, float], sharpness: float) -> None:
    """All mass on the left: of (2 - m, m), the regularised distance has one minimum, unless 2 * eps ends m before."""

    def slope(m: float) -> float:
        return 2 * m - 2 + wanted[0] - wanted[1] + np.log(m / (2 - m)) / sharpness

    mass = torch.tensor([2.0, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    most, eps = torch.full((1, 1, 1, 1), 4.0, dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)
    ball = Ball(mass, most, eps, order=2, window=3, sharpness=sharpness)
    start = torch.zeros_like(mass), torch.ones_like(eps)
    found = ball.carried(*ball.sinkhorn(torch.tensor(wanted, dtype=torch.float64).view_as(mass), *start, 100))
    moved = min(brentq(slope, 1e-30, 2 - 1e-15), 0.5)
    torch.testing.assert_close(found.flatten().tolist(), [2 - moved, moved], rtol=0, atol=1e-4)


def test_channels_do_not_exchange_mass_and_share_the_budget() -> None:
    """The cost of both together is what eps allows per unit of the whole mass, whatever each one spends."""
    x = digits(2).view(1, 2, 5, 5)
    weight = torch.cat([picture(25, seed=4), 0.1 * picture(25, seed=5)])
    found = Wasserstein(steps=6)(rising(weight), x, torch.zeros(1, dtype=torch.int64), eps=0.1).x
    torch.testing.assert_close(found.sum((2, 3)), x.sum((2, 3)), rtol=0, atol=1e-9)
    share = (x.sum((2, 3)) / x.sum())[0]
    spent = [share[c].item() * distance(x[0, c], found[0, c], 2) for c in range(2)]
    assert 0.095 <= sum(spent) <= 0.1 * (1 + 1e-6)
    assert spent[0] > 2 * spent[1]


def test_mass_stays_in_the_window() -> None:
    x = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    x[0, 0, 3, 3] = 0.8
    away = torch.zeros_like(x)
    away[0, 0, 0, 0] = away[0, 0, 2, 2] = 1
    found = Wasserstein(window=3, steps=6)(rising(away), x, torch.zeros(1, dtype=torch.int64), eps=50.0).x
    assert found[0, 0, 2, 2] > 0.2
    outside = found.clone()
    outside[0, 0, 2:5, 2:5] = 0
    assert outside.abs().max() == 0


def test_black_images_stay_black_beside_others() -> None:
    x = torch.cat([torch.zeros(1, 1, 5, 5, dtype=torch.float64), digits(1)])
    found = Wasserstein(steps=6)(rising(picture(25)), x, torch.zeros(2, dtype=torch.int64), eps=0.3).x
    assert torch.equal(found[0], x[0])
    assert not torch.equal(found[1], x[1])
