"""A verdict is verified: what counts as broken was seen again, in the ball, in the box and misclassified."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wideberth import geometry, losses
from wideberth.checks import Box, Norm
from wideberth.modes import lent

TOLERANCE = 1e-6
"""Relative slack on the radius: what float32 arithmetic needs, far below what changes a verdict."""


@contextmanager
def judging(model: nn.Module, x: Tensor) -> Iterator[None]:
    """The model as a verdict sees it: in eval mode, without gradients, and in its own precision, not autocast's."""
    with lent(model), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield


def verify(
    model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, eps: float | Tensor, norm: Norm, box: Box = (0.0, 1.0)
) -> Tensor:
    """Whether each adversarial point holds up, (B,) bool: in ball, in box and misclassified by the untouched model.

    Distances are measured in float64, the model is run in eval mode on the points as they are. `eps` is one radius
    or (B,).
    """
    with judging(model, x):
        return inside(x, x_adv, eps, norm, box) & losses.misclassified(model(x_adv), y)


def inside(x: Tensor, x_adv: Tensor, eps: float | Tensor, norm: Norm, box: Box = (0.0, 1.0)) -> Tensor:
    """Whether each point lies in the ball around its input, measured in float64, and in the box, (B,) bool."""
    distance = geometry.norm(x_adv.double() - x.double(), norm)
    allowed = geometry.per_sample(eps, x).double() * (1 + TOLERANCE)
    flat = x_adv.flatten(1)
    return (distance <= allowed) & (flat >= box[0]).all(1) & (flat <= box[1]).all(1)
