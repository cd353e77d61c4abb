"""What the tests of regularizers share: small nets in float64, and every regularizer with its value written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_tools import seeded

from wideberth.randomness import Noise
from wideberth.training.regularizers import (
    Curvature,
    EffectiveMargin,
    GradientAlignment,
    InputGradient,
    Jacobian,
    LocalLinearity,
    Regularizer,
    WeightNorm,
)


def convolutional(activation: type[nn.Module], pool: nn.Module, seed: int = 0) -> nn.Module:
    """A small net in float64 for inputs (B, 2, 6, 6) whose batch norm has statistics of its own."""

    def make() -> nn.Module:
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            activation(),
            pool,
            nn.Conv2d(4, 5, 2),
            activation(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(20, 3),
        )
        norm = model[1]
        assert isinstance(norm, nn.BatchNorm2d)
        for value in (norm.running_mean, norm.bias.data):
            assert value is not None
            value.normal_(0, 0.3)
        for value in (norm.running_var, norm.weight.data):
            assert value is not None
            value.uniform_(0.5, 2)
        model[8].weight.data.mul_(10)  # so that gradients are of order one
        return model.double()

    made: nn.Module = seeded(make, seed)
    return made


NETS: dict[str, Callable[[], nn.Module]] = {
    "relu, max pool": lambda: convolutional(nn.ReLU, nn.MaxPool2d(2)),
    "leaky relu, average pool": lambda: convolutional(nn.LeakyReLU, nn.AvgPool2d(2)),
    "silu, max pool": lambda: convolutional(nn.SiLU, nn.MaxPool2d(2)),
    "tanh, adaptive pool": lambda: convolutional(nn.Tanh, nn.AdaptiveAvgPool2d(3)),
}


def images(rows: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Noise]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.arange(rows) % 3, Noise(torch.arange(rows) + 10, 3)


# ---- every regularizer, written out ---------------------------------------------------------------------------------


def cross_entropies(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def loss_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    point = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropies(model, point, y).sum(), point)
    return gradient


def contracted(model: nn.Module, x: Tensor, directions: Tensor) -> Tensor:
    """The sum of ||J^T v||^2 over directions v (D, B, K), (B,)."""
    point = x.detach().requires_grad_()
    logits = model(point)
    total = torch.zeros(len(x), dtype=x.dtype)
    for direction in directions:
        (gradient,) = torch.autograd.grad((direction * logits).sum(), point, retain_graph=True)
        total = total + gradient.flatten(1).square().sum(1)
    return total


def drawn(noise: Noise, draws: int, classes: int = 3) -> Tensor:
    """Directions (D, B, K) whose contractions sum to the estimate of the squared Frobenius norm."""
    each = [noise.fold("projection", draw).normal((classes,), torch.float64) for draw in range(draws)]
    return F.normalize(torch.stack(each), dim=2) * (classes / draws) ** 0.5


def classes_of(rows: int, classes: int = 3) -> Tensor:
    return torch.eye(classes, dtype=torch.float64)[:, None].expand(-1, rows, -1)


def mixed(model: nn.Module, x: Tensor, temperature: float) -> Tensor:
    return (model(x) / temperature).softmax(1).detach()[None]


def uphill(model: nn.Module, x: Tensor, y: Tensor, step: float) -> Tensor:
    """The point `step` up the loss gradient."""
    return x + step * F.normalize(loss_gradient(model, x, y).flatten(1)).view_as(x)


def signs(model: nn.Module, x: Tensor, y: Tensor, step: float) -> Tensor:
    """The point `step` along the signs of the loss gradient."""
    return x + step * F.normalize(loss_gradient(model, x, y).sign().flatten(1)).view_as(x)


def farthest(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
    """Where the search of `linearity()` ends."""
    loss = cross_entropies(model, x, y).detach()
    return linearity().search(model, x, y, loss, loss_gradient(model, x, y), noise)


def from_tangent(model: nn.Module, x: Tensor, y: Tensor, point: Tensor) -> Tensor:
    along = ((point - x) * loss_gradient(model, x, y)).flatten(1).sum(1)
    gap = cross_entropies(model, point, y) - cross_entropies(model, x, y) - along
    return gap.abs() + 0.3 * along.abs()


def nearby(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
    """A random point within 0.2, and the loss gradient at x."""
    point = x + 0.2 * (2 * noise.fold("alignment").uniform(x.shape[1:], x.dtype) - 1)
    return torch.stack([point, loss_gradient(model, x, y)])


def cosine(model: nn.Module, y: Tensor, point: Tensor, gradient: Tensor) -> Tensor:
    return F.cosine_similarity(gradient.flatten(1), loss_gradient(model, point, y).flatten(1))


def turned(model: nn.Module, x: Tensor, y: Tensor, point: Tensor) -> Tensor:
    change = loss_gradient(model, point, y) - loss_gradient(model, x, y)
    return change.flatten(1).square().sum(1)


def logarithms(model: nn.Module, rows: int) -> Tensor:
    """Of the two layers of the nets here that no batch norm comes after."""
    assert isinstance(model, nn.Sequential)
    weights = [model[place].weight for place in (4, 8)]
    each = [w.square().sum().log() / 2 + 0.1 * w.abs().sum() / w.square().sum().sqrt() for w in weights]
    return sum(each, torch.zeros(())).expand(rows)


def linearity() -> LocalLinearity:
    return LocalLinearity(1.0, eps=0.1, steps=3)


@dataclass(frozen=True)
class Row:
    """A regularizer, what it holds constant, and its value (B,) given that, by plain first derivatives."""

    make: Callable[[], Regularizer]
    hold: Callable[[nn.Module, Tensor, Tensor, Noise], Tensor]
    value: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    differences: bool = False
    """Whether it is a difference of losses or gradients, which takes digits away."""


def _nothing(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
    return torch.zeros(())


def _contracted(model: nn.Module, x: Tensor, y: Tensor, held: Tensor) -> Tensor:
    return contracted(model, x, held)


ROWS: dict[str, Row] = {
    "exact": Row(lambda: EffectiveMargin(1.0, "exact"), lambda m, x, y, n: classes_of(len(x)), _contracted),
    "projection": Row(lambda: EffectiveMargin(1.0, "projection", draws=2), lambda m, x, y, n: drawn(n, 2), _contracted),
    "softmax": Row(
        lambda: EffectiveMargin(1.0, "softmax", temperature=1.0), lambda m, x, y, n: mixed(m, x, 1.0), _contracted
    ),
    "softmax, warm": Row(
        lambda: EffectiveMargin(1.0, "softmax", temperature=40.0), lambda m, x, y, n: mixed(m, x, 40.0), _contracted
    ),
    "Jacobian": Row(lambda: Jacobian(1.0), lambda m, x, y, n: drawn(n, 1) * 0.5**0.5, _contracted),
    "Jacobian exact": Row(
        lambda: Jacobian(1.0, exact=True), lambda m, x, y, n: classes_of(len(x)) * 0.5**0.5, _contracted
    ),
    "input gradient": Row(
        lambda: InputGradient(1.0),
        _nothing,
        lambda m, x, y, held: loss_gradient(m, x, y).flatten(1).square().sum(1),
    ),
    "input gradient, finite": Row(
        lambda: InputGradient(1.0, "finite", step=0.1),
        lambda m, x, y, n: uphill(m, x, y, 0.1),
        lambda m, x, y, held: ((cross_entropies(m, held, y) - cross_entropies(m, x, y)) / 0.1).square(),
        differences=True,
    ),
    "linearity": Row(linearity, farthest, from_tangent, differences=True),
    "alignment": Row(
        lambda: GradientAlignment(1.0, eps=0.2),
        nearby,
        lambda m, x, y, held: 1 - cosine(m, y, *held),
        differences=True,
    ),
    "curvature": Row(
        lambda: Curvature(1.0, step=0.4), lambda m, x, y, n: signs(m, x, y, 0.4), turned, differences=True
    ),
    "curvature, unsquared": Row(
        lambda: Curvature(1.0, step=0.5, power=1),
        lambda m, x, y, n: signs(m, x, y, 0.5),
        lambda m, x, y, held: turned(m, x, y, held).sqrt(),
        differences=True,
    ),
    "weights": Row(lambda: WeightNorm(1.0, sparsity=0.1), _nothing, lambda m, x, y, held: logarithms(m, len(x))),
}
