"""What minimum-norm attacks share: they look for the closest point that is a success."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from wideberth import checks, geometry
from wideberth.attacks.base import S
from wideberth.attacks.state import AttackInputs
from wideberth.checks import Box, InputError, Norm

_SLACK = 5e-7
"""Relative: a point placed on the sphere in float32 may measure so much too long; verification allows twice as much."""


def record_closer(inputs: AttackInputs, state: S, success: Tensor, distance: Tensor, cost: int) -> S:
    """The state with a query recorded; `best` becomes `state.point` if that is the closest success within its radius.

    Args:
        inputs: the rows.
        state: queried at its `point`.
        success: (B,) bool, whether that point reaches the goal.
        distance: (B,) of the point from the clean input.
        cost: forwards plus backwards of this query.
    """
    success = success & (distance <= inputs.eps * (1 + _SLACK))
    closer = success & (-distance > state.best_loss)
    adversarial = state.adversarial | success
    return replace(
        state,
        best=geometry.choose(closer, state.point, state.best),
        best_loss=torch.where(closer, -distance, state.best_loss),
        adversarial=adversarial,
        steps_survived=state.steps_survived + ~adversarial,
        iteration=state.iteration + 1,
        evaluations=state.evaluations + cost,
    )


def largest_distance(inputs: AttackInputs, norm: Norm, box: Box) -> Tensor:
    """The norm of the longest perturbation within box and radius, (B,)."""
    x = inputs.x.to(inputs.eps.dtype)
    room = torch.maximum(x - box[0], box[1] - x)
    return torch.minimum(geometry.norm(room, norm), inputs.eps)


def half_cosine(iteration: Tensor, steps: int, first: float, last: float) -> Tensor:
    """From `first` down to `last` along half a cosine over `steps`, by each row's own iteration (B,)."""
    done = (iteration / steps).clamp(max=1)
    return last + (first - last) * (1 + torch.cos(math.pi * done)) / 2


def refuse_restarts(attack: str, restarts: int) -> None:
    """Refuse restarts of an attack that always begins at the clean input (`InputError`)."""
    checks.at_least("restarts", restarts, 1)
    if restarts > 1:
        raise InputError(f"restarts={restarts}: {attack} begins at the input, and a restart would repeat it")
