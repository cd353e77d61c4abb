"""The gradient in a convolution's input as a convolution itself, to blocks of pixels: faster where channels are few.

A CPU fills sixteen output channels at the price of one, so a gradient to an image of one or three channels had better
go to several pixels at once. And where a convolution has a stride, the pixels of a block depend on different weights
each, which its transpose looks up one by one; as channels of a plain convolution they are computed together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LANES = 16
"""Output channels that a CPU's convolutions compute at once."""
_MOST_STRIDED = 16
"""Input channels up to which a convolution with a stride gains from blocks (measured at stride 2, side 3)."""


class Transposed:
    """Takes gradients back through a convolution, to blocks of pixels where that is faster.

    Args:
        layer: a convolution whose weights no longer change.
        plain: whether blocks of one pixel, too, are to be computed here and not by torch.
    """

    def __init__(self, layer: nn.Conv2d, plain: bool = False) -> None:
        self.layer, self.plain = layer, plain
        pads = layer.padding
        self.able = (
            not isinstance(pads, str)
            and layer.padding_mode == "zeros"
            and layer.stride in ((1, 1), (2, 2))
            and (layer.dilation, layer.groups) == ((1, 1), 1)
            and all(pad < side for pad, side in zip(pads, layer.kernel_size, strict=True))
        )
        self.turned: dict[int, Tensor] = {}

    def block(self, size: torch.Size) -> int | None:
        """The side of the blocks for inputs of that height and width; None: torch is to do it."""
        stride, channels = self.layer.stride[0], self.layer.in_channels
        fitting = [k for k in (4, 3, 2) if not k % stride and not any(n % k for n in size)]
        found = next((k for k in fitting if channels * k**2 <= _LANES), None)
        if found is None and stride > 1 and channels <= _MOST_STRIDED and stride in fitting:
            found = stride
        if found is None and stride == 1 and self.plain:
            found = 1
        return found if self.able else None

    def __call__(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The gradient in the input (B, C, H, W), from that in the output (B, C', H', W').

        Args:
            gradient: in the output, in the precision of the weights.
            x: (B, C, H, W) the input, whose values do not matter.
        """
        size, layer = x.shape[2:], self.layer
        block = self.block(size)
        if block is None:
            settings = (list(layer.stride), list(layer.padding), list(layer.dilation), False, [0, 0], layer.groups)
            found: Tensor = torch.ops.aten.convolution_backward(
                gradient, x.to(gradient.dtype), layer.weight, None, *settings, (True, False, False)
            )[0]
            return found
        if block not in self.turned:
            self.turned[block] = _to_blocks(layer, block)
        stride, pads = block // layer.stride[0], []
        for axis in (1, 0):  # in the order of F.pad
            first, last = _reach(layer, axis, block)
            pads += [-first, stride * (size[axis] // block - 1) + last - (gradient.shape[2 + axis] - 1)]
        around = (pads[2], pads[0])
        if (pads[3], pads[1]) != around:
            gradient, around = F.pad(gradient, pads), (0, 0)
        blocks = F.conv2d(gradient, self.turned[block], None, stride, around)
        return _unfolded(blocks, block)


def _reach(layer: nn.Conv2d, axis: int, block: int) -> tuple[int, int]:
    """The first and the last output that a block of inputs leads to, counted from that at its first pixel's place."""
    pad, side, stride = int(layer.padding[axis]), layer.kernel_size[axis], layer.stride[axis]
    return -((side - 1 - pad) // stride), (block - 1 + pad) // stride


def _to_blocks(layer: nn.Conv2d, block: int) -> Tensor:
    """The weight (C', C, h, w) as that of its transpose, (block^2 * C, C', ...): a pixel's channels lie together."""
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


def _unfolded(blocks: Tensor, block: int) -> Tensor:
    """Blocks (B, block^2 * C, H / block, W / block) laid out as the image (B, C, H, W), channels last."""
    if block == 1:
        return blocks
    batch, depth, high, wide = blocks.shape
    # Of a block's row, the channels of all pixels lie together on both sides: long runs, copied once.
    rows = blocks.permute(0, 2, 3, 1).reshape(batch, high, wide, block, depth // block).transpose(2, 3)
    return rows.reshape(batch, high * block, wide * block, depth // block**2).permute(0, 3, 1, 2)
