"""Rotation and translation (Engstrom et al. 2019), and how an image is sampled between its pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wideberth import checks, geometry, losses
from wideberth.attacks.base import Attack, S
from wideberth.attacks.state import AttackInputs, AttackState
from wideberth.checks import Box, InputError
from wideberth.losses import Loss


def images_only(attack: Attack[S], x: Tensor) -> None:
    """Refuse inputs that are not images (B, C, H, W) (`InputError`)."""
    if x.dim() != 4:
        raise InputError(f"x of shape {tuple(x.shape)}: {type(attack).__name__} is defined on images, (B, C, H, W)")


def sampled(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The image between its pixels, (B, C, H, W), bilinearly; differentiable in the positions.

    Args:
        image: (B, C, H, W).
        rows: (B, H, W) positions in pixels, in [0, H - 1].
        columns: (B, H, W), likewise in [0, W - 1].

    Unlike `grid_sample`, this has a derivative on the image's edge too: there, of the only way that is open.
    """
    height, width = image.shape[2:]
    top, left = (
        at.detach().floor().clamp_max(side - 2).clamp_min(0) for at, side in ((rows, height), (columns, width))
    )
    down, across = (rows - top)[:, None], (columns - left)[:, None]
    flat, corner = image.flatten(2), (top * width + left).long()
    next_row, next_column = min(1, height - 1) * width, min(1, width - 1)

    def pixels(offset: int) -> Tensor:
        where = (corner + offset).flatten(1)[:, None].expand(-1, image.shape[1], -1)
        return flat.gather(2, where).view_as(image)

    upper = torch.lerp(pixels(0), pixels(next_column), across)
    lower = torch.lerp(pixels(next_row), pixels(next_row + next_column), across)
    return torch.lerp(upper, lower, down)


def pixel_positions(image: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows (1, H, 1) and columns (1, 1, W) of the pixels."""
    height, width = image.shape[2:]
    rows, columns = (torch.arange(side, dtype=dtype, device=image.device) for side in (height, width))
    return rows[None, :, None], columns[None, None, :]


def input_where_eps_is_zero(x: Tensor, point: Tensor, eps: Tensor, box: Box) -> Tensor:
    """The point (B, ...) in the box and dtype of x; x itself, bit for bit, where eps (B,) is zero."""
    return torch.where(geometry.column(eps > 0, x), point.to(x.dtype).clamp(*box), x)


@dataclass(frozen=True, kw_only=True)
class Spatial(Attack[AttackState]):
    """Rotation and translation (Engstrom et al. 2019): the worst of a grid or of random draws, one forward each.

    eps scales the limits: 1 means rotations by up to `rotation` degrees and translations by up to `translation` pixels
    in either direction, 0.5 half of each, and 0 returns the input bit for bit. It is not the radius of a norm ball, and
    `norm` has no effect. Defined on images (B, C, H, W) and a finite box, whose low face is what comes into view from
    outside. Sampling is bilinear, about the image's centre.

    Among the transforms tried, the one of highest loss that is misclassified is returned, or else the one of highest
    loss. The defaults are the paper's for 32 x 32 images (its "worst of 10"; `search="grid"` is its exhaustive search).

    What we do differently: each row draws transforms of its own, so that a result does not depend on the batch.

    Attributes:
        rotation: degrees at eps = 1, >= 0.
        translation: pixels at eps = 1, >= 0, along each axis.
        search: "random" tries `tries` transforms drawn uniformly within the limits; "grid" tries all of the `grid`.
        tries: transforms per run of "random", >= 1.
        grid: evenly spaced values per limit, first vertical, then horizontal translation, then rotation, each >= 1; an
            odd number includes zero, and 1 is zero alone.
        loss: what ranks them; (logits, y) -> (B,).
    """

    rotation: float = 30.0
    translation: float = 3.0
    search: Literal["random", "grid"] = "random"
    tries: int = 10
    grid: tuple[int, int, int] = (5, 5, 31)
    loss: Loss = losses.cross_entropy

    needs_gradient: ClassVar[bool] = False
    norm_bounded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        super().__post_init__()
        checks.at_least("rotation", self.rotation, 0)
        checks.at_least("translation", self.translation, 0)
        checks.choice("search", self.search, ("random", "grid"))
        checks.at_least("tries", self.tries, 1)
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise InputError(f"grid={self.grid}: must be three counts, each at least 1")
        if not all(map(math.isfinite, self.box)):
            raise InputError(f"box={self.box}: must be finite, its low face is what comes into view from outside")

    @property
    def num_steps(self) -> int:
        """One query for each transform."""
        return self.tries if self.search == "random" else math.prod(self.grid)

    def init(self, inputs: AttackInputs) -> AttackState:
        """At the first transform.

        Raises:
            InputError: for inputs that are not images.
        """
        images_only(self, inputs.x)
        return AttackState.initial(inputs, self._transformed(inputs, torch.zeros_like(inputs.y)))

    def update(self, model: nn.Module, inputs: AttackInputs, state: AttackState) -> AttackState:
        """One forward at `state.point`, then the next transform."""
        with torch.no_grad():
            logits = model(state.point)
            loss = inputs.attack_loss(self.loss)(logits)
        state = state.recorded(inputs, logits, loss, cost=1)
        return replace(state, point=self._transformed(inputs, state.iteration))

    def _transforms(self, inputs: AttackInputs, iteration: Tensor) -> Tensor:
        """The transforms of an iteration in units of the limits, (B, 3) in [-1, 1]."""
        dtype = inputs.eps.dtype
        if self.search == "random":
            return 2 * inputs.noise.fold("spatial").then(iteration).uniform((3,), dtype) - 1
        # The last axis of the grid runs fastest: how many transforms one move along each axis is away.
        counts = torch.tensor(self.grid, device=iteration.device)
        apart = torch.tensor([math.prod(self.grid[axis + 1 :]) for axis in range(3)], device=iteration.device)
        place = iteration[:, None] // apart % counts
        return (2 * place - (counts - 1)).to(dtype) / (counts - 1).clamp_min(1)

    def _transformed(self, inputs: AttackInputs, iteration: Tensor) -> Tensor:
        x, eps = inputs.x, inputs.eps
        limits = eps.new_tensor([self.translation, self.translation, math.radians(self.rotation)])
        down, across, angle = (self._transforms(inputs, iteration) * limits * eps[:, None])[:, :, None, None].unbind(1)
        rows, columns = pixel_positions(x, eps.dtype)
        middle_row, middle_column = (x.shape[2] - 1) / 2, (x.shape[3] - 1) / 2
        # A pixel shows what was where undoing the translation, then the rotation, leads.
        rows, columns = rows - middle_row - down, columns - middle_column - across
        source_rows = middle_row + angle.cos() * rows + angle.sin() * columns
        source_columns = middle_column - angle.sin() * rows + angle.cos() * columns
        height, width, low = x.shape[2], x.shape[3], self.box[0]
        where = torch.stack([(2 * source_columns + 1) / width - 1, (2 * source_rows + 1) / height - 1], dim=3)
        found = low + F.grid_sample(x.to(eps.dtype) - low, where, padding_mode="zeros", align_corners=False)
        return input_where_eps_is_zero(x, found, eps, self.box)
