"""MI-FGSM: what it adds up, where a linear model sends it, and that it is PGD where there is nothing to remember."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from attack_oracles import linear, network, predicted
from torch import Tensor, nn

from wideberth import geometry, losses
from wideberth.attacks.mi_fgsm import MIFGSM
from wideberth.attacks.pgd import PGD, ScaledStep
from wideberth.attacks.state import AttackInputs
from wideberth.checks import InputError, Norm
from wideberth.randomness import Noise

WIDE = (-100.0, 100.0)
DUAL: dict[Norm, float] = {"linf": 1, "l2": 2, "l1": math.inf}
each_norm = pytest.mark.parametrize("norm", list(DUAL))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Scripted(nn.Module):
    """The gradient of the loss in iteration t is `gradients[t]`, wherever it is asked."""

    def __init__(self, gradients: list[list[float]]) -> None:
        super().__init__()
        self.gradients, self.asked = torch.tensor(gradients, dtype=torch.float64), 0

    def forward(self, x: Tensor) -> Tensor:
        loss = x @ self.gradients[self.asked]
        self.asked += 1
        return torch.stack([loss, torch.full_like(loss, 1e9)], dim=1)  # far from a mistake


def first_logit(logits: Tensor, y: Tensor) -> Tensor:
    return logits[:, 0]


def walked(attack: MIFGSM, gradients: list[list[float]], eps: float) -> list[Tensor]:
    """Where a row from the origin goes that meets these gradients."""
    x = torch.zeros(1, len(gradients[0]), dtype=torch.float64)
    inputs = AttackInputs(x, torch.tensor([1]), torch.full((1,), eps, dtype=torch.float64), Noise(torch.arange(1)))
    attack, model = replace(attack, box=WIDE, loss=first_logit, steps=len(gradients)), Scripted(gradients)
    state, points = attack.init(inputs), []
    for _ in gradients:
        state = attack.update(model, inputs, state)
        points.append(state.point[0])
    return points


GRADIENTS = [[3.0, 1.0], [-4.0, 1.0], [-1.0, 0.0]]
"""Scaled to unit l1 norm and added: (.75, .25), (-.05, .45), (-1.05, .45)."""


@pytest.mark.parametrize(
    ("norm", "directions"),
    [
        ("linf", [[1.0, 1.0], [-1.0, 1.0], [-1.0, 1.0]]),
        ("l2", [[0.75, 0.25], [-0.05, 0.45], [-1.05, 0.45]]),
        ("l1", [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]),
    ],
)
def test_steps_follow_the_sum_of_gradients_of_unit_l1_norm(norm: Norm, directions: list[list[float]]) -> None:
    """Steps of 1, while the ball is far away: eps = 3 is reached by the third at the earliest."""
    points = walked(MIFGSM(norm=norm), GRADIENTS, eps=3.0)
    steps = torch.tensor(directions, dtype=torch.float64)
    if norm == "l2":
        steps = steps / steps.norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.stack(points), steps.cumsum(0))


def test_the_length_of_a_gradient_does_not_matter() -> None:
    """Even where its square, or its sum, would underflow or overflow."""
    plain = walked(MIFGSM(norm="l2"), GRADIENTS, eps=3.0)
    for factors in ([1e-300, 1.0, 1e300], [1e308 / 8, 1e-308, 1.0]):
        scaled = [[g * factor for g in gradient] for gradient, factor in zip(GRADIENTS, factors, strict=True)]
        torch.testing.assert_close(walked(MIFGSM(norm="l2"), scaled, eps=3.0), plain)


def test_decay_weighs_the_past() -> None:
    """With mu = 1/2 the sum is (.75, .25), (-.425, .325), (-1.2125, .1625); with 2, (.75, .25), (.7, .7), (.4, 1.4)."""
    half = walked(MIFGSM(norm="l1", decay=0.5), GRADIENTS, eps=3.0)
    torch.testing.assert_close(half[-1], torch.tensor([-1.0, 0.0], dtype=torch.float64))
    double = walked(MIFGSM(norm="l1", decay=2.0), [[3.0, 1.0], [-4.0, 1.1], [-1.0, 0.0]], eps=3.0)
    torch.testing.assert_close(double[-1], torch.tensor([1.0, 2.0], dtype=torch.float64))


@each_norm
def test_without_momentum_it_is_pgd(norm: Norm) -> None:
    model = network().eval()
    x = torch.rand(8, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = predicted(model, x).argmax(1)
    for start in ("none", "uniform"):
        plain = PGD(norm=norm, steps=5, step_size=ScaledStep(1.0), start=start)(model, x, y, eps=0.6)
        found = MIFGSM(norm=norm, steps=5, start=start, decay=0.0)(model, x, y, eps=0.6)
        torch.testing.assert_close(found.x, plain.x, rtol=0, atol=1e-12)
    remembering = MIFGSM(norm=norm, steps=5, start="uniform")(model, x, y, eps=0.6)
    if norm != "l1":  # one entry leads from the start, and memory has nothing to add
        assert not torch.allclose(remembering.x, plain.x)


@each_norm
def test_reaches_the_worst_loss_of_the_ball(norm: Norm) -> None:
    """Two classes, from the input, k steps of eps / k: exactly to the boundary, where the margin is known."""
    weight, x, y = drawn(2, 7), drawn(9, 7, seed=1), torch.arange(9) % 2
    eps = torch.linspace(0.1, 2, 9, dtype=torch.float64)
    model = linear(weight, torch.tensor([0.3, -0.2]))
    found = MIFGSM(norm=norm, box=WIDE)(model, x, y, eps=eps)
    worst = losses.logit_margin(predicted(model, x), y) - eps * (weight[0] - weight[1]).norm(p=DUAL[norm])
    torch.testing.assert_close(losses.logit_margin(predicted(model, found.x), y), worst, rtol=0, atol=1e-9)
    torch.testing.assert_close(geometry.norm(found.x - x, norm), eps)


def test_a_gradient_of_zero_changes_nothing_and_stands_in_nobodys_way() -> None:
    points = walked(MIFGSM(), [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]], eps=3.0)
    expected = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(points), expected)


def test_l1_leaves_the_corner_of_the_box_by_the_best_open_way() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [-3.0, 2.0, 1.0]], dtype=torch.float64)
    x, y = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0])
    found = MIFGSM(norm="l1")(linear(weight), x, y, eps=0.5).x
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.5, 0.0]], dtype=torch.float64))


def test_rows_that_join_later_do_what_they_do_alone() -> None:
    model = network().eval()
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y, eps = predicted(model, x).argmax(1), torch.full((4,), 0.1, dtype=torch.float64)
    inputs = AttackInputs(x, y, eps, Noise(torch.arange(4)))
    attack = MIFGSM(norm="l2", steps=6, keep="worst")
    alone = attack.init(inputs)
    for _ in range(6):
        alone = attack.update(model, inputs, alone)
    early, late = inputs.rows(torch.arange(2)), inputs.rows(torch.arange(2, 4))
    state = attack.init(early)
    for _ in range(3):
        state = attack.update(model, early, state)
    state, both = state.joined(attack.init(late)), early.joined(late)
    for _ in range(3):
        state = attack.update(model, both, state)
    state = state.rows(torch.arange(2, 4))
    for _ in range(3):
        state = attack.update(model, late, state)
    for name in ("best", "point", "momentum", "iteration", "evaluations"):
        torch.testing.assert_close(getattr(state, name), getattr(alone, name)[2:], rtol=0, atol=1e-12)


def test_refuses_a_negative_decay() -> None:
    with pytest.raises(InputError, match="decay"):
        MIFGSM(decay=-0.1)
