"""The candidates of Square: windows filled with the bounds (linf), and mass moved between windows (l2, l1)."""

from __future__ import annotations

import torch
from torch import Tensor

from wideberth.attacks.square_windows import Window
from wideberth.checks import Norm

_NEWTON_STEPS = 6
"""Newton steps for the threshold of an l1 projection. What remains above the radius is removed by scaling."""

_SMALL_WINDOW = 1 / 16
"""Fraction of an input. Windows that cover at most this fraction are filled by index, larger ones by a mask."""

_EMPTY_WINDOW = 1e-4
"""Fraction of the radius. A window counts as empty if the norm of the perturbation in it is below this fraction."""


def column(value: Tensor) -> Tensor:
    """Reshape (B,) or (B, C) to (B, 1, 1, 1) or (B, C, 1, 1)."""
    return value.view(len(value), -1, 1, 1)


def fill(
    point: Tensor, best: Tensor, low: Tensor, high: Tensor, window: Window, sign: Tensor, largest_entry: Tensor
) -> Tensor:
    """Write the linf candidates to `point`: copies of `best` with one window set to the bounds.

    In the window, the entries of a channel are set to `high` where the channel's sign is positive, else to `low`. If
    that does not change a row of `best`, the opposite bounds are used in that row.

    Args:
        point: (B, C, H, W), overwritten.
        best: (B, C, H, W) incumbents.
        low: (B, C, H, W) lower bounds of ball and box.
        high: (B, C, H, W) upper bounds.
        window: one window per row.
        sign: (B, C), 1 or -1.
        largest_entry: (B,) upper bounds on the absolute value of every entry.

    Returns:
        (B,) bool, the rows in which the opposite bounds were used.
    """
    small_area = _SMALL_WINDOW * best[0, 0].numel()
    # By index, the cost grows with the area of the largest window; by mask, it is that of the whole input. To read the
    # areas is cheap on a CPU; on a GPU it would need a host synchronisation, so that a GPU always uses masks.
    if best.device.type != "cpu":
        return _fill_by_mask(point, best, low, high, window, sign, largest_entry)
    area = window.rows * window.columns
    if int(area.max()) <= small_area:
        return _fill_by_index(point, best, low, high, window, sign)
    large = area > small_area
    if 2 * int(large.sum()) > len(large):
        return _fill_by_mask(point, best, low, high, window, sign, largest_entry)
    # Few windows are large: all rows are filled by index, with the large windows reduced to one entry. Then the rows
    # with large windows are overwritten by mask.
    reduced = window._replace(rows=window.rows.masked_fill(large, 1), columns=window.columns.masked_fill(large, 1))
    opposite = _fill_by_index(point, best, low, high, reduced, sign)
    rows = large.nonzero().squeeze(1)
    large_window, filled = Window(*(part[rows] for part in window)), point[rows]
    opposite[rows] = _fill_by_mask(
        filled, best[rows], low[rows], high[rows], large_window, sign[rows], largest_entry[rows]
    )
    point[rows] = filled
    return opposite


def _fill_by_index(point: Tensor, best: Tensor, low: Tensor, high: Tensor, window: Window, sign: Tensor) -> Tensor:
    """Do what `fill` does by index. It reads the size of the largest window on the host: for a CPU only."""
    places = window.places(best.shape[3])[:, None].expand(-1, best.shape[1], -1)
    current, lower, upper = (part.flatten(2).gather(2, places) for part in (best, low, high))
    positive = sign[:, :, None] > 0
    opposite = (torch.where(positive, upper, lower) == current).flatten(1).all(1)
    chosen = torch.where(positive != opposite[:, None, None], upper, lower)
    point.copy_(best).view(*best.shape[:2], -1).scatter_(2, places, chosen)
    return opposite


def _fill_by_mask(
    point: Tensor, best: Tensor, low: Tensor, high: Tensor, window: Window, sign: Tensor, largest_entry: Tensor
) -> Tensor:
    """Do what `fill` does by a mask of the whole input; the cost does not depend on the windows."""
    height, width = best.shape[2:]
    mask = window.mask(height, width, best.dtype)
    # Entries in the window are moved far beyond the bound and then clamped to it. The result is exact, and this is
    # faster than torch.where.
    largest_float = torch.finfo(best.dtype).max
    push = column((4 * largest_entry[:, None] * sign).clamp(-largest_float, largest_float)).to(best.dtype)
    torch.addcmul(best, push, mask, out=point).clamp_(low, high)
    # The difference is compared with 0, because comparisons of bool tensors do not use vector instructions.
    opposite = (point - best).abs_().flatten(1).amax(1) == 0
    if best.device.type != "cpu":
        # To select the rows would need a host synchronisation: all rows are computed again.
        push = push * column(1 - 2 * opposite.to(push.dtype))
        torch.addcmul(best, push, mask, out=point).clamp_(low, high)
        return opposite
    rows = opposite.nonzero().squeeze(1)
    if len(rows):
        point[rows] = torch.addcmul(best[rows], -push[rows], mask[rows]).clamp_(low[rows], high[rows])
    return opposite


