"""The shortest way from each sample to a hyperplane without leaving the box, in every norm, exactly.

This is what an attack on a linear model of the network needs at every step (DeepFool, FAB). Each entry can go only as
far as the box lets it, and what a row gains is piecewise linear in one number per row: found for all rows at once, with
no loop over rows or entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wideberth.checks import Box, Norm

_ROUNDS = 32
"""Of Newton's method. Each divides (what is missing) x (slope) by at least 4; as a rule 3 rounds are exact."""


def shortest_step(x: Tensor, normal: Tensor, rise: Tensor, p: Norm, box: Box) -> Tensor:
    """The perturbation of least norm with <normal, perturbation> = rise and x + perturbation in the box.

    Args:
        x: (B, ...) inside the box.
        normal: (B, ...) normals of the hyperplanes, of any length; a row of zeros gives no step.
        rise: (B,) by how much <normal, x> is to change, of either sign.
        p: the norm that is least.
        box: (low, high), which may be infinite.

    Returns:
        Shape of x, in at least float32. Where the box does not hold so much rise: the way to the corner that comes
        closest. Entries that the normal leaves at zero do not move.
    """
    return Normals.of(normal.to(torch.promote_types(x.dtype, torch.float32))).shortest_step(x, rise, p, box)


@dataclass(frozen=True)
class Normals:
    """Normals of hyperplanes, made ready for steps from several points.

    Attributes:
        gain: (B, d) >= 0, their absolute values in units of the largest: a gradient of 1e-30 has a direction too, but
            its square underflows.
        sign: (B, d) their signs.
        scale: (B, 1) > 0, the unit.
    """

    gain: Tensor
    sign: Tensor
    scale: Tensor

    @classmethod
    def of(cls, normal: Tensor) -> Normals:
        """Those of (B, ...) normals, in at least float32."""
        flat = normal.flatten(1)
        size = flat.abs()
        scale = size.amax(1, keepdim=True)
        scale = torch.where(scale > 0, scale, 1)
        return cls(size.div_(scale), flat.sign(), scale)

    def shortest_step(self, x: Tensor, rise: Tensor, p: Norm, box: Box) -> Tensor:
        """As the function of that name."""
        wide = self.gain.dtype
        base, way = x.flatten(1).to(wide), self.sign * rise.to(wide).sign()[:, None]
        wanted = rise.to(wide).abs()[:, None] / self.scale
        # How far each entry can go the way it wants to: the larger of the two signed distances to the faces. No bools:
        # they would not run in vectors.
        room = (box[1] - base).mul_(way)
        room = torch.maximum(room, (box[0] - base).mul_(way), out=room)
        endless = not all(map(math.isfinite, box))
        if endless:
            room = room.nan_to_num_(nan=0, posinf=float("inf"))  # where nothing is to be gained: 0 times infinity
        room = room.clamp_min_(0)
        size = _greedy(self.gain, room, wanted) if p == "l1" else _level(self.gain, room, wanted, p, endless)
        return (size * way).view(x.shape)


def _level(gain: Tensor, room: Tensor, wanted: Tensor, p: Norm, endless: bool) -> Tensor:
    """Entry i goes min(t * pace_i, room_i), with one t per row: the pace is 1 in linf, and the gain in l2.

    `endless` says that some room may be infinite.

    What the row gains is concave and piecewise linear in t, so Newton's method never goes too far, and stands still,
    exactly right, once it knows which entries have come to the face of the box. It begins where a box without faces
    would end it.
    """
    # An entry without gain has no room either, and counts for nothing.
    corner = room if p == "linf" else room / gain.clamp_min(torch.finfo(gain.dtype).tiny)
    most, slopes = gain * room, gain if p == "linf" else gain * gain
    if endless:
        most.nan_to_num_(nan=0)
    # Only where looking costs nothing: a GPU had better do all rounds for all rows than wait to be asked.
    looking = gain.device.type == "cpu"
    slope = slopes.sum(1, keepdim=True)
    level = torch.where(slope > 0, wanted / slope, 0)
    levels, rows = level, torch.arange(len(gain), device=gain.device)
    share, part = torch.empty_like(gain), torch.empty_like(gain)
    left = corner
    for _ in range(_ROUNDS):
        # Which entries have come to the face, and which are still on their way, as numbers.
        missing = wanted - torch.mul(torch.le(left, level, out=share), most, out=part).sum(1, keepdim=True)
        slope = torch.mul(torch.gt(left, level, out=share), slopes, out=part).sum(1, keepdim=True)
        further = torch.where(slope > 0, missing / slope, float("inf"))
        if not looking:
            level = levels = torch.maximum(level, further)
            continue
        going = (further > level).squeeze(1)
        level = torch.maximum(level, further)
        levels[rows] = level
        count = int(going.sum())
        if not count:
            break
        if 2 * count < len(rows):
            rows, level, wanted = rows[going], level[going], wanted[going]
            left, most, slopes = left[going], most[going], slopes[going]
            share, part = torch.empty_like(left), torch.empty_like(left)
    levels = levels.clamp_max(torch.finfo(levels.dtype).max)
    return torch.minimum(levels if p == "linf" else levels * gain, room)


def _greedy(gain: Tensor, room: Tensor, wanted: Tensor) -> Tensor:
    """In l1 the entries of largest gain go all the way, one after the other, until it is enough."""
    gains, order = gain.sort(dim=1, descending=True)
    rooms = room.gather(1, order)
    reached = (gains * rooms).cumsum(1)
    rank = torch.arange(gain.shape[1], device=gain.device)
    # Ranks, not sums, tell who moves: a rounding error in a sum would send entries of tiny gain a long way.
    last = (reached < wanted).sum(1, keepdim=True)
    before = reached.gather(1, (last - 1).clamp_min(0)).masked_fill(last == 0, 0)
    part = (wanted - before).clamp_min(0) / torch.where(gains > 0, gains, 1)
    moved = torch.where(rank < last, rooms, torch.minimum(part, rooms).masked_fill(rank > last, 0))
    return torch.zeros_like(gain).scatter(1, order, moved)
