"""Losses against values computed by hand, their definitions and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wideberth import losses
from wideberth.checks import InputError

CLEAN = torch.tensor([[2, 1, 0, -1], [0.5, 1.5, 0, -0.5]], dtype=torch.float64)
ADV = torch.tensor([[1, 1.5, 0, -1], [0, 2, 0.5, -0.5]], dtype=torch.float64)
Y = torch.tensor([0, 1])
TARGET = torch.tensor([1, 2])


def towards(loss: losses.Loss) -> losses.Loss:
    """The targeted form of a loss, with the targets of this file."""
    return lambda logits, y: losses.towards(loss)(logits, y, TARGET)


EVERY_LOSS: dict[str, losses.Loss] = {
    "cross_entropy": losses.cross_entropy,
    "margin_loss": losses.margin_loss,
    "soft_margin_loss": losses.soft_margin_loss,
    "probability_margin_loss": losses.probability_margin_loss,
    "unsaturated_margin_loss": losses.unsaturated_margin_loss,
    "dlr_loss": losses.dlr_loss,
    "LabelSmoothing": losses.LabelSmoothing(0.2),
    "AdditiveMargin": losses.AdditiveMargin(0.2, 3.0),
    "targeted cross_entropy": towards(losses.cross_entropy),
    "targeted margin_loss": towards(losses.margin_loss),
    "targeted dlr_loss": towards(losses.dlr_loss),
}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (losses.cross_entropy(CLEAN, Y), [0.440190, 0.546006]),
        (losses.cross_entropy(ADV, Y), [1.148017, 0.365025]),
        (losses.kl_divergence(CLEAN, ADV), [0.233300, 0.071313]),
        (losses.kl_divergence(ADV, CLEAN), [0.236449, 0.058543]),
        (losses.probability_margin_loss(ADV, Y), [0.205817, -0.539287]),
        (losses.unsaturated_margin_loss(ADV, Y), [0.205817, -0.539287]),
        (losses.unsaturated_margin_loss(20 * ADV, Y), [0.999909, -21.0]),
        (losses.dlr_loss(ADV, Y), [1 / 3, -0.75]),
        (losses.dlr_loss(CLEAN, Y), [-0.5, -2 / 3]),
        (towards(losses.dlr_loss)(ADV, Y), [0.25, -2 / 3]),
        (losses.margin_loss(ADV, Y), [0.5, -1.5]),
        (losses.logit_margin(ADV, Y), [-0.5, 1.5]),
        (losses.soft_margin_loss(ADV, Y), [0.766368, -0.819730]),
        (losses.center_distance(ADV, Y), [-1.0, -2.0]),
        (losses.AdditiveMargin(0, 15.0)(ADV, Y), [1.148017, 0.365025]),
        (losses.LabelSmoothing(0)(ADV, Y), [1.148017, 0.365025]),
        (towards(losses.margin_loss)(ADV, Y), [0.5, -1.5]),
        (towards(losses.cross_entropy)(ADV, Y), [-0.648017, -1.865025]),
    ],
)
def test_values(value: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1.5e-6)


def test_label_smoothing_of_the_bag_of_tricks_is_not_torchs() -> None:
    """Torch's share s gives the wrong classes s (K - 1) / K together."""
    smoothed = losses.LabelSmoothing(0.2)(ADV, Y).mean().item()
    assert smoothed == pytest.approx(1.039854, abs=6e-7)
    theirs = F.cross_entropy(ADV, Y, label_smoothing=0.2).item()
    assert theirs == pytest.approx(0.969021, abs=6e-7)
    assert losses.LabelSmoothing(0.2 * 3 / 4)(ADV, Y).mean().item() == pytest.approx(theirs, rel=1e-12)


def test_label_smoothing_is_least_at_its_own_target() -> None:
    target = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05]], dtype=torch.float64)
    logits = target.log().requires_grad_()
    (gradient,) = torch.autograd.grad(losses.LabelSmoothing(0.1)(logits, Y).sum(), logits)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize(("margin", "value"), [(0.2, 0.0026001), (0, 0.00012961)])
