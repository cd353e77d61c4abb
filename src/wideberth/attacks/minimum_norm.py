"""What attacks share that look for the smallest perturbation."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from wideberth import checks, geometry
from wideberth.attacks.state import AttackInputs, S
from wideberth.checks import Box, InputError, Norm

_SLACK = 5e-7
"""Relative: by so much a point may measure too long that was placed on the sphere in float32; a verdict allows twice
as much."""


def nearer(inputs: AttackInputs, state: S, now: Tensor, distance: Tensor, cost: int) -> S:
    """Take account of what was seen at `state.point`: the closest point that does, and is within its radius, is kept.

    Args:
        inputs: the rows.
        state: asked about at its `point`.
        now: (B,) bool, whether that point achieves the goal.
        distance: (B,) how far it is from the input.
        cost: forwards and backwards spent on it.
    """
    now = now & (distance <= inputs.eps * (1 + _SLACK))
    better = now & (-distance > state.value)
    return replace(
        state,
        kept=geometry.choose(better, state.point, state.kept),
        value=torch.where(better, -distance, state.value),
        broken=state.broken | now,
        steps_survived=state.steps_survived + ~(state.broken | now),
        iteration=state.iteration + 1,
        spent=state.spent + cost,
    )


def farthest(inputs: AttackInputs, norm: Norm, box: Box) -> Tensor:
    """How long a perturbation can get within box and radius, (B,)."""
    x = inputs.x.to(inputs.eps.dtype)
    room = torch.maximum(x - box[0], box[1] - x)
    return torch.minimum(geometry.norm(room, norm), inputs.eps)


def half_cosine(iteration: Tensor, steps: int, first: float, last: float) -> Tensor:
    """From `first` down to `last` along half a cosine over `steps`, by each row's own iteration (B,)."""
    gone = (iteration / steps).clamp(max=1)
    return last + (first - last) * (1 + torch.cos(math.pi * gone)) / 2


def one_run(attack: str, restarts: int) -> None:
    """Refuse restarts of an attack that always begins at the input itself (`InputError`)."""
    checks.at_least("restarts", restarts, 1)
    if restarts > 1:
        raise InputError(f"restarts={restarts}: {attack} begins at the input, so that each run would repeat the first")
