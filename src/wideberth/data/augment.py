"""Augmentation of whole batches, keyed by sample: the same picture whatever batch, order or process it comes in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
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
