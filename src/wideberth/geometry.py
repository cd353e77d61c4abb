"""Norm balls around each sample, intersected with the box: project, start, ascend, measure.

`eps` is always one radius per sample, (B,). A perturbation `delta` has the shape of x; its norm is over all but the
first axis. Arithmetic runs in at least float32, and a point is only ever rounded *towards* x, so that what is returned
lies inside ball and box in the dtype it is returned in, bfloat16 included.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from wideberth.checks import Box, InputError, Norm
from wideberth.randomness import Noise

Start: TypeAlias = Literal["uniform", "gaussian", "none"]

_TINY = 1e-12


def per_sample(value: float | Tensor, x: Tensor) -> Tensor:
    """A number or a (B,) tensor as (B,) on x's device, in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    radii: Tensor = torch.as_tensor(value, dtype=dtype, device=x.device)
    return radii.expand(x.shape[0])


def column(value: Tensor, x: Tensor) -> Tensor:
    """(B,) lifted to x's rank, (B, 1, ..., 1)."""
    return value.view(-1, *[1] * (x.dim() - 1))


def choose(new: Tensor, this: Tensor, that: Tensor) -> Tensor:
    """Rows of `this` where `new` (B,) bool, of `that` elsewhere, bit for bit.

    It may be one of the two itself: not to be changed in place.
    """
    if new.device.type != "cpu":
        return torch.where(column(new, this), this, that)
    # Where looking costs nothing: a mask of bools would stop a CPU from using vector instructions.
    rows = new.nonzero().squeeze(1)
    if 2 * len(rows) > len(new):
        rows, this, that = (~new).nonzero().squeeze(1), that, this
    return that.index_copy(0, rows, this[rows]) if len(rows) else that


def norm(delta: Tensor, p: Norm) -> Tensor:
    """The norm of each sample's perturbation, (B,) >= 0."""
    flat = delta.flatten(1)
    if p == "linf":
        return flat.abs().amax(1)
    # Summed in float64: a million float32 squares lose more than the slack that a verdict allows.
    if p == "l1":
        return flat.abs().sum(1, dtype=torch.float64).to(flat.dtype)
    length: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
    return length.to(flat.dtype)


def dual(p: Norm) -> Norm:
    """The dual norm's name: linf and l1 swap, l2 stays.

    A gradient g changes a linear function by at most eps * ||g||_dual over a ball of radius eps.
    """
    duals: dict[Norm, Norm] = {"linf": "l1", "l1": "linf", "l2": "l2"}
    return duals[p]


def steepest(gradient: Tensor, p: Norm) -> Tensor:
    """The step of unit norm that ascends fastest, shape of `gradient`; zero where the gradient is zero.

    linf: sign; l2: the normalised gradient; l1: sign of the one largest entry, all weight on it.
    """
    if p == "linf":
        return gradient.sign()
    if p == "l2":
        # Scaled by the largest entry first: a gradient of 1e-30 has a direction too, but its square underflows.
        scale = column(norm(gradient, "linf"), gradient)
        scaled = gradient / torch.where(scale > 0, scale, 1)
        return scaled / column(norm(scaled, "l2"), gradient).clamp_min(_TINY)
    flat = gradient.flatten(1)
    largest = flat.abs().argmax(1, keepdim=True)
    return torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign()).view_as(gradient)


def project(delta: Tensor, eps: Tensor, p: Norm) -> Tensor:
    """The nearest point of the eps-ball around zero, shape of `delta` (Euclidean projection, exact in every norm)."""
    radius = column(eps, delta)
    if p == "linf":
        return delta.clamp(-radius, radius)
    if p == "l2":
        length = column(norm(delta, "l2"), delta)
        return delta * (radius / length.clamp_min(_TINY)).clamp_max(1)
    return project_l1(delta, eps, torch.full_like(delta, float("inf")))


