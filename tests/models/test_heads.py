"""Heads: logits by their definition, centres by their Gram matrix, and where they can be put."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wideberth.acceleration import optimised_copy
from wideberth.checks import InputError
from wideberth.models import MLP, CosineHead, MahalanobisHead, last_layer
from wideberth.models.heads import simplex

FEATURES = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))


def test_cosine_logits_are_scaled_cosines() -> None:
    head = CosineHead(12, 4, scale=7.0)
    expected = 7 * F.cosine_similarity(FEATURES[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(head(FEATURES), expected)


def test_cosines_are_at_most_one_whatever_the_lengths() -> None:
    head = CosineHead(12, 4)
    head.weight.data *= torch.tensor([1e-3, 1.0, 1e3, 1e6])[:, None]
    along = torch.cat([head.weight.detach(), -head.weight.detach(), 1e4 * FEATURES, torch.zeros(1, 12)])
    assert (head(along).abs() / head.scale).max() <= 1 + 1e-6
    torch.testing.assert_close(head(along)[:4].diagonal(), torch.full((4,), 15.0))
    assert not head(along)[-1].any()


def test_cosine_logits_ignore_lengths_and_leave_the_weights_alone() -> None:
    head = CosineHead(12, 4).double()
    features, before = FEATURES.double().requires_grad_(), head.weight.detach().clone()
    logits = head(features)
    torch.testing.assert_close(head(3 * features), logits)
    logits.square().sum().backward()
    assert torch.equal(head.weight, before)
    assert head.weight.grad is not None
    # What changes only a length changes nothing: gradients are orthogonal to weights and features.
    assert (head.weight.grad * head.weight).sum(1).abs().max() < 1e-9
    assert features.grad is not None
    assert (features.grad * features).sum(1).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_features_that_are_all_zero_have_finite_gradients(dtype: torch.dtype) -> None:
    head, zero = CosineHead(12, 4).to(dtype), torch.zeros(2, 12, dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(head(zero).sum() * 1e-4, zero)
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(head(zero)).all()


@pytest.mark.parametrize(("classes", "features"), [(2, 1), (2, 6), (3, 2), (10, 9), (10, 30), (100, 99)])
def test_centres_are_a_simplex(classes: int, features: int) -> None:
    centres = MahalanobisHead(features, classes, radius=3.0).centers
    assert centres.shape == (classes, features)
    gram = torch.full((classes, classes), -9 / (classes - 1)).fill_diagonal_(9)
    torch.testing.assert_close(centres @ centres.T, gram, rtol=0, atol=1e-5)
    torch.testing.assert_close(centres.sum(0), torch.zeros(features), rtol=0, atol=1e-4)


def test_the_first_centres_are_those_of_the_recursion() -> None:
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for k in range(4):
        for j in range(min(k, 3)):
            earlier = expected[k, :j] @ expected[j, :j]
            expected[k, j] = (-1 / 3 - earlier) / expected[j, j]
        if k < 3:
            expected[k, k] = (1 - expected[k, :k].square().sum()).sqrt()
    torch.testing.assert_close(simplex(4, 3), expected.float())


@pytest.mark.parametrize("embed", [False, True])
def test_mahalanobis_logits_are_scaled_squared_distances(embed: bool) -> None:
    head = MahalanobisHead(12, 4, radius=2.0, scale=0.7, embed=embed)
    embedded = head.embed(10 * FEATURES)
    expected = -0.7 * (embedded[:, None] - head.centers).square().sum(2)
    torch.testing.assert_close(head(10 * FEATURES), expected, rtol=1e-5, atol=1e-4)
    assert (head(10 * FEATURES) <= 0).all()
    assert sorted(dict(head.named_parameters())) == (["embed.bias", "embed.weight"] if embed else [])


def test_at_the_centres_the_original_scale_hides_the_gradient_and_the_default_does_not() -> None:
    def at_centres(head: MahalanobisHead) -> tuple[torch.Tensor, torch.Tensor]:
        h = head.centers.clone().requires_grad_()
        losses = F.cross_entropy(head(h), torch.arange(10), reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), h)
        return losses, gradient.norm(dim=1)

    losses, gradients = at_centres(MahalanobisHead(16, 10, scale=1.0, embed=False))
    assert not losses.any()
    assert not gradients.any()
    losses, gradients = at_centres(MahalanobisHead(16, 10, embed=False))
    assert losses.min() > 1e-4
    assert gradients.min() > 1e-4
    logits = MahalanobisHead(16, 10, embed=False)
    leads = logits(logits.centers).topk(2).values
    torch.testing.assert_close(leads[:, 0] - leads[:, 1], torch.full((10,), 100 / 9))


def test_centres_are_no_parameters_but_travel_with_the_weights() -> None:
    head = MahalanobisHead(12, 4)
    assert "centers" in head.state_dict()
    assert all(parameter is not head.centers for parameter in head.parameters())


@pytest.mark.parametrize("name", ["cosine", "mahalanobis"])
def test_the_optimised_copies_agree(name: str) -> None:
    torch.manual_seed(0)
    model, x = MLP((1, 8, 8), hidden=(16, 12), head=name).eval(), torch.rand(5, 1, 8, 8)
    for copy in (optimised_copy(model, x), optimised_copy(model, x, "bfloat16")):
        torch.testing.assert_close(copy(x), model(x), rtol=0, atol=0.3)


@pytest.mark.parametrize(
    ("name", "kind", "scale"),
    [
        ("linear", nn.Linear, None),
        ("cosine", CosineHead, 15.0),
        ("cosine(scale=4)", CosineHead, 4),
        ("wideberth.models.CosineHead(scale=10)", CosineHead, 10),
        ("wideberth.models:MahalanobisHead(10.0, 1.0)", MahalanobisHead, 1.0),
        (MahalanobisHead, MahalanobisHead, 0.05),
        (lambda features, classes: CosineHead(features, classes, 3.0), CosineHead, 3.0),
    ],
)
def test_heads_by_name(name: str | Callable[[int, int], nn.Module], kind: type, scale: float | None) -> None:
    head = last_layer(name, 12, 4)
    assert type(head) is kind
    assert head(FEATURES).shape == (6, 4)
    assert getattr(head, "scale", None) == scale


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: CosineHead(0, 4), "features=0"),
        (lambda: CosineHead(3, 1), "classes=1"),
        (lambda: CosineHead(3, 4, scale=0.0), "scale=0.0: must be a finite number > 0"),
        (lambda: MahalanobisHead(8, 10), "features=8: must be at least 9"),
        (lambda: MahalanobisHead(9, 10, radius=-1), "radius=-1"),
        (lambda: MahalanobisHead(9, 10, scale=float("inf")), "scale=inf"),
        (lambda: MLP((4,), hidden=(5,), head="mahalanobis"), "features=5: must be at least 9"),
        (lambda: last_layer("cosinus", 3, 4), "head='cosinus': accepted are linear, cosine, mahalanobis, or an import"),
        (lambda: last_layer("cosine(size=3)", 3, 4), "accepted are features"),
        (lambda: last_layer("torch.nn.NoHead", 3, 4), "no 'NoHead'"),
        (lambda: last_layer("math.gcd", 3, 4), "must give an nn.Module, gave int"),
        (lambda: last_layer(nn.Linear(3, 4), 3, 4), "such as its class"),
    ],
)
def test_heads_refuse(make: Callable[[], object], says: str) -> None:
    with pytest.raises(InputError, match=says) as refusal:
        make()
    assert "\n" not in str(refusal.value)
