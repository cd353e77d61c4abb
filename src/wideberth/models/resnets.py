"""The residual networks of the adversarial training literature: PreAct ResNet-18 and wide residual networks."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Literal, TypeAlias, get_args

from torch import Tensor, nn
from torch.nn.functional import pad

from wideberth.checks import InputError, at_least, choice
from wideberth.configuration import Described
from wideberth.models.heads import Head, last_layer
from wideberth.models.layers import Activation, activation, normalization, valid_shape

Shortcut: TypeAlias = Literal["conv", "pool"]


class PoolShortcut(nn.Module):
    """A shortcut without weights: the average of stride x stride pixels, and channels of zeros on both sides."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        # Windows that stick out, at odd sizes: the convolutions beside this round up too.
        self.pool = nn.AvgPool2d(stride, ceil_mode=True)
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """The inputs (B, C, H, W), pooled and with further channels of zeros."""
        return pad(self.pool(x), (0, 0, 0, 0, self.padding, self.padding))


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each behind batch norm and activation, beside a shortcut (He et al., 2016).

    Where stride or channels change, the shortcut is a 1x1 convolution of the activated input or a `PoolShortcut`.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, name: Activation, shortcut: Shortcut) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.activation1 = activation(name)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.activation2 = activation(name)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if inputs != outputs or stride != 1:
            pools = shortcut == "pool"
            self.shortcut = (
                PoolShortcut(inputs, outputs, stride) if pools else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output (B, C', H', W') for inputs (B, C, H, W)."""
        activated = self.activation1(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        out: Tensor = shortcut + self.conv2(self.activation2(self.norm2(self.conv1(activated))))
        return out


class _PreActNet(Described, nn.Module):
    """Stem, stages of pre-activation blocks (all but the first halve the image), norm, activation, average, head."""

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        stem: int,
        widths: Sequence[int],
        blocks: int,
        name: Activation,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        head: Head,
        shortcut: Shortcut = "conv",
    ) -> None:
        super().__init__()
        valid_shape(shape, classes, image=True)
        self.normalize = normalization(mean, std, shape[0])
        self.stem = nn.Conv2d(shape[0], stem, 3, 1, 1, bias=False)
        channels = stem
        stages = []
        for stage, width in enumerate(widths):
            strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
            inputs = [channels] + [width] * (blocks - 1)
            stages.append(
                nn.Sequential(*(PreActBlock(c, width, s, name, shortcut) for c, s in zip(inputs, strides, strict=True)))
            )
            channels = width
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels)
        self.activation = activation(name)
        self.head = last_layer(head, channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.activation(self.norm(self.stages(self.stem(self.normalize(x)))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class PreActResNet18(_PreActNet):
    """The pre-activation ResNet-18 of the adversarial training literature (He et al., 2016; Rice et al., 2020).

    A 3x3 stem without pooling, four stages of two blocks with 1, 2, 4 and 8 times `width` channels, batch norm and
    activation before the average. 11,172,170 parameters on CIFAR-10. Weights start as torch starts them, as there. The
    average spans the whole final map, so any image size fits; at 32x32 it is the 4x4 pooling of the original.

    Args:
        shape: (channels, height, width) of one image.
        classes: number of classes, >= 2.
        width: channels of the first stage.
        activation: as `wideberth.models.activation` takes it.
        mean, std: per channel, put `Normalize` in front; None for raw pixels.
        head: the last layer, as `wideberth.models.last_layer` takes it.

    Input (B, *shape) floats in [0, 1]; output (B, classes) logits.

    Raises:
        InputError: when a size is out of range, the shape is not an image's, or the activation or head unknown.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        width: int = 64,
        activation: Activation = "relu",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        head: Head = "linear",
    ) -> None:
        at_least("width", width, 1)
        widths = [width, 2 * width, 4 * width, 8 * width]
        super().__init__(shape, classes, width, widths, 2, activation, mean, std, head)


class WideResNet(_PreActNet):
    """The wide residual network WRN-depth-factor (Zagoruyko and Komodakis, 2016), without dropout.

    A 3x3 stem of 16 channels and three stages of (depth - 4) / 6 blocks with 16, 32 and 64 times `factor` channels.
    46,160,474 parameters as WRN-34-10 on CIFAR-10. Weights start as in the adversarial training literature: normal
    with variance 2 / fan-out in convolutions, zero bias in the head. Unlike many files of that literature it holds no
    unused block, so every parameter receives gradients.

    With shortcut="pool" and activation="leaky_relu" it is the network of the EMR paper (Liu and Chan, BMVC 2022),
    45,901,914 parameters as WRN-34-10. What we do differently there: no dropout, whose rate is 0 in the authors'
    scripts, and train or eval mode is the caller's; theirs switches it in every forward.

    Args:
        depth: 10, 16, 22, 28, 34, ...
        factor: how many times wider than the original residual network.
        shape: (channels, height, width) of one image.
        classes: number of classes, >= 2.
        activation: as `wideberth.models.activation` takes it.
        mean, std: per channel, put `Normalize` in front; None for raw pixels.
        head: the last layer, as `wideberth.models.last_layer` takes it.
        shortcut: where channels change, a 1x1 convolution ("conv"), or average pooling and channels of zeros ("pool").

    Input (B, *shape) floats in [0, 1]; output (B, classes) logits.

    Raises:
        InputError: when the depth is not 6 n + 4, a size is out of range, or the activation, head or shortcut unknown.
    """

    def __init__(
        self,
        depth: int = 34,
        factor: int = 10,
        shape: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        activation: Activation = "relu",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        head: Head = "linear",
        shortcut: Shortcut = "conv",
    ) -> None:
        if depth < 10 or depth % 6 != 4:
            raise InputError(f"depth={depth}: must be 6 n + 4, such as 16, 28 or 34")
        at_least("factor", factor, 1)
        choice("shortcut", shortcut, get_args(Shortcut))
        widths = [16 * factor, 32 * factor, 64 * factor]
        super().__init__(shape, classes, 16, widths, (depth - 4) // 6, activation, mean, std, head, shortcut)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
                nn.init.normal_(module.weight, 0.0, sqrt(2 / fan_out))
        if isinstance(self.head, nn.Linear) and self.head.bias is not None:
            nn.init.zeros_(self.head.bias)
