"""The gradient in a convolution's input, computed as a convolution that returns blocks of pixels.

A CPU computes sixteen output channels in the time of one, so the gradient to an image of one or three channels is
faster when several pixels are computed at once. Where the convolution has a stride, the pixels of a block depend on
different weights; a transposed convolution looks these up one by one, and a plain convolution, with the pixels as
channels, computes them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Settings: TypeAlias = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""Stride, padding and dilation by axis, and groups, of a convolution."""

_LANES = 16
"""Output channels that a CPU's convolutions compute at once."""
_MOST_STRIDED = 16
"""Input channels up to which a convolution with a stride gains from blocks (measured at stride 2, side 3)."""


def convolution_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, settings: Settings, wanted: tuple[bool, bool, bool]
) -> Any:
    """The gradients of a convolution in its input, weight and bias, by torch; None for those that are not wanted.

    Args:
        gradient: (B, C', H', W') in the output.
        x: (B, C, H, W) the input.
        weight: (C', C / groups, h, w).
        settings: of the convolution.
        wanted: whether to compute the gradient in the input, in the weight and in the bias.
    """
    stride, padding, dilation, groups = settings
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, None, stride, padding, dilation, False, [0, 0], groups, wanted
    )


class TransposedConvolution:
    """From the gradient in a convolution's output to that in its input, by blocks of pixels where that is faster.

    Args:
        layer: a convolution whose weights no longer change.
        single_pixels: compute blocks of one pixel here too, instead of by torch.

    Attributes:
        supported: whether this convolution's gradient can be computed by blocks.
    """

    def __init__(self, layer: nn.Conv2d, single_pixels: bool = False) -> None:
        self.layer, self.single_pixels = layer, single_pixels
        padding = layer.padding
        self.supported = (
            not isinstance(padding, str)
            and layer.padding_mode == "zeros"
            and layer.stride in ((1, 1), (2, 2))
            and (layer.dilation, layer.groups) == ((1, 1), 1)
            and all(pad < side for pad, side in zip(padding, layer.kernel_size, strict=True))
        )
        self.weights: dict[int, Tensor] = {}
        """The transposed weights by the side of the block, made when first needed."""

    def block_side(self, size: torch.Size) -> int | None:
        """The side of the blocks for inputs of height and width `size`; None where torch computes the gradient."""
        stride, channels = self.layer.stride[0], self.layer.in_channels
        fitting = [k for k in (4, 3, 2) if not k % stride and not any(n % k for n in size)]
        side = next((k for k in fitting if channels * k**2 <= _LANES), None)
        if side is None and stride > 1 and channels <= _MOST_STRIDED and stride in fitting:
            side = stride
        if side is None and stride == 1 and self.single_pixels:
            side = 1
        return side if self.supported else None

    def __call__(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The gradient in the input, (B, C, H, W).

        Args:
            gradient: (B, C', H', W') in the output, in the precision of the weights.
            x: (B, C, H, W) the input, of which only the shape matters.
        """
        size, layer = x.shape[2:], self.layer
        side = self.block_side(size)
        if side is None:
            padding = [int(pad) for pad in layer.padding]
            settings = (list(layer.stride), padding, list(layer.dilation), layer.groups)
            wanted = (True, False, False)
            found: Tensor = convolution_gradients(gradient, x.to(gradient.dtype), layer.weight, settings, wanted)[0]
            return found
        if side not in self.weights:
            self.weights[side] = _transposed_weight(layer, side)
        stride, pads = side // layer.stride[0], []
        for axis in (1, 0):  # in the order of F.pad
            first, last = _reach(layer, axis, side)
            pads += [-first, stride * (size[axis] // side - 1) + last - (gradient.shape[2 + axis] - 1)]
        around = (pads[2], pads[0])
        if (pads[3], pads[1]) != around:
            gradient, around = F.pad(gradient, pads), (0, 0)
        blocks = F.conv2d(gradient, self.weights[side], None, stride, around)
        return _image(blocks, side)


def _reach(layer: nn.Conv2d, axis: int, block: int) -> tuple[int, int]:
    """The first and the last output that depend on a block, relative to the output at the block's first pixel."""
    pad, side, stride = int(layer.padding[axis]), layer.kernel_size[axis], layer.stride[axis]
    return -((side - 1 - pad) // stride), (block - 1 + pad) // stride


def _transposed_weight(layer: nn.Conv2d, block: int) -> Tensor:
    """From the weight (C', C, h, w) to that of its transpose, (block^2 * C, C', ...), a pixel's channels together."""
    weight = layer.weight.detach()
    (top, bottom), (left, right) = (_reach(layer, axis, block) for axis in (0, 1))
    outputs, inputs = weight.shape[:2]
    found = weight.new_zeros(block, block, inputs, outputs, bottom - top + 1, right - left + 1)
    for down in range(block):
        for across in range(block):
            for high in range(weight.shape[2]):
                for wide in range(weight.shape[3]):
                    row, off = divmod(down + int(layer.padding[0]) - high, layer.stride[0])
                    column, beside = divmod(across + int(layer.padding[1]) - wide, layer.stride[1])
                    if not off and not beside:
                        found[down, across, :, :, row - top, column - left] = weight[:, :, high, wide].T
    return found.flatten(0, 2).contiguous(memory_format=torch.channels_last)


def _image(blocks: Tensor, block: int) -> Tensor:
    """From blocks (B, block^2 * C, H / block, W / block) to the image (B, C, H, W), channels last."""
    if block == 1:
        return blocks
    batch, depth, high, wide = blocks.shape
    # In a row of blocks the channels of all pixels are contiguous on both sides: long runs, copied once.
    rows = blocks.permute(0, 2, 3, 1).reshape(batch, high, wide, block, depth // block).transpose(2, 3)
    return rows.reshape(batch, high * block, wide * block, depth // block**2).permute(0, 3, 1, 2)
