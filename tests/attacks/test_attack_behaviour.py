"""What the options of attacks mean, and what attacks refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from attack_oracles import Counting, linear, network, predicted
from torch import Tensor, nn

from wideberth import losses
from wideberth.attacks import FGSM, PGD, SUITES, Attack, ScaledStep, Stage, suite
from wideberth.attacks.base import input_gradient
from wideberth.checks import InputError

LINE = linear(torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.tensor([0.35, 0.0]))
"""One input in [0, 1]: class 0 below 0.35, class 1 above."""
ORIGIN, ZERO = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0])


def walk(**options: Any) -> PGD:
    """From 0 by tenths: the iterates are 0, 0.1, 0.2, ..."""
    return PGD(**({"steps": 6, "step_size": 0.1, "start": "none"} | options))


@pytest.mark.parametrize(("keep", "point"), [("last", 0.6), ("worst", 0.6), ("first_flip", 0.4)])
def test_keep_decides_which_iterate_of_a_broken_sample_is_returned(keep: Any, point: float) -> None:
    found = walk(keep=keep)(LINE, ORIGIN, ZERO, eps=1.0)
    assert found.x.item() == pytest.approx(point)
    assert found.success.tolist() == [True]
    assert found.steps_survived.tolist() == [4]


@pytest.mark.parametrize("keep", ["last", "worst", "first_flip"])
def test_keep_returns_the_furthest_iterate_of_an_unbroken_sample(keep: Any) -> None:
    found = walk(keep=keep)(LINE, ORIGIN, ZERO, eps=0.3)
    assert found.x.item() == pytest.approx(0.3)
    assert found.success.tolist() == [False]
    assert found.steps_survived.tolist() == [6]


class Rightwards(torch.autograd.Function):
    """Logits of one input in [0, 1], whose gradient always points to the right: class 1 wins around 0.5 only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gap = torch.where(x < 0.45, -0.1 - (x - 0.2).abs(), torch.where(x < 0.55, 0.01, x - 2))
        return torch.cat([torch.zeros_like(x), gap], dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.ones_like(gradient[:, :1])


class March(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Rightwards.apply(x)


def highest_at_a_fifth(logits: Tensor, y: Tensor) -> Tensor:
    """A loss of `March` that is highest at 0.2, where the class is still right."""
    return -(logits[:, 1] + 0.1).abs()


@pytest.mark.parametrize(
    ("keep", "eps", "point", "success", "steps_survived"),
    [
        ("last", 1.0, 0.8, False, 5),
        ("worst", 1.0, 0.5, True, 5),
        ("first_flip", 1.0, 0.5, True, 5),
        ("last", 0.4, 0.4, False, 8),
        ("worst", 0.4, 0.2, False, 8),
        ("first_flip", 0.4, 0.4, False, 8),
    ],
)
def test_worst_prefers_a_flip_to_a_loss_and_last_forgets_both(
    keep: Any, eps: float, point: float, success: bool, steps_survived: int
) -> None:
    found = walk(steps=8, keep=keep, loss=highest_at_a_fifth)(March(), ORIGIN, ZERO, eps=eps)
    assert found.x.item() == pytest.approx(point)
    assert found.success.tolist() == [success]
    assert found.steps_survived.tolist() == [steps_survived]


@pytest.mark.parametrize("batch", [1, 5])
def test_input_gradient_is_that_of_each_sample_alone(batch: int) -> None:
    weight = torch.tensor([[1.0, 2.0], [-3.0, 0.5]], dtype=torch.float64)
    x, y = torch.rand(batch, 2, dtype=torch.float64), torch.arange(batch) % 2
    logits, values, gradient = input_gradient(linear(weight), x, lambda z: losses.margin_loss(z, y))
    torch.testing.assert_close(gradient, weight[1 - y] - weight[y])
    torch.testing.assert_close(values, losses.margin_loss(logits, y))
    assert not any(t.requires_grad for t in (logits, values, gradient, x))


def test_restarts_run_only_what_is_unbroken_and_keep_what_broke() -> None:
    """Rows 0 and 1 fall at once, row 2 never; a restart must not touch the first two again."""
    x = torch.tensor([[0.3], [0.2], [0.0]], dtype=torch.float64)
    y, eps = torch.zeros(3, dtype=torch.int64), torch.tensor([0.2, 0.3, 0.1])
    once = PGD(steps=5)(LINE, x, y, eps=eps)
    counting = Counting(LINE)
    thrice = PGD(steps=5, restarts=3)(counting, x, y, eps=eps)
    assert once.success.tolist() == thrice.success.tolist() == [True, True, False]
    assert torch.equal(once.x, thrice.x)
    assert thrice.evaluations.tolist() == [11, 11, 33]
    assert thrice.steps_survived[2] == 3 * once.steps_survived[2] == 15
    assert counting.forwards + counting.backwards == 1 + 55


def test_restarts_break_more_and_unbreak_nothing() -> None:
    """One step from a random point of a bumpy net: another start finds what the first missed."""
    generator = torch.Generator().manual_seed(2)
    model, x = network(), torch.rand(200, 6, generator=generator).double()
    y = predicted(model, x).argmax(1)
    one, many = (PGD(steps=1, restarts=n)(model, x, y, eps=0.15).success for n in (1, 5))
    assert (many | ~one).all()
    assert many.sum() > one.sum()


@pytest.mark.parametrize(
    ("rule", "sizes"),
    [
        (ScaledStep(2.5), [0.0, 0.025, 0.1]),
        (ScaledStep(2, floor=0.03), [0.03, 0.03, 0.08]),
    ],
)
def test_scaled_step_follows_the_radius_down_to_its_floor(rule: ScaledStep, sizes: list[float]) -> None:
    found = rule(torch.tensor([0.0, 0.1, 0.4], dtype=torch.float64), 10)
    torch.testing.assert_close(found, torch.tensor(sizes, dtype=torch.float64))


def test_targeted_loss_bound_beforehand_is_a_loss_like_any_other() -> None:
    model, x = network(), torch.full((1, 6), 0.4, dtype=torch.float64)
    y = predicted(model, x).argmax(1)
    target = (y + 2) % 4
    found = PGD(steps=20, loss=lambda z, y: losses.targeted_margin_loss(z, y, target))(model, x, y, eps=1.0)
    assert torch.equal(predicted(model, found.x).argmax(1), target)


@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
def test_model_is_attacked_in_the_mode_asked_for_and_given_back(mode: Any) -> None:
    seen: list[list[bool]] = []

    def flags(model: nn.Module) -> list[bool]:
        return [module.training for module in model.modules()]

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad:
                seen.append(flags(self))
                assert not any(p.requires_grad for p in self.parameters())
            logits: Tensor = self.inner(x)
            return logits

    model = Watched()
    before = flags(model)
    PGD(steps=2)(model, torch.rand(5, 6).double(), torch.zeros(5, dtype=torch.int64), eps=0.1, mode=mode)
    assert seen == [{"eval": [False] * len(before), "train": [True] * len(before), "keep": before}[mode]] * 2
    assert flags(model) == before


def test_model_is_given_back_when_the_loss_fails() -> None:
    model = network()
    before = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]

    def failing(logits: Tensor, y: Tensor) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        PGD(loss=failing)(model, torch.zeros(2, 6).double(), torch.tensor([0, 1]), eps=0.1)
    assert ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]) == before


