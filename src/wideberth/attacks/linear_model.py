"""The linear model of a network near a point: class gradients, and the boundary that is nearest in that model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from wideberth import geometry
from wideberth.attacks.state import AttackInputs
from wideberth.checks import Box, Norm
from wideberth.gradients import Gradients
from wideberth.gradients import class_gradients as class_gradients
from wideberth.hyperplanes import Normals


@dataclass(frozen=True)
class Plane:
    """The boundary of the linear model at a point that is nearest to it: {u: value + <normal, u - point> = 0}.

    Attributes:
        point: (B, ...) where the model was asked, in at least float32.
        normal: (B, ...) points to where the goal is reached; zero, as is `value`, where the model has no gradient.
        value: (B,) at the point, positive where the boundary has been crossed.
    """

    point: Tensor
    normal: Tensor
    value: Tensor

    def at(self, x: Tensor) -> Tensor:
        """The linear model at x (B, ...), (B,): positive beyond the boundary."""
        return self.value + (self.normal * (x - self.point)).flatten(1).sum(1)

    def step_from(self, x: Tensor, norm: Norm, box: Box) -> Tensor:
        """The shortest perturbation of x (B, ...) that leads to the boundary inside the box, shape of x."""
        return self._normals.shortest_step(x, -self.at(x), norm, box)

    @cached_property
    def _normals(self) -> Normals:
        return Normals.of(self.normal)


def goal_differences(inputs: AttackInputs, most: int | None = None) -> Callable[[Tensor], Tensor]:
    """Of logits (B, K), the differences (B, M) of which one must be positive for a success.

    Untargeted: each other class minus the label, for the likeliest `most` of them. With a target: the target minus the
    label or, where only the target counts, minus the largest other logit.
    """
    y = inputs.y[:, None]

    def untargeted(logits: Tensor) -> Tensor:
        others = logits.detach().scatter(1, y, float("-inf"))
        count = min(most or logits.shape[1], logits.shape[1] - 1)
        return logits.gather(1, others.topk(count, dim=1).indices) - logits.gather(1, y)

    if inputs.target is None:
        return untargeted
    target = inputs.target[:, None]

    def targeted(logits: Tensor) -> Tensor:
        others = logits.scatter(1, target, float("-inf")).amax(1, keepdim=True)
        return logits.gather(1, target) - (others if inputs.target_only else logits.gather(1, y))

    return targeted


def nearest_plane(found: Gradients, point: Tensor, start: Tensor, norm: Norm) -> Plane:
    """The boundary that is nearest to `start` (B, ...) in the linear model at `point` (B, ...), box aside.

    Nearest is where |difference of logits| over the dual norm of its gradient is least.
    """
    here = point.to(torch.promote_types(point.dtype, torch.float32))
    columns = found.values.unbind(1)
    planes = (
        Plane(here, gradient.to(here.dtype), column.to(here.dtype))
        for column, gradient in zip(columns, found.each, strict=True)
    )
    first = next(planes)
    if len(columns) == 1:  # the only one is the nearest
        has_gradient = geometry.norm(first.normal, "linf") > 0
        return replace(first, value=torch.where(has_gradient, first.value, 0))

    def measured(plane: Plane) -> tuple[Tensor, Tensor]:
        """Whether there is a gradient, and how far the boundary is from `start`, (B,) each."""
        length = geometry.norm(plane.normal, geometry.dual(norm))
        return length > 0, torch.where(length > 0, plane.at(start).abs() / length, float("inf"))

    has_gradient, least = measured(first)
    nearest = replace(first, value=torch.where(has_gradient, first.value, 0))
    for plane in planes:
        _, distance = measured(plane)
        nearer = distance < least
        least = torch.where(nearer, distance, least)
        value = torch.where(nearer, plane.value, nearest.value)
        normal = torch.where(geometry.column(nearer, here), plane.normal, nearest.normal)
        nearest = Plane(here, normal, value)
    return nearest


def rounded_off_input(x: Tensor, delta: Tensor, box: Box) -> Tensor:
    """x + delta (B, ...), in the box and in x's dtype: rounded to nearest, but not all the way back to x."""
    point = (x + delta).to(x.dtype).clamp(*box)
    # An ulp of bfloat16 is 1/256 at 0.5: a row that is closer to the boundary than that would never leave x.
    stuck = geometry.norm(point - x, "linf") == 0
    # Looking is cheap on a CPU alone: on a GPU it would be a host synchronisation.
    if point.device.type == "cpu" and not bool(stuck.any()):
        return point
    least = torch.nextafter(x, torch.where(delta > 0, float("inf"), float("-inf")).to(x.dtype))
    least = torch.where(delta == 0, x, least).clamp(*box)
    return torch.where(geometry.column(stuck, x), least, point)