def project_l1(delta: Tensor, eps: Tensor, room: Tensor) -> Tensor:
    """The nearest point of {||z||_1 <= eps, |z_i| <= room_i}, shape of `delta`, exactly and in one sort.

    `room` >= 0 (infinite: none) is how far entry i may go in the direction that delta_i has, so that a box around
    x becomes part of the projection (Croce and Hein 2021) instead of a clamp after it.

    The solution is min(max(|delta| - t, 0), room) with the smallest t >= 0 that fits; its l1 norm is piecewise linear
    in t with corners at |delta| and |delta| - room, so t is read off the sorted corners.
    """
    flat, room = delta.flatten(1), room.flatten(1)
    size = flat.abs()
    corner = torch.cat([size, size - torch.minimum(size, room)], dim=1)
    # Going down from t = infinity, the norm's slope grows by one at |delta| and shrinks by one at |delta| - room.
    turn = torch.cat([torch.ones_like(size), -torch.ones_like(size)], dim=1)
    corner, order = corner.sort(dim=1, descending=True)
    slope = turn.gather(1, order).cumsum(1)
    drop = corner[:, :-1] - corner[:, 1:]
    reached = torch.cat([torch.zeros_like(corner[:, :1]), (slope[:, :-1] * drop).cumsum(1)], dim=1)
    # The last corner whose norm still fits; from there the slope leads on to t where the norm is eps.
    last = (reached <= eps[:, None]).sum(1, keepdim=True) - 1
    missing = (eps[:, None] - reached.gather(1, last)).clamp_min(0)
    threshold = corner.gather(1, last) - missing / slope.gather(1, last).clamp_min(1)
    fits = torch.minimum(size, room).sum(1, keepdim=True) <= eps[:, None]
    threshold = torch.where(fits, torch.zeros_like(threshold), threshold.clamp_min(0))
    kept = torch.minimum((size - threshold).clamp_min(0), room)
    # Entries far larger than eps leave their rounding errors in what is left of them: too long by 2e-5 in float32.
    kept = kept * (eps[:, None] / kept.sum(1, keepdim=True).clamp_min(_TINY)).clamp_max(1)
    return (kept * flat.sign()).view_as(delta)


def inward(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta in x's dtype, each entry rounded towards x: the sum never lies further from x than delta says.

    `delta` may be a column (B, 1, ..., 1), the same for all entries of a row.
    """
    moved = (x + delta).to(x.dtype)
    # Half an ulp at 1.0 is 2e-6 of eps = 8/255 in float32 and 6 % of it in bfloat16: a budget exceeded by rounding.
    overshot = (moved.to(delta.dtype) - x).abs_() > delta.abs()
    return moved.nextafter_(torch.where(overshot, x, moved))


def place(x: Tensor, delta: Tensor, eps: Tensor, p: Norm, box: Box) -> Tensor:
    """x plus the projection of `delta` onto ball and box: the point an attack may return, dtype of x.

    Args:
        x: (B, ...) inside the box.
        delta: the wanted perturbation, shape of x, any floating dtype.
        eps: (B,) radii; where 0, x comes back bit for bit.
        p: the norm.
        box: (low, high).

    linf and l1 give the exact projection onto the intersection; l2 projects onto the ball and then onto the box (the
    field's convention: inside both, since a clamp towards x shortens every entry).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    delta = delta.to(wide)
    if p == "l1":
        base = x.to(wide)
        delta = project_l1(delta, eps, torch.where(delta > 0, box[1] - base, base - box[0]).clamp_min(0))
    else:
        delta = project(delta, eps, p)
    return inward(x, delta).clamp(*box)


def faces(x: Tensor, eps: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """The lowest and the highest point of linf ball and box, dtype of x: what lies between them lies in both."""
    wide = torch.promote_types(torch.promote_types(x.dtype, eps.dtype), torch.float32)
    radius = column(eps, x).to(wide)
    return inward(x, -radius).clamp_(*box), inward(x, radius).clamp_(*box)


def random_start(x: Tensor, eps: Tensor, p: Norm, start: Start, noise: Noise) -> Tensor:
    """A random perturbation to begin from, shape of x in at least float32, inside the eps-ball.

    "uniform" is uniform over the ball's volume (linf: each entry in [-eps, eps]); "gaussian" is 0.001 * N(0, 1) per
    entry, projected (TRADES, MART, MAIL); "none" is zero.

    Raises:
        InputError: for another start.
    """
    shape, dtype = x.shape[1:], torch.promote_types(x.dtype, torch.float32)
    radius = column(eps, x)
    if start == "none":
        return torch.zeros_like(x, dtype=dtype)
    if start == "gaussian":
        return project(0.001 * noise.normal(shape, dtype), eps, p)
    if start != "uniform":
        raise InputError(f"start={start!r}: accepted are uniform, gaussian, none")
    if p == "linf":
        return noise.uniform(shape, dtype).mul_(2).sub_(1) * radius
    # Uniform on the sphere times the d-th root of a uniform is uniform in the ball; for l1, signed exponentials.
    if p == "l2":
        direction = noise.normal(shape, dtype)
    else:
        direction = -torch.log1p(-noise.uniform(shape, dtype)) * noise.fold("sign").sign(shape, dtype)
    dimension = max(1, x[0].numel())
    reach = eps * noise.fold("reach").uniform((), dtype) ** (1 / dimension)
    return direction * column(reach / norm(direction, p).clamp_min(_TINY), x)