def test_additive_margin(margin: float, value: float) -> None:
    """Of logits that are 15 * cosine; the fact sheet's oracle of hypersphere embedding."""
    cosine = torch.tensor([[0.9, 0.1, -0.2, 0.3]], dtype=torch.float64)
    paid = losses.AdditiveMargin(margin, 15.0)(15 * cosine, Y[:1])
    assert paid.item() == pytest.approx(value, rel=1e-4)
    assert losses.AdditiveMargin(margin, 15.0)(15 * cosine.float(), Y[:1]).dtype == torch.float32


@pytest.mark.parametrize("scale", [1.0, 10.0, 1e4])
def test_additive_margin_is_finite_at_any_scale(scale: float) -> None:
    logits = scale * torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    assert losses.AdditiveMargin(0.35, scale)(logits, Y).isfinite().all()


def test_center_distance_is_that_to_the_centre_of_the_label() -> None:
    features = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    centres = torch.tensor([[3.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    logits = -0.5 * (features[:, None] - centres).square().sum(2)
    assert losses.center_distance(logits, Y).tolist() == [0.5 * 8, 0.5 * 4]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.LabelSmoothing(1.2), r"share=1.2: a share, must be in \[0, 1\]"),
        (lambda: losses.LabelSmoothing(-0.1), "share=-0.1: must be at least 0"),
        (lambda: losses.LabelSmoothing(float("nan")), "share=nan: must be at least 0"),
        (lambda: losses.AdditiveMargin(-0.1), "margin=-0.1: must be at least 0"),
        (lambda: losses.AdditiveMargin(scale=-1), "scale=-1: must be at least 0"),
    ],
)
def test_losses_refuse_numbers_that_make_no_sense(make: Callable[[], losses.Loss], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_trades_total() -> None:
    """Six-digit oracle of the whole: CE(clean) + 6 KL(clean || adversarial), averaged."""
    total = (losses.cross_entropy(CLEAN, Y) + 6 * losses.kl_divergence(CLEAN, ADV)).mean()
    assert total.item() == pytest.approx(1.406938, abs=6e-7)


@pytest.mark.parametrize("name", list(EVERY_LOSS))
def test_gradient_is_that_of_finite_differences_and_stays_in_its_row(name: str) -> None:
    logits = ADV.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: EVERY_LOSS[name](z, Y), (logits,))
    (gradient,) = torch.autograd.grad(EVERY_LOSS[name](logits, Y)[0], logits)
    assert gradient[0].any()
    assert not gradient[1].any()


def test_kl_is_differentiable_in_both_arguments() -> None:
    assert torch.autograd.gradcheck(
        losses.kl_divergence, (CLEAN.clone().requires_grad_(), ADV.clone().requires_grad_())
    )


