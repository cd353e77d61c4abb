"""Effective margins against models whose exact distances are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wideberth import margins
from wideberth.attacks import PGD
from wideberth.checks import InputError, Norm

W = torch.tensor([[1, 0, 2], [0, -1, 1], [2, 1, 0], [0, 0, 1]], dtype=torch.float64)
X = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=torch.float64)
DUAL: dict[Norm, float] = {"linf": 1, "l2": 2, "l1": float("inf")}

each_norm = pytest.mark.parametrize("norm", list(DUAL))


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return layer


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(weight: Tensor, logits: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """Gap over dual norm of the difference of rows, for every class; infinite for the label's own."""
    gaps = logits.gather(1, y[:, None]) - logits
    distances = gaps / (weight[y][:, None] - weight).norm(p=DUAL[norm], dim=2)
    return distances.scatter(1, y[:, None], float("inf"))


@pytest.mark.parametrize(
    ("label", "per_class"),
    [
        (2, [{0: -0.122474, 1: 0.1, 3: 0.040825}, {0: -0.122474, 1: 0.4, 3: 0.285774}]),
        (0, [{1: 0.346410, 2: 0.122474, 3: 0.282843}, {1: 0.866025, 2: 0.122474, 3: 0.707107}]),
    ],
)
def test_worked_example_in_l2(label: int, per_class: list[dict[int, float]]) -> None:
    """Each class alone (a model of two classes), and the minimum of all."""
    y = torch.full((2,), label)
    margin, weight, nearest = margins.measure(linear(W), X, y)
    for row, expected in enumerate(per_class):
        for other, distance in expected.items():
            pair = linear(W[[label, other]])
            alone = margins.effective_margin(pair, X[row : row + 1], torch.tensor([0]))
            assert alone.item() == pytest.approx(distance, abs=1e-6)
        other = min(expected, key=lambda k: expected[k])
        assert margin[row].item() == pytest.approx(expected[other], abs=1e-6)
        assert nearest[row] == other
        assert weight[row].item() == pytest.approx((W[label] - W[other]).norm().item())


@each_norm
def test_linear_model_in_closed_form(norm: Norm) -> None:
    weight, x, y = drawn(5, 6), drawn(40, 6, seed=1), torch.arange(40) % 5
    model = linear(weight, drawn(5, seed=2))
    margin, size, nearest = margins.measure(model, x, y, norm)
    smallest, where = exact(weight, model(x).detach(), y, norm).min(1)
    torch.testing.assert_close(margin, smallest)
    assert torch.equal(nearest, where)
    torch.testing.assert_close(size, (weight[y] - weight[where]).norm(p=DUAL[norm], dim=1))
    assert (margin < 0).any()
    assert torch.equal(margin > 0, model(x).argmax(1) == y)


@each_norm
def test_margin_is_the_radius_at_which_an_attack_starts_to_succeed(norm: Norm) -> None:
    weight, x = drawn(2, 6), drawn(20, 6, seed=1)
    model = linear(weight)
    y = model(x).argmax(1)
    distance = margins.effective_margin(model, x, y, norm)
    attack = PGD(norm=norm, box=(-100.0, 100.0), steps=5, start="none")
    assert not attack(model, x, y, eps=distance * (1 - 1e-5)).success.any()
    assert attack(model, x, y, eps=distance * (1 + 1e-5)).success.all()


@each_norm
def test_relu_net_is_measured_in_the_linear_region_of_the_input(norm: Norm) -> None:
    """The region's own matrix W2 diag(active) W1 gives the same as a linear model would."""
    first, second = linear(drawn(8, 6), drawn(8, seed=1)), linear(drawn(3, 8, seed=2), drawn(3, seed=3))
    model, x, y = nn.Sequential(first, nn.ReLU(), second), drawn(10, 6, seed=4), torch.arange(10) % 3
    margin = margins.effective_margin(model, x, y, norm)
    for row in range(10):
        active = (first(x[row]) > 0).double()
        weight = second.weight @ (active[:, None] * first.weight)
        expected = exact(weight.detach(), model(x[row : row + 1]).detach(), y[row : row + 1], norm).min()
        assert margin[row].item() == pytest.approx(expected.item(), rel=1e-9)