def move_mass(
    delta: Tensor, first: Tensor, second: Tensor, bump: Tensor, sign: Tensor, radius: Tensor, norm: Norm
) -> Tensor:
    """Remove the perturbation in two windows, and give the freed and the unused budget to the first window.

    The budget is measured in squares in l2 and in absolute values in l1. The new perturbation in the first window has
    the direction of the old one plus the bump, both scaled to the same norm. As in the original, the l1 budget is
    multiplied by the number of channels; where there are several, the caller must project the result.

    Args:
        delta: (B, C, H, W) perturbations, changed in place.
        first: (B, 1, H, W), 1 in the first window, else 0.
        second: (B, 1, H, W), the fraction of the budget that is removed from each entry of the second window, else 0.
        bump: (B, 1, H, W), of unit norm in the first window, else 0.
        sign: (B, C, 1, 1), the sign of the bump times its weight relative to the old perturbation.
        radius: (B, 1, 1, 1).
        norm: "l2" or "l1".
    """

    def length(part: Tensor, axes: tuple[int, ...] = (2, 3)) -> Tensor:
        if norm == "l1":
            return part.abs().sum(axes, keepdim=True)
        euclidean: Tensor = torch.linalg.vector_norm(part, dim=axes, keepdim=True)
        return euclidean

    power = 2 if norm == "l2" else 1
    channels = delta.shape[1]
    removed, inside = torch.maximum(first, second), delta * first
    total = length(delta, (1, 2, 3)) ** power
    freed = length(delta * removed ** (1 / power)) ** power
    # The bump is scaled to the norm of the old perturbation, or to the threshold where that is larger. In a window
    # that is almost empty, the direction of the old perturbation is rounding error, which depends on the rest of the
    # batch; the bump dominates it then.
    shape = inside.addcmul_(sign * torch.maximum(length(inside), _EMPTY_WINDOW * radius), bump)
    budget = (radius**power - total).clamp_min(0) / channels + freed
    scale, kept = 1 / _safe_divisor(length(shape)), (1 - removed) ** (1 / power)
    if norm == "l1":
        return delta.mul_(kept).addcmul_(shape, channels * budget * scale)
    # Rounding errors can make the new norm larger than the radius: `fit` scales the result back.
    after = total + (budget - freed).sum(1, keepdim=True)
    fit = (radius / _safe_divisor(after.sqrt())).clamp_max(1)
    return delta.mul_(fit * kept).addcmul_(shape, fit * budget.sqrt() * scale)


def projected_l1(delta: Tensor, radius: Tensor) -> Tensor:
    """Project `delta` (B, C, H, W) onto the l1 ball of `radius` (B, 1, 1, 1), by Newton's method instead of a sort.

    The projection subtracts a threshold from every absolute value. The l1 norm of the result is a convex and piecewise
    linear function of the threshold, so that a few Newton steps from 0 reach the solution.
    """
    size = delta.abs()
    threshold = torch.zeros_like(radius)
    # With one channel, `move_mass` distributes no more than the radius, so that no threshold is needed.
    for _ in range(_NEWTON_STEPS if delta.shape[1] > 1 else 0):
        remainder = (size - threshold).clamp_min_(0)
        excess = remainder.sum((1, 2, 3), keepdim=True) - radius
        count = remainder.sign_().sum((1, 2, 3), keepdim=True)
        threshold = threshold + excess.clamp_min(0) / count.clamp_min(1)
    remainder = (size - threshold).clamp_min_(0)
    fit = (radius / _safe_divisor(remainder.sum((1, 2, 3), keepdim=True))).clamp_max(1)
    return remainder.mul_(fit).copysign_(delta)


def _safe_divisor(value: Tensor) -> Tensor:
    """Replace values that are not positive by 1, so that the result can be used as a divisor."""
    return torch.where(value > 0, value, 1)