def test_works_under_no_grad() -> None:
    case = network(), torch.full((2, 6), 0.4, dtype=torch.float64), torch.tensor([0, 1])
    with torch.no_grad():
        found = PGD(steps=2)(*case, eps=0.1)
    assert torch.equal(found.x, PGD(steps=2)(*case, eps=0.1).x)


def test_attacks_are_immutable() -> None:
    attack = PGD()
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l3"}, "norm='l3': accepted are linf, l2, l1"),
        ({"box": (1.0, 0.0)}, "box=(1.0, 0.0): must be (low, high)"),
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"restarts": 0}, "restarts=0: must be at least 1"),
        ({"step_size": -0.1}, "step_size=-0.1: must be at least 0"),
        ({"start": "random"}, "start='random': accepted are uniform, gaussian, none"),
        ({"keep": "best"}, "keep='best': accepted are last, worst, first_flip"),
    ],
)
@pytest.mark.parametrize("kind", [FGSM, PGD])
def test_refuses_options_that_make_no_sense(kind: type[Attack], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        kind(**options)
    assert str(refused.value).startswith(message)


class Const(nn.Module):
    """Always the same output."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1) + 0 * x.flatten(1).sum(1, keepdim=True)


class Detached(nn.Module):
    """Logits that autograd knows nothing of."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()[:, :2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -0.1}, "eps=-0.1: must be a finite number >= 0"),
        ({"eps": float("nan")}, "eps=nan: must be"),
        ({"eps": torch.tensor([0.1, 0.1])}, "eps of shape (2,): must be a number or one radius per sample"),
        ({"eps": torch.tensor([0.1, -0.1, 0.1])}, "eps holds a negative or non-finite radius"),
        ({"x": torch.full((3, 6), 1.5)}, "x spans [1.5, 1.5]: must lie in the box [0.0, 1.0]"),
        ({"x": torch.full((3, 6), torch.nan)}, "x spans [nan, nan]"),
        ({"x": torch.zeros(3, 6, dtype=torch.int64)}, "x is torch.int64: must be floating point"),
        ({"x": torch.zeros(0, 6)}, "x of shape (0, 6)"),
        ({"y": torch.tensor([0, 1])}, "y of shape (2,) and torch.int64: must be (3,)"),
        ({"y": torch.tensor([0.0, 1.0, 0.0])}, "y of shape (3,) and torch.float32"),
        ({"y": torch.tensor([0, 1, 2])}, "labels span 0..2: the model has 2 classes"),
        ({"y": torch.tensor([0, 1, -1])}, "labels span -1..1"),
        ({"target": torch.tensor([0, 1, 2])}, "labels span 0..2"),
        ({"model": Const(1.0)}, "the model returned shape (1, 1) for 1 inputs"),
        ({"model": Const(1.0, float("nan"))}, "the model returned NaN or infinite logits"),
        ({"model": Detached()}, "the model's output carries no gradient to its input"),
    ],
)
def test_refuses_what_cannot_be_attacked(change: dict[str, Any], message: str) -> None:
    given = {"model": Const(1.0, 0.0), "x": torch.full((3, 6), 0.5), "y": torch.tensor([0, 1, 0]), "eps": 0.1} | change
    with pytest.raises(InputError) as refused:
        PGD(steps=2)(given.pop("model"), given.pop("x"), given.pop("y"), **given)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_refuses_a_loss_that_is_not_per_sample() -> None:
    with pytest.raises(InputError, match=r"the loss returned shape \(\): must be one loss per sample, \(2,\)"):
        PGD(loss=nn.functional.cross_entropy)(network(), torch.zeros(2, 6).double(), torch.tensor([0, 1]), eps=0.1)


@pytest.mark.parametrize("name", list(SUITES))
def test_suites_are_attacks_of_the_norm_and_box_asked_for(name: str) -> None:
    line_up = suite(name, "l2", (-1.0, 1.0))
    assert line_up
    for part in line_up.values():
        attack = part.attack if isinstance(part, Stage) else part
        assert isinstance(attack, Attack)
        assert (attack.norm, attack.box) == ("l2", (-1.0, 1.0))


@pytest.mark.parametrize(("name", "norm"), [("all", "l2"), ("pgd", "l0")])
def test_refuses_suites_that_do_not_exist(name: str, norm: Any) -> None:
    with pytest.raises(InputError, match="accepted are"):
        suite(name, norm)
