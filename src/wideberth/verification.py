"""Verification of adversarial points: in the ball, in the box and misclassified, as the untouched model sees them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wideberth import geometry, losses
from wideberth.checks import Box, Norm
from wideberth.modes import lent

TOLERANCE = 1e-6
"""Relative slack on the radius: what float32 arithmetic needs, far below what changes a verdict."""


@contextmanager
def verification_mode(model: nn.Module, x: Tensor) -> Iterator[None]:
    """The model as verification runs it: in eval mode, without gradients, in its own precision instead of autocast."""
    with lent(model), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield


@dataclass(frozen=True)
class CheckedPoints:
    """What verification found about B points.

    Attributes:
        logits: (B, K) of the points.
        distance: (B,) float64, from the clean input in the norm of the ball.
        in_ball: (B,) bool.
        in_box: (B,) bool.
        misclassified: (B,) bool.
    """

    logits: Tensor
    distance: Tensor
    in_ball: Tensor
    in_box: Tensor
    misclassified: Tensor

    @property
    def allowed(self) -> Tensor:
        """In the ball and in the box, (B,) bool."""
        return self.in_ball & self.in_box

    @property
    def adversarial(self) -> Tensor:
        """In the ball, in the box and misclassified, (B,) bool: the one definition that counts everywhere."""
        return self.allowed & self.misclassified


def check_points(
    model: nn.Module, x: Tensor, y: Tensor, points: Tensor, eps: float | Tensor, norm: Norm, box: Box = (0.0, 1.0)
) -> CheckedPoints:
    """Check points (B, ...) against their clean inputs x (B, ...) and labels y (B,).

    Distances are measured in float64; the model runs in eval mode on the points as they are. `eps` is one radius or
    (B,); an infinite radius admits every point of the box.
    """
    with verification_mode(model, points):
        logits = model(points)
    in_ball, in_box, distance = _placed(x, points, eps, norm, box)
    return CheckedPoints(logits, distance, in_ball, in_box, losses.misclassified(logits, y))


def _placed(x: Tensor, points: Tensor, eps: float | Tensor, norm: Norm, box: Box) -> tuple[Tensor, Tensor, Tensor]:
    """Whether each point is in the ball and in the box, (B,) bool each, and its distance (B,) float64."""
    distance = geometry.norm(points.double() - x.double(), norm)
    radius = geometry.per_sample(eps, x).double() * (1 + TOLERANCE)
    flat = points.flatten(1)
    return distance <= radius, (flat >= box[0]).all(1) & (flat <= box[1]).all(1), distance


def inside(x: Tensor, points: Tensor, eps: float | Tensor, norm: Norm, box: Box = (0.0, 1.0)) -> Tensor:
    """Whether each point (B, ...) is in the ball around its input x (B, ...) and in the box, (B,) bool."""
    in_ball, in_box, _ = _placed(x, points, eps, norm, box)
    return in_ball & in_box


def verify(
    model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, eps: float | Tensor, norm: Norm, box: Box = (0.0, 1.0)
) -> Tensor:
    """Whether each point is adversarial, (B,) bool: in ball, in box and misclassified; see `check_points`."""
    return check_points(model, x, y, x_adv, eps, norm, box).adversarial