def test_kl_agrees_with_torch() -> None:
    theirs = F.kl_div(ADV.log_softmax(1), CLEAN.softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(losses.kl_divergence(CLEAN, ADV), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("clean", "adversarial"), [(1e4, 0.0), (0.0, 1e4), (1e4, -1e4), (1e4, 1e4)])
def test_kl_with_exact_zeros_has_no_nan(clean: float, adversarial: float, dtype: torch.dtype) -> None:
    """A probability that underflows to zero is what turned TRADES into NaN (yaodongyu/TRADES#30)."""
    p = torch.tensor([[clean, 0.0, -clean]], dtype=dtype, requires_grad=True)
    q = torch.tensor([[adversarial, 0.0, 1.0]], dtype=dtype, requires_grad=True)
    value = losses.kl_divergence(p, q)
    value.sum().backward()
    assert value.isfinite().all()
    assert value >= 0
    assert p.grad is not None
    assert q.grad is not None
    assert p.grad.isfinite().all()
    assert q.grad.isfinite().all()


def test_kl_has_no_gradient_where_both_arguments_agree() -> None:
    """Why an attack on the KL must not start at the clean input."""
    logits = CLEAN.clone().requires_grad_()
    value = losses.kl_divergence(CLEAN, logits)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-10


@pytest.mark.parametrize(
    ("loss", "classes", "least"), [(losses.dlr_loss, 2, "at least 3"), (towards(losses.dlr_loss), 3, "at least 4")]
)
def test_dlr_refuses_too_few_classes(loss: losses.Loss, classes: int, least: str) -> None:
    with pytest.raises(InputError, match=f"needs {least} classes, the model has {classes}"):
        loss(ADV[:, :classes], Y)
    assert loss(torch.cat([ADV, ADV], 1)[:, : classes + 1], Y).shape == (2,)


@pytest.mark.parametrize("loss", [losses.dlr_loss, towards(losses.dlr_loss)])
@pytest.mark.parametrize("change", [lambda z: 1000 * z, lambda z: z - 7])
def test_dlr_sees_neither_scale_nor_shift(loss: losses.Loss, change: Callable[[Tensor], Tensor]) -> None:
    torch.testing.assert_close(loss(change(ADV), Y), loss(ADV, Y), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list(EVERY_LOSS))
def test_equal_logits_give_no_nan(name: str) -> None:
    logits = torch.zeros(2, 4, requires_grad=True)
    value = EVERY_LOSS[name](logits, Y)
    value.sum().backward()
    assert value.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", list(EVERY_LOSS))
def test_higher_is_more_wrong(name: str) -> None:
    """Moving logit from the label to the other class raises every loss."""
    other = torch.tensor([1, 2])
    moved = ADV - 0.3 * F.one_hot(Y, 4) + 0.3 * F.one_hot(other, 4)
    assert (EVERY_LOSS[name](moved, Y) > EVERY_LOSS[name](ADV, Y)).all()


def test_soft_margin_is_above_the_margin_and_meets_it_at_large_scale() -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(50) % 6
    soft, hard = losses.soft_margin_loss(logits, y), losses.margin_loss(logits, y)
    assert (soft >= hard).all()
    sharp = losses.soft_margin_loss(1e4 * logits, y) / 1e4
    torch.testing.assert_close(sharp, hard, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("logits", "wrong"),
    [
        ([1.0, 0.0, 0.0], [False, True, True]),
        ([1.0, 1.0, 0.0], [True, True, True]),
        ([0.0, 0.0, 0.0], [True, True, True]),
        ([float("nan"), 1.0, 0.0], [True, True, True]),
        ([0.0, 1.0], [True, False]),
    ],
)
def test_misclassified_counts_ties_and_nan_as_wrong(logits: list[float], wrong: list[bool]) -> None:
    for y, expected in enumerate(wrong):
        assert losses.misclassified(torch.tensor([logits]), torch.tensor([y])).tolist() == [expected]


def test_two_classes_have_margins() -> None:
    logits = torch.tensor([[0.0, 2.0], [3.0, 1.0]])
    assert losses.logit_margin(logits, Y).tolist() == [-2.0, -2.0]
    torch.testing.assert_close(losses.soft_margin_loss(logits, Y), torch.tensor([2.0, 2.0]))


def test_predictions() -> None:
    found: Any = losses.predictions(ADV)
    assert found.tolist() == [1, 1]
    assert found.dtype == torch.int64


def test_the_unsaturated_margin_rises_throughout_and_float32_knows_its_slope() -> None:
    lead = torch.linspace(-100, 100, 801)
    logits = torch.stack([lead, torch.zeros(801), torch.full((801,), -3.0)], 1).requires_grad_()
    values = losses.unsaturated_margin_loss(logits, torch.zeros(801, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    leading = lead > -5  # where it has been misled that far, an attack has nothing left to do
    assert (values.diff() <= 0).all()
    assert (values.diff() < 0)[leading[1:]].all()
    assert (gradient[leading, 0] < 0).all()
    assert (gradient[leading, 1] > 0).all()
    flat = losses.probability_margin_loss(logits, torch.zeros(801, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(flat.sum(), logits)
    assert (gradient[lead > 50, 0] == 0).all()
