"""Margins as a measurement: how far the decision boundary is, in units that rescaling the logits cannot change.

In the linear region of x a piecewise-linear network is z(x') = W x' + b, and the boundary between classes y and k lies
at (z_y - z_k) / ||w_y - w_k||, the logit margin over the norm of the *effective weight* (Liu and Chan 2022). In the
ball of norm p the weight is measured in the dual norm. The value is the exact distance while the region does not
change (and the box is not in the way); elsewhere it is a first-order estimate.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from wideberth import checks, geometry
from wideberth.checks import Norm
from wideberth.data import Readable, batches, collect, count
from wideberth.gradients import gradient_of, require_gradient
from wideberth.losses import logit_margin as logit_margin_of
from wideberth.modes import lent

__all__ = ["effective_margin", "effective_weight_norm", "logit_margin", "measure", "table"]


def logit_margin(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Logit of the label minus the largest other, (B,): positive where x (B, ...) is classified as y (B,)."""
    with lent(model), torch.no_grad():
        return logit_margin_of(model(x), y)


def effective_margin(model: nn.Module, x: Tensor, y: Tensor, norm: Norm = "l2") -> Tensor:
    """The smallest effective margin over all other classes, (B,), negative where misclassified; see `measure`."""
    return measure(model, x, y, norm)[0]


def effective_weight_norm(model: nn.Module, x: Tensor, y: Tensor, norm: Norm = "l2") -> Tensor:
    """Norm of the effective weight towards the nearest class, (B,) >= 0; see `measure`."""
    return measure(model, x, y, norm)[1]


def measure(
    model: nn.Module, x: Tensor, y: Tensor, norm: Norm = "l2", batch_size: int = 512
) -> tuple[Tensor, Tensor, Tensor]:
    """Effective margin, effective weight norm and nearest class of each sample, in eval mode.

    Args:
        model: maps (B, ...) to logits (B, K >= 2); given back as it was.
        x: (B, ...) floating point.
        y: (B,) integer labels.
        norm: the norm in which distance is meant; the weight is measured in its dual.
        batch_size: rows at a time; memory grows with it, the result does not depend on it.

    Returns:
        margin (B,): min over k != y of (z_y - z_k) / ||grad_x (z_y - z_k)||_dual, negative where misclassified,
            infinite where the gradient is zero; weight norm (B,): the denominator at that class; class (B,) int64.

    Costs one forward and K - 1 input gradients.

    Raises:
        InputError: for a norm, labels or logits that cannot be used.
    """
    checks.norm_name(norm)
    if len(x) == 0 or len(y) != len(x):
        raise checks.InputError(f"{len(x)} inputs and {len(y)} labels: must be as many, and at least one")
    begins = range(0, len(x), batch_size)
    parts = [_measure(model, x[b : b + batch_size], y[b : b + batch_size], norm) for b in begins]
    margin, weight, nearest = (torch.cat(column) for column in zip(*parts, strict=True))
    return margin, weight, nearest


def table(
    model: nn.Module,
    source: Readable,
    norm: Norm = "l2",
    positions: Sequence[int] | Tensor | None = None,
    batch_size: int = 256,
) -> pd.DataFrame:
    """Margins of many samples, read a batch at a time: memory does not grow with the size of the inputs.

    Args:
        model: maps (B, ...) to logits (B, K >= 2); run where its parameters are, given back as it was.
        source: a split, a torch data set of (x, y) or (x, y, index), or tensors (x, y).
        norm: the norm in which distance is meant.
        positions: which samples of the source, (n,) (default: all).
        batch_size: samples at a time.

    Returns:
        One row per sample: index, label, logit_margin, effective_margin, effective_weight_norm and nearest_class; see
        `measure`.

    Raises:
        InputError: for a norm, samples, labels or logits that cannot be used, and where there is no sample.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def measured(x: Tensor, y: Tensor, index: Tensor) -> dict[str, Tensor]:
        x, y = x.to(device), y.to(device)
        margin, weight, nearest = measure(model, x, y, norm)
        return {
            "index": index,
            "label": y,
            "logit_margin": logit_margin(model, x, y),
            "effective_margin": margin,
            "effective_weight_norm": weight,
            "nearest_class": nearest,
        }

    size = count(source) if positions is None else len(positions)
    if not size:
        raise checks.InputError("data: holds no samples")
    columns = collect((measured(*batch) for batch in batches(source, positions, batch_size)), size)
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()})


def _measure(model: nn.Module, x: Tensor, y: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    with lent(model), torch.enable_grad():
        point = x.detach().requires_grad_()
        logits = model(point)
        checks.valid_logits(logits, len(x))
        checks.valid_labels(y, len(x), logits.shape[1])
        require_gradient(logits)
        others = torch.argsort(logits.detach().scatter(1, y[:, None], float("-inf")), dim=1, descending=True)[:, :-1]
        margins, weights = [], []
        for k in others.T:  # one other class per sample at a time: memory stays that of one gradient
            gap = (logits.gather(1, y[:, None]) - logits.gather(1, k[:, None])).squeeze(1)
            gradient = gradient_of(gap, point, retain_graph=True)
            weight = geometry.norm(gradient, geometry.dual(norm))
            gap = gap.detach()
            margins.append(torch.where(gap == 0, gap, gap / weight))
            weights.append(weight)
    margin, rank = torch.stack(margins, 1).min(1)
    pick = rank[:, None]
    return margin, torch.stack(weights, 1).gather(1, pick).squeeze(1), others.gather(1, pick).squeeze(1)
