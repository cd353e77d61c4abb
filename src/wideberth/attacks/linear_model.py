"""The linear model of a network near a point: class gradients, and the boundary that is nearest in that model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wideberth import geometry
from wideberth.attacks.state import AttackInputs
from wideberth.checks import Box, InputError, Norm
from wideberth.hyperplanes import Normals


class Gradients(NamedTuple):
    """What one forward tells of M functions of the logits.

    Attributes:
        logits: (B, K), detached.
        values: (B, M) of the functions, in at least float32.
        each: their input gradients (B, ...), in order, each made when asked for: memory stays that of one.
        cost: forwards and backwards per row, 1 + M.
    """

    logits: Tensor
    values: Tensor
    each: Iterator[Tensor]
    cost: int


def class_gradients(model: nn.Module, x: Tensor, functions: Callable[[Tensor], Tensor]) -> Gradients:
    """One forward, and then one input gradient for each column of `functions`.

    Args:
        model: maps x to logits.
        x: (B, ...) where.
        functions: of the logits (B, K), to (B, M): differences of two classes, as a rule.

    Raises:
        InputError: where the model's output does not depend differentiably on its input.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        logits = model(point)
        if not logits.requires_grad:
            raise InputError("the model's output carries no gradient to its input: gradient attacks cannot run")
        values = functions(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        columns = values.unbind(1)

    def each() -> Iterator[Tensor]:
        for rank, column in enumerate(columns, 1):
            more = rank < len(columns)
            (gradient,) = torch.autograd.grad(column.sum(), point, retain_graph=more, materialize_grads=True)
            # What is not finite has no direction.
            yield gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    return Gradients(logits.detach(), values.detach(), each(), 1 + len(columns))


@dataclass(frozen=True)
class Plane:
    """The boundary of the linear model at a point that is nearest to it: {u: value + <normal, u - point> = 0}.

    Attributes:
        point: (B, ...) where the model was asked, in at least float32.
        normal: (B, ...) points to where the goal is achieved; zero, as is `value`, where the model has no gradient.
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


def goals(inputs: AttackInputs, most: int | None = None) -> Callable[[Tensor], Tensor]:
    """Of logits (B, K), the differences (B, M) of which one must be positive for the goal to be achieved.

    Untargeted: each other class less the label, the likeliest `most` of them. With a target: the target less the label
    or, where nothing but the target counts, less the largest other logit.
    """
    y, target = inputs.y[:, None], inputs.target

    def untargeted(logits: Tensor) -> Tensor:
        others = logits.detach().scatter(1, y, float("-inf"))
        count = min(most or logits.shape[1], logits.shape[1] - 1)
        return logits.gather(1, others.topk(count, dim=1).indices) - logits.gather(1, y)

    def targeted(logits: Tensor) -> Tensor:
        assert target is not None
        rivals = logits.scatter(1, target[:, None], float("-inf")).amax(1, keepdim=True)
        return logits.gather(1, target[:, None]) - (rivals if inputs.strict else logits.gather(1, y))

    return untargeted if target is None else targeted


def nearest_plane(found: Gradients, point: Tensor, start: Tensor, norm: Norm) -> Plane:
    """The boundary that is nearest to `start` (B, ...) in the linear model at `point` (B, ...), box aside.

    Nearest is where |difference of logits| over the dual norm of its gradient is least.
    """
    here = point.to(torch.promote_types(point.dtype, torch.float32))
    nearest: Plane | None = None
    least = here.new_full(here.shape[:1], float("inf"))
    for column, each in zip(found.values.unbind(1), found.each, strict=True):
        plane = Plane(here, each.to(here.dtype), column.to(here.dtype))
        if found.values.shape[1] == 1:  # the only one is the nearest
            known = geometry.norm(plane.normal, "linf") > 0
            return replace(plane, value=torch.where(known, plane.value, 0))
        length = geometry.norm(plane.normal, geometry.dual(norm))
        known = length > 0
        distance = torch.where(known, plane.at(start).abs() / length, float("inf"))
        nearer = distance < least
        least = torch.where(nearer, distance, least)
        if nearest is None:  # without a gradient, the normal is zero as it is
            nearest = replace(plane, value=torch.where(known, plane.value, 0))
            continue
        value = torch.where(nearer, plane.value, nearest.value)
        normal = torch.where(geometry.column(nearer, here), plane.normal, nearest.normal)
        nearest = Plane(here, normal, value)
    assert nearest is not None
    return nearest


def land(x: Tensor, delta: Tensor, box: Box) -> Tensor:
    """x + delta (B, ...), in the box and in x's dtype: rounded to nearest, but not all the way back to x."""
    point = (x + delta).to(x.dtype).clamp(*box)
    # An ulp of bfloat16 is 1/256 at 0.5: a row that is closer to the boundary than that would never leave x.
    stuck = geometry.norm(point - x, "linf") == 0
    # Only where looking costs nothing: a GPU had better move all rows than wait to be asked.
    if point.device.type == "cpu" and not bool(stuck.any()):
        return point
    least = torch.nextafter(x, torch.where(delta > 0, float("inf"), float("-inf")).to(x.dtype))
    least = torch.where(delta == 0, x, least).clamp(*box)
    return torch.where(geometry.column(stuck, x), least, point)
