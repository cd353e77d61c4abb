"""Networks of single papers, for their recipes: two for MNIST, and the wide residual network of IAAT."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

from wideberth.checks import InputError, at_least
from wideberth.configuration import Described
from wideberth.models.heads import Head, last_layer
from wideberth.models.layers import Activation, activation, normalization, valid_shape


class MadryMNIST(Described, nn.Module):
    """The network of the MNIST challenge (Madry et al., ICLR 2018), "LeNet5Madry" in MMA (Ding et al., ICLR 2020).

    Twice a 5x5 convolution and a pooling that halves the image, then a wide hidden layer. 3,274,634 parameters.

    Args:
        shape: (channels, height, width) of one image.
        classes: number of classes, >= 2.
        width: channels of the first convolution; the second has twice as many.
        hidden: width of the hidden layer.
        activation: as `wideberth.models.activation` takes it.
        mean, std: per channel, put `Normalize` in front; None for raw pixels, as there.
        head: the last layer, as `wideberth.models.last_layer` takes it.

    Input (B, *shape) floats in [0, 1]; output (B, classes) logits.

    Raises:
        InputError: when a size is out of range, the shape is not an image's, or the activation or head unknown.

    What we do differently: weights start as torch starts them, as in MMA; Madry et al. start theirs normal with
    deviation 0.1, cut at two deviations, and biases at 0.1.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 28, 28),
        classes: int = 10,
        width: int = 32,
        hidden: int = 1024,
        activation: Activation = "relu",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        head: Head = "linear",
    ) -> None:
        super().__init__()
        valid_shape(shape, classes, image=True)
        at_least("width", width, 1)
        at_least("hidden", hidden, 1)
        channels, height, columns = shape
        self.normalize = normalization(mean, std, channels)
        self.stages = nn.Sequential(
            *_activated(nn.Conv2d(channels, width, 5, padding=2), activation),
            nn.MaxPool2d(2, ceil_mode=True),  # odd sizes round up, as "same" pooling does
            *_activated(nn.Conv2d(width, 2 * width, 5, padding=2), activation),
            nn.MaxPool2d(2, ceil_mode=True),
        )
        quarters = -(-height // 4) * -(-columns // 4)
        self.hidden = nn.Sequential(*_activated(nn.Linear(2 * width * quarters, hidden), activation))
        self.head = last_layer(head, hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of inputs (B, C, H, W)."""
        features: Tensor = self.stages(self.normalize(x))
        logits: Tensor = self.head(self.hidden(features.flatten(1)))
        return logits


class SmallCNN(Described, nn.Module):
    """The MNIST network of TRADES (Zhang et al., ICML 2019), whose logits are all zero before training.

    Twice two 3x3 convolutions without padding and a pooling, then two hidden layers with dropout between. 312,202
    parameters. Convolutions start as in He et al. (2015), a linear last layer at zero: so the gradient at the input is
    zero in the first step, where an attack moves by its random start alone.

    Args:
        shape: (channels, height, width) of one image, both sides >= 16.
        classes: number of classes, >= 2.
        width: channels of the first two convolutions; the other two have twice as many.
        hidden: width of the hidden layers.
        dropout: share of the first hidden layer that is dropped in training, in [0, 1).
        activation: as `wideberth.models.activation` takes it.
        mean, std: per channel, put `Normalize` in front; None for raw pixels, as there.
        head: the last layer, as `wideberth.models.last_layer` takes it; another than "linear" starts as it always does.

    Input (B, *shape) floats in [0, 1]; output (B, classes) logits.

    Raises:
        InputError: when a size is out of range, the shape is not an image's, or the activation or head unknown.

    What we do differently: nothing.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 28, 28),
        classes: int = 10,
        width: int = 32,
        hidden: int = 200,
        dropout: float = 0.5,
        activation: Activation = "relu",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        head: Head = "linear",
    ) -> None:
        super().__init__()
        valid_shape(shape, classes, image=True)
        at_least("width", width, 1)
        at_least("hidden", hidden, 1)
        if not 0 <= dropout < 1:
            raise InputError(f"dropout={dropout}: must be in [0, 1)")
        channels, *sides = shape
        if min(sides) < 16:
            raise InputError(f"shape={tuple(shape)}: height and width must be at least 16, as nothing is padded")
        self.normalize = normalization(mean, std, channels)
        self.stages = nn.Sequential(
            *_activated(nn.Conv2d(channels, width, 3), activation),
            *_activated(nn.Conv2d(width, width, 3), activation),
            nn.MaxPool2d(2),
            *_activated(nn.Conv2d(width, 2 * width, 3), activation),
            *_activated(nn.Conv2d(2 * width, 2 * width, 3), activation),
            nn.MaxPool2d(2),
        )
        height, columns = (((side - 4) // 2 - 4) // 2 for side in sides)
        self.hidden = nn.Sequential(
            *_activated(nn.Linear(2 * width * height * columns, hidden), activation),
            nn.Dropout(dropout),
            *_activated(nn.Linear(hidden, hidden), activation),
        )
        self.head = last_layer(head, hidden, classes)
        for module in self.stages:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        if type(self.head) is nn.Linear:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of inputs (B, C, H, W)."""
        features: Tensor = self.stages(self.normalize(x))
        logits: Tensor = self.head(self.hidden(features.flatten(1)))
        return logits


class IAATWideResNet(Described, nn.Module):
    """The wide residual network of instance adaptive adversarial training (Balaji et al., arXiv 1910.08051).

    Unlike `WideResNet`: the stem is as wide as the first stage; batch norm has no weights of its own; shortcuts carry
    the input of a block as it is, or averaged over 3x3 pixels at stride 2 with as many channels of zeros after its own;
    and each class has a map, by a 1x1 convolution and the only batch norm with weights, whose average is its logit.
    46,090,740 parameters as WRN-32-10, 5 blocks a stage. There is no last linear layer, hence no other head.

    Args:
        depth: 8, 14, 20, 26, 32, ...: (depth - 2) / 6 blocks in each of three stages.
        factor: channels of the stages are 16, 32 and 64 times this.
        shape: (channels, height, width) of one image.
        classes: number of classes K, >= 2.
        activation: as `wideberth.models.activation` takes it.
        mean, std: per channel, put `Normalize` in front, as the authors do with those of CIFAR-10, (0.4914, 0.4824,
            0.4467) and (0.2471, 0.2435, 0.2616); None for raw pixels.

    Input (B, *shape) floats in [0, 1]; output (B, classes) logits.

    Raises:
        InputError: when the depth is not 6 n + 2, a size is out of range, or the activation unknown.

    What we do differently: the depth is checked where theirs rounds down; the rest of the network is theirs.
    """

    def __init__(
        self,
        depth: int = 32,
        factor: int = 10,
        shape: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        activation: Activation = "relu",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        valid_shape(shape, classes, image=True)
        if depth < 8 or depth % 6 != 2:
            raise InputError(f"depth={depth}: must be 6 n + 2, such as 14, 20 or 32")
        at_least("factor", factor, 1)
        widths = [16 * factor, 32 * factor, 64 * factor]
        self.normalize = normalization(mean, std, shape[0])
        self.stem = nn.Conv2d(shape[0], widths[0], 3, 1, 1, bias=False)
        blocks = [
            _IAATBlock(width // 2 if halves else width, width, activation)
            for stage, width in enumerate(widths)
            for halves in [stage > 0] + [False] * ((depth - 2) // 6 - 1)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(
            *_before(widths[-1], activation),
            nn.Conv2d(widths[-1], classes, 1, bias=False),
            nn.BatchNorm2d(classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of inputs (B, C, H, W)."""
        maps: Tensor = self.last(self.blocks(self.stem(self.normalize(x))))
        return maps.mean(dim=(2, 3))


class _IAATBlock(nn.Module):
    """Two 3x3 convolutions, each behind batch norm and activation; with more channels they halve the image."""

    def __init__(self, inputs: int, outputs: int, name: Activation) -> None:
        super().__init__()
        self.new = outputs - inputs
        stride = 2 if self.new else 1
        self.convolutions = nn.Sequential(
            *_before(inputs, name),
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            *_before(outputs, name),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = pad(avg_pool2d(x, 3, 2, 1), (0, 0, 0, 0, 0, self.new)) if self.new else x
        out: Tensor = shortcut + self.convolutions(x)
        return out


def _before(channels: int, name: Activation) -> list[nn.Module]:
    """What stands before a convolution in the network of IAAT."""
    return [nn.BatchNorm2d(channels, affine=False), activation(name)]


def _activated(layer: nn.Module, name: Activation) -> list[nn.Module]:
    return [layer, activation(name)]
