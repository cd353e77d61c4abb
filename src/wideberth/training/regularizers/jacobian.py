"""Penalties on the size of the Jacobian of the logits: its norm, exact or estimated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wideberth import checks
from wideberth.modes import Mode
from wideberth.randomness import Noise
from wideberth.training.regularizers.base import Regularizer, squared_norm
from wideberth.training.schedules import Schedule


def squared_jacobian(logits: Tensor, point: Tensor) -> Tensor:
    """||J||_F^2 of each row's Jacobian of `logits` (B, K) at `point`, (B,): one backward per class."""
    return torch.stack([squared_norm(column, point) for column in logits.unbind(1)]).sum(0)


def projected_jacobian(logits: Tensor, point: Tensor, noise: Noise, draws: int) -> Tensor:
    """K * ||J^T v||^2, the mean over `draws` random unit vectors v per row, (B,): unbiased for ||J||_F^2."""
    classes = logits.shape[1]
    total = torch.zeros(len(point), dtype=logits.dtype, device=logits.device)
    for draw in range(draws):
        direction = noise.fold("projection", draw).normal((classes,), logits.dtype)
        direction = direction / direction.norm(dim=1, keepdim=True)
        total = total + squared_norm((direction * logits).sum(1), point)
    return total.mul(classes / draws)


class Jacobian(Regularizer):
    """Jacobian regularisation (Hoffman, Roberts and Yaida 2019): half of ||J||_F^2, the Jacobian of the logits.

    `Jacobian(w)` is `EffectiveMargin(w / 2)` in the terms of its own paper, without the softmax estimator.

    Args:
        weight: factor of the mean penalty; a number or a `Schedule`. The authors use 0.01.
        draws: random projections whose mean is the estimate.
        exact: compute it by one backward per class instead, without random projections.
        mode: of the model, see `Regularizer`.

    What we do differently: nothing in the value. The model is in eval mode, theirs in train mode, where batch norm
    couples the samples.
    """

    def __init__(self, weight: float | Schedule, draws: int = 1, exact: bool = False, mode: Mode = "eval") -> None:
        super().__init__(weight, mode)
        checks.at_least("draws", draws, 1)
        self.draws, self.exact = draws, exact

    def compute(self, model: nn.Module, point: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """Half of each sample's squared Frobenius norm, or of its estimate, (B,)."""
        logits = model(point)
        if self.exact:
            return squared_jacobian(logits, point) / 2
        return projected_jacobian(logits, point, noise, self.draws) / 2
