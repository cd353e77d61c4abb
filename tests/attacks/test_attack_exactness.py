"""On a linear model the worst point of a ball is known in closed form, and attacks must find it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attack_oracles import linear, predicted
from torch import Tensor

from wideberth import losses
from wideberth.attacks import FGSM, PGD, Attack, ScaledStep
from wideberth.checks import Norm

WIDE = (-100.0, 100.0)
DUAL: dict[Norm, float] = {"linf": 1, "l2": 2, "l1": float("inf")}
ATTACKS: dict[str, Attack] = {
    "fgsm": FGSM(box=WIDE),
    "pgd": PGD(box=WIDE, steps=10, start="none"),
    "pgd-worst": PGD(box=WIDE, steps=10, start="none", keep="worst"),
    # Long steps: in l2, what the start has across the gradient halves with each.
    "pgd-random": PGD(box=WIDE, steps=40, step_size=ScaledStep(40)),
    "pgd-margin": PGD(box=WIDE, steps=40, step_size=ScaledStep(40), start="gaussian", loss=losses.margin_loss),
}

each_norm = pytest.mark.parametrize("norm", list(DUAL))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@each_norm
@pytest.mark.parametrize("name", list(ATTACKS))
def test_reaches_the_worst_loss_of_the_ball(name: str, norm: Norm, generator: torch.Generator) -> None:
    """Two classes: the margin falls by eps times the dual norm of the weights' difference, and no further."""
    weight, x, y = drawn(generator, 2, 7), drawn(generator, 9, 7), torch.arange(9) % 2
    eps = torch.linspace(0.1, 2, 9, dtype=torch.float64)
    model = linear(weight, torch.tensor([0.3, -0.2]))
    found = replace(ATTACKS[name], norm=norm)(model, x, y, eps=eps)
    worst = losses.logit_margin(predicted(model, x), y) - eps * (weight[0] - weight[1]).norm(p=DUAL[norm])
    reached = losses.logit_margin(predicted(model, found.x), y)
    torch.testing.assert_close(reached, worst, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        losses.cross_entropy(predicted(model, found.x), y), torch.nn.functional.softplus(-worst), rtol=1e-6, atol=1e-6
    )


@each_norm
@pytest.mark.parametrize("name", list(ATTACKS))
def test_succeeds_exactly_beyond_the_exact_distance(name: str, norm: Norm, generator: torch.Generator) -> None:
    weight, x = drawn(generator, 2, 7), drawn(generator, 20, 7)
    model = linear(weight)
    y = predicted(model, x).argmax(1)
    distance = losses.logit_margin(predicted(model, x), y) / (weight[0] - weight[1]).norm(p=DUAL[norm])
    attack = replace(ATTACKS[name], norm=norm)
    assert not attack(model, x, y, eps=distance * (1 - 1e-5)).success.any()
    assert attack(model, x, y, eps=distance * (1 + 1e-5)).success.all()


@each_norm
def test_target_is_reached_exactly_beyond_its_distance(norm: Norm, generator: torch.Generator) -> None:
    """Four classes: towards the nearest one, no third class comes in between."""
    weight, x = drawn(generator, 4, 7), drawn(generator, 20, 7)
    model = linear(weight)
    logits = predicted(model, x)
    y = logits.argmax(1)
    gaps = logits.gather(1, y[:, None]) - logits
    distances = gaps / (weight[y][:, None] - weight).norm(p=DUAL[norm], dim=2)
    distance, target = distances.scatter(1, y[:, None], float("inf")).min(1)
    attack = PGD(norm=norm, box=WIDE, steps=20, start="none", loss=losses.margin_loss, keep="worst")
    assert not attack(model, x, y, target=target, eps=distance * (1 - 1e-5)).success.any()
    assert attack(model, x, y, target=target, eps=distance * (1 + 1e-3)).success.all()


def test_the_box_limits_the_worst_loss_of_linf(generator: torch.Generator) -> None:
    """In linf ball and box are one box, whose worst corner is known."""
    weight, x, y = drawn(generator, 2, 7), torch.rand(9, 7, generator=generator).double(), torch.arange(9) % 2
    model, eps = linear(weight), 0.4
    towards = (weight[1 - y] - weight[y]).sign()
    corner = (x + eps * towards).clamp(0, 1)
    found = PGD(steps=10)(model, x, y, eps=eps).x
    torch.testing.assert_close(found, corner, rtol=0, atol=1e-7)


def test_l1_leaves_the_corner_of_the_box_by_the_best_open_way(generator: torch.Generator) -> None:
    """The entry of the largest gradient points out of the box; a step that insisted on it would never move."""
    weight = torch.tensor([[0.0, 0.0, 0.0], [-3.0, 2.0, 1.0]], dtype=torch.float64)
    x, y = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0])
    found = PGD(norm="l1", steps=10, start="none")(linear(weight), x, y, eps=0.5).x
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.5, 0.0]], dtype=torch.float64))
