"""Augmentation of whole batches, keyed by sample: the same picture whatever batch, order or process it comes in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from wideberth.checks import InputError, at_least, choice
from wideberth.randomness import Noise


class Augmentation(ABC):
    """What is done to a training batch before anything else; a new one is one subclass."""

    @abstractmethod
    def __call__(self, x: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        """Augment x (B, ...) of samples `index` (B,) where it is; the result is in the box, of x's shape and dtype."""


@dataclass(frozen=True)
class CropFlip(Augmentation):
    """Random shift and mirror image: pad, crop back to size at a random place, flip left and right half the time.

    Attributes:
        padding: pixels added on each side, hence the largest shift; 0 for none.
        mode: what is added: zeros ("constant") or the mirrored border ("reflect").
        flip: whether to flip.

    Raises:
        InputError: a negative padding, an unknown mode.
    """

    padding: int = 4
    mode: Literal["constant", "reflect"] = "constant"
    flip: bool = True

    def __post_init__(self) -> None:
        at_least("padding", self.padding, 0)
        choice("mode", self.mode, ("constant", "reflect"))

    def __call__(self, x: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        """Augment a batch where it is.

        Args:
            x: (B, C, H, W) floating point images.
            index: (B,) int64, what names each sample.
            seed: names the run's augmentations.
            epoch: a sample looks different in each.

        Returns:
            (B, C, H, W), a new tensor of x's dtype, on x's device.

        Raises:
            InputError: x is not a batch of images, or is too small to mirror `padding` pixels of its border.
        """
        if x.dim() != 4:
            raise InputError(f"x of shape {tuple(x.shape)}: CropFlip is for images, (B, C, H, W)")
        batch, channels, height, width = x.shape
        if self.mode == "reflect" and self.padding >= min(height, width):
            raise InputError(f"padding={self.padding}: mode='reflect' needs less than the {height}x{width} of x")
        noise = Noise(index.to(x.device), seed, epoch)
        shift = noise.fold("crop").integer(2 * self.padding + 1, (2,))
        rows = shift[:, :1] + torch.arange(height, device=x.device)
        columns = torch.arange(width, device=x.device).expand(batch, width)
        if self.flip:
            flipped = noise.fold("flip").integer(2, (1,)) == 1
            columns = torch.where(flipped, width - 1 - columns, columns)
        columns = shift[:, 1:] + columns
        # One gather of the pixels wanted: no loop over samples and no copy per step.
        pixels = rows[:, :, None] * (width + 2 * self.padding) + columns[:, None, :]
        padded = pad(x, (self.padding,) * 4, mode=self.mode).flatten(2)
        return padded.gather(2, pixels.view(batch, 1, -1).expand(-1, channels, -1)).view_as(x)


@dataclass(frozen=True)
class RandomResizedCrop(Augmentation):
    """A part of the image at a random place, of random size and shape, stretched to the whole (Szegedy et al., 2015).

    As `torchvision.transforms.RandomResizedCrop` with bilinear interpolation, but of the loaded image and not of the
    file, whose detail is gone: a crop of a quarter of the area has half the resolution.

    Attributes:
        scale: smallest and largest share of the area, 0 < smallest <= largest <= 1.
        ratio: smallest and largest width over height, 0 < smallest <= largest; their logarithm is uniform.
        flip: whether to flip left and right half the time.

    Raises:
        InputError: a range that is empty or out of bounds.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __post_init__(self) -> None:
        for name, most in (("scale", 1.0), ("ratio", float("inf"))):
            given = getattr(self, name)
            if len(given) != 2 or not 0 < given[0] <= given[1] <= most or given[1] == float("inf"):
                raise InputError(f"{name}={tuple(given)}: must be (smallest, largest), above 0 and at most {most:g}")

    def __call__(self, x: Tensor, index: Tensor, *, seed: int, epoch: int) -> Tensor:
        """Augment a batch where it is.

        Args:
            x: (B, C, H, W) floating point images.
            index: (B,) int64, what names each sample.
            seed: names the run's augmentations.
            epoch: a sample looks different in each.

        Returns:
            (B, C, H, W), a new tensor of x's dtype, on x's device.

        Raises:
            InputError: x is not a batch of images.
        """
        if x.dim() != 4:
            raise InputError(f"x of shape {tuple(x.shape)}: RandomResizedCrop is for images, (B, C, H, W)")
        noise = Noise(index.to(x.device), seed, epoch)
        sizes = self._sizes(noise, *x.shape[2:])
        room = torch.tensor(x.shape[2:], device=x.device) - sizes
        starts = (noise.fold("place").uniform((2,), torch.float64) * (room + 1)).floor()
        rows, columns = (_positions(starts[:, i], sizes[:, i], x.shape[2 + i]) for i in range(2))
        if self.flip:
            flipped = noise.fold("flip").integer(2, (1,)) == 1
            columns = torch.where(flipped, columns.flip(1), columns)
        return _sampled(_sampled(x, 2, rows), 3, columns)

    def _sizes(self, noise: Noise, height: int, width: int) -> Tensor:
        """(B, 2) height and width of each crop: the first of ten tries that fits in the image."""
        share, shape = noise.fold("size").uniform((2, 10), torch.float64).unbind(1)
        low, high = self.scale
        area = height * width * (low + (high - low) * share)
        low, high = log(self.ratio[0]), log(self.ratio[1])
        ratio = (low + (high - low) * shape).exp()
        tries = torch.stack([(area / ratio).sqrt().round(), (area * ratio).sqrt().round()], 2).clamp_min(1)
        fits = (tries[..., 0] <= height) & (tries[..., 1] <= width)
        first = fits.int().argmax(1)
        # As large as the ratio allows, for those without any.
        whole = (min(height, round(width / self.ratio[0])), min(width, round(height * self.ratio[1])))
        chosen = tries[torch.arange(len(tries), device=tries.device), first]
        return torch.where(fits.any(1, keepdim=True), chosen, tries.new_tensor(whole).clamp_min(1))


def _positions(start: Tensor, extent: Tensor, count: int) -> Tensor:
    """(B, count) centres of `count` pixels spread over `extent` pixels from `start` on, never beyond their centres."""
    centre = torch.arange(count, device=start.device) + 0.5
    spread = centre * (extent[:, None] / count) - 0.5
    return start[:, None] + torch.minimum(spread.clamp_min(0), extent[:, None] - 1)


def _sampled(x: Tensor, axis: int, positions: Tensor) -> Tensor:
    """x (B, C, H, W) at positions (B, n) of an axis, between the two pixels next to each: so within their values."""
    below = positions.floor()
    shape = [len(x), 1, 1, 1]
    shape[axis] = -1
    weight = (positions - below).to(x.dtype).view(shape)
    size = list(x.shape)
    size[axis] = positions.shape[1]
    pixels = below.long()
    above = (pixels + 1).clamp_max(x.shape[axis] - 1)
    one, other = (x.gather(axis, i.view(shape).expand(size)) for i in (pixels, above))
    return torch.lerp(one, other, weight)