def test_relu_net_distance_is_exact_where_the_region_is_wide_enough() -> None:
    """|x1| decides: the boundary at x1 = 0.5 is reached before the kink at 0."""
    first = linear(torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64))
    second = linear(torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64), torch.tensor([0.0, 0.5]))
    model = nn.Sequential(first, nn.ReLU(), second)
    x = torch.tensor([[0.7, 3.0], [-0.9, 1.0], [0.3, 0.0]], dtype=torch.float64)
    margin = margins.effective_margin(model, x, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(margin, torch.tensor([0.2, 0.4, 0.2], dtype=torch.float64))


@each_norm
def test_scale_of_the_logits_moves_the_weight_and_not_the_margin(norm: Norm) -> None:
    weight, bias, x, y = drawn(5, 6), drawn(5, seed=2), drawn(20, 6, seed=1), torch.arange(20) % 5
    margin, size, nearest = margins.measure(linear(weight, bias), x, y, norm)
    scaled = margins.measure(linear(1000 * weight, 1000 * bias), x, y, norm)
    torch.testing.assert_close(scaled[0], margin)
    torch.testing.assert_close(scaled[1], 1000 * size)
    assert torch.equal(scaled[2], nearest)


@pytest.mark.parametrize("batch_size", [1, 7, 20, 1000])
def test_batch_size_does_not_matter(batch_size: int) -> None:
    model = nn.Sequential(linear(drawn(8, 6)), nn.Tanh(), linear(drawn(4, 8, seed=1)))
    x, y = drawn(20, 6, seed=2), torch.arange(20) % 4
    for found, expected in zip(
        margins.measure(model, x, y, batch_size=batch_size), margins.measure(model, x, y), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_two_classes_and_inputs_of_any_rank() -> None:
    weight, x = drawn(2, 12), drawn(4, 3, 2, 2, seed=1)
    y = torch.tensor([0, 1, 0, 1])
    margin, _, nearest = margins.measure(nn.Sequential(nn.Flatten(), linear(weight)), x, y)
    torch.testing.assert_close(margin, margins.effective_margin(linear(weight), x.flatten(1), y))
    assert torch.equal(nearest, 1 - y)


def test_constant_model_is_infinitely_far_from_its_boundary() -> None:
    """Infinite where right, minus infinite where wrong, zero at a tie; nothing is NaN."""
    model = linear(torch.zeros(3, 6, dtype=torch.float64), torch.tensor([2.0, 1.0, 2.0]))
    margin, size, _ = margins.measure(model, drawn(2, 6), torch.tensor([0, 1]))
    assert margin.tolist() == [0.0, -float("inf")]
    assert size.tolist() == [0.0, 0.0]
    alone = linear(torch.zeros(2, 6, dtype=torch.float64), torch.tensor([2.0, 1.0]))
    assert margins.effective_margin(alone, drawn(1, 6), torch.tensor([0])).item() == float("inf")


def test_model_is_measured_in_eval_mode_and_given_back_as_it_was() -> None:
    model = nn.Sequential(linear(drawn(4, 6)), nn.BatchNorm1d(4, dtype=torch.float64), nn.Dropout(0.5))
    model[1].eval()
    model[0].bias.requires_grad_(False)
    flags = [module.training for module in model.modules()]
    state, generator = {name: v.clone() for name, v in model.state_dict().items()}, torch.random.get_rng_state()
    x, y = drawn(5, 6, seed=1), torch.arange(5) % 4
    found = margins.measure(model, x, y)[0], margins.logit_margin(model, x, y)
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), generator)
    model.eval()
    assert torch.equal(found[0], margins.effective_margin(model, x, y))
    assert not found[0].requires_grad
    assert not found[1].requires_grad


def test_short_names_are_parts_of_measure() -> None:
    model, y = linear(W), torch.tensor([0, 3])
    margin, size, _ = margins.measure(model, X, y, "linf")
    assert torch.equal(margins.effective_margin(model, X, y, "linf"), margin)
    assert torch.equal(margins.effective_weight_norm(model, X, y, "linf"), size)
    torch.testing.assert_close(margins.logit_margin(model, X, y), margin * size)


class Detached(nn.Module):
    """Logits that autograd knows nothing of, so that every gradient would look like zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()[:, :2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "l0"}, "norm='l0': accepted are linf, l2, l1"),
        ({"y": torch.tensor([0, 4])}, "labels span 0..4: the model has 4 classes"),
        ({"y": torch.tensor([0])}, "2 inputs and 1 labels"),
        ({"y": torch.tensor([0, 1, 2]), "batch_size": 1}, "2 inputs and 3 labels"),
        ({"x": X[:0], "y": torch.tensor([], dtype=torch.int64)}, "0 inputs and 0 labels"),
        ({"model": linear(W[:1])}, "the model returned shape (2, 1)"),
        ({"model": linear(W * float("nan"))}, "the model returned NaN or infinite logits"),
        ({"model": Detached()}, "the model's output carries no gradient to its input"),
    ],
)
def test_refuses_what_cannot_be_measured(change: dict[str, Any], message: str) -> None:
    given = {"model": linear(W), "x": X, "y": torch.tensor([0, 1])} | change
    with pytest.raises(InputError) as refused:
        margins.measure(**given)
    assert str(refused.value).startswith(message)
