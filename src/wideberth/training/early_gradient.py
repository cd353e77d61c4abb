"""Taking the gradient of a part of the loss before the rest of the loss is computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are known; backward scales them by the gradient that comes in."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *[scale * gradient for gradient in ctx.gradients]


def with_gradient_taken(value: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """`value`, (), with its gradient in `parameters` computed now and its graph freed.

    The graph of a second derivative is the largest of a training step. Where it is freed before the objective builds
    its own, the two are never in memory together: a lower peak, and on a CPU a step several per cent faster.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if not value.requires_grad or not wanted:
        return value
    found = torch.autograd.grad(value, wanted, allow_unused=True)
    reached = [(p, gradient) for p, gradient in zip(wanted, found, strict=True) if gradient is not None]
    result: Tensor = _WithGradients.apply(value.detach(), [g for _, g in reached], *[p for p, _ in reached])
    return result
