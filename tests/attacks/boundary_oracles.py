"""Models whose nearest mistake is known exactly, and runs that look for it without a radius."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from attack_oracles import linear
from torch import Tensor, nn

from wideberth import geometry
from wideberth.attacks import Adversarial, Attack, AttackInputs
from wideberth.attacks.drivers import perturb_batch
from wideberth.checks import Box, Norm
from wideberth.hyperplanes import shortest_step
from wideberth.randomness import Noise

WIDE: Box = (-100.0, 100.0)
UNIT: Box = (0.0, 1.0)
NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
CLOSE: dict[Norm, float] = {"linf": 1.02, "l2": 1.01, "l1": 1.02}
"""How near to the smallest perturbation a run must come."""


def smallest(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, seed: int = 0, **known: Tensor) -> Adversarial:
    """The run without a radius."""
    eps = torch.full((len(x),), float("inf"), dtype=torch.promote_types(x.dtype, torch.float32))
    return perturb_batch(attack, model, AttackInputs(x, y, eps, Noise(torch.arange(len(x)), seed), **known))


def lengths(found: Adversarial, x: Tensor, norm: Norm) -> Tensor:
    return geometry.norm(found.x - x, norm)


@dataclass(frozen=True)
class Case:
    """Inputs, labels as predicted, and the distance to the nearest mistake.

    Attributes:
        model: to attack.
        x: (B, ...) inputs.
        y: (B,) labels.
        each: (B, K) distance to where each class overtakes the label, infinite of the label and what is out of reach.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    each: Tensor

    @property
    def distance(self) -> Tensor:
        return self.each.amin(1)


def affine(
    norm: Norm,
    box: Box,
    batch: int,
    shape: tuple[int, ...] = (6,),
    classes: int = 5,
    seed: int = 0,
    tilt: float = 0.3,
) -> Case:
    """z(x) = W x + b, the box regarded; the larger `tilt`, the further from the middle of the box the boundaries."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, *shape, generator=generator, dtype=torch.float64)
    flat = x.flatten(1)
    weight = torch.randn(classes, flat.shape[1], generator=generator, dtype=torch.float64)
    bias = tilt * torch.randn(classes, generator=generator, dtype=torch.float64) - weight.sum(1) / 2
    logits = flat @ weight.T + bias
    y = logits.argmax(1)
    each = torch.full_like(logits, float("inf"))
    for k in range(classes):
        normal, rise = weight[k] - weight[y], (logits.gather(1, y[:, None]) - logits[:, k : k + 1]).squeeze(1)
        step = shortest_step(flat, normal, rise, norm, box)
        reached = (normal * step).sum(1) >= rise - 1e-9
        each[:, k] = torch.where(reached & (y != k), geometry.norm(step, norm), float("inf"))
    return Case(linear(weight, bias), x, y, each)


class Kinked(nn.Module):
    """Two classes; their difference is g(<w, x> - shift), where g rises everywhere, but with three different slopes.

    g crosses zero at 0 alone, so the distance is that to a hyperplane, while the slope that is seen from afar misleads:
    it promises the boundary too near on one side, and too far on the other.
    """

    def __init__(self, weight: Tensor, shift: float) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(weight), shift

    def forward(self, x: Tensor) -> Tensor:
        s = x.flatten(1) @ self.weight - self.shift
        g = s + 3 * torch.relu(s - 1.2) + 0.7 * torch.relu(-1 - s)
        return torch.stack([torch.zeros_like(g), g], 1)


def kinked(norm: Norm, batch: int = 40) -> Case:
    """Inputs on both sides of `Kinked`, in a box that does not bind."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(batch, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, generator=generator, dtype=torch.float64)
    model = Kinked(weight, 0.2)
    with torch.no_grad():
        y = model(x).argmax(1)
    distance = (x @ weight - 0.2).abs() / geometry.norm(weight[None], geometry.dual(norm))
    each = torch.full((batch, 2), float("inf"), dtype=torch.float64).scatter(1, 1 - y[:, None], distance[:, None])
    return Case(model, x, y, each)


class TwoBoundaries(nn.Module):
    """Class 1 is predicted beyond a far boundary that is seen from the origin, and beyond a near one that is not.

    At x = 0 the larger, and so the visible, of the two pieces x_0 - 1 and 4 x_1 - 1.1 is the first, at distance 1; the
    second is 0.275 away in every norm.
    """

    near, far = 0.275, 1.0

    def forward(self, x: Tensor) -> Tensor:
        piece = torch.maximum(x[:, 0] - 1, 4 * x[:, 1] - 1.1)
        return torch.stack([torch.zeros_like(piece), piece], 1)
