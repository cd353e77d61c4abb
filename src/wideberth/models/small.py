"""Small networks, for small data and fast experiments."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from torch import Tensor, nn

from wideberth.checks import at_least
from wideberth.configuration import Described
from wideberth.models.heads import Head, last_layer
from wideberth.models.layers import Activation, activation, normalization, valid_shape


class MLP(Described, nn.Module):
    """A multi-layer perceptron on flattened inputs of any shape.

    Args:
        shape: sizes of one input, of any rank.
        classes: number of classes, >= 2.
        hidden: width of each hidden layer; empty for a linear classifier.
        activation: as `wideberth.models.activation` takes it.
        batch_norm: normalise each hidden layer over the batch, before its activation.
        head: the last layer, as `wideberth.models.last_layer` takes it.

    Input (B, *shape) floats in [0, 1]; output (B, classes) logits.

    Raises:
        InputError: when a size, width or class count is out of range, or the activation or head unknown.
    """

    def __init__(
        self,
        shape: tuple[int, ...] = (1, 28, 28),
        classes: int = 10,
        hidden: tuple[int, ...] = (300, 100),
        activation: Activation = "relu",
        batch_norm: bool = False,
        head: Head = "linear",
    ) -> None:
        super().__init__()
        valid_shape(shape, classes)
        for width in hidden:
            at_least("hidden", width, 1)
        widths = (prod(shape), *hidden)
        self.hidden = nn.Sequential(
            *(
                _block(nn.Linear(before, after, bias=not batch_norm), activation, batch_norm)
                for before, after in pairwise(widths)
            )
        )
        self.head = last_layer(head, widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of inputs (B, ...)."""
        logits: Tensor = self.head(self.hidden(x.flatten(1)))
        return logits


class ConvNet(Described, nn.Module):
    """A plain convolutional network: stages that halve the image and double the channels, then an average.

    Each stage is a 3x3 convolution and a 3x3 convolution of stride 2, with `width`, 2 `width`, 4 `width`, ... channels.
    The average over positions keeps the head small and lets any image size in. Weights start as in He et al. (2015),
    because torch's default start fades out over this depth without batch norm.

    Args:
        shape: (channels, height, width) of one image.
        classes: number of classes, >= 2.
        width: channels of the first stage; 32 gives 0.3 million parameters.
        depth: number of stages, two convolutions each.
        activation: as `wideberth.models.activation` takes it.
        batch_norm: normalise after each convolution, before its activation.
        mean, std: per channel, put `Normalize` in front; None for raw pixels.
        head: the last layer, as `wideberth.models.last_layer` takes it.

    Input (B, *shape) floats in [0, 1]; output (B, classes) logits.

    Raises:
        InputError: when a size is out of range, the shape is not an image's, or the activation or head unknown.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 28, 28),
        classes: int = 10,
        width: int = 16,
        depth: int = 3,
        activation: Activation = "relu",
        batch_norm: bool = False,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        head: Head = "linear",
    ) -> None:
        super().__init__()
        valid_shape(shape, classes, image=True)
        at_least("width", width, 1)
        at_least("depth", depth, 1)
        self.normalize = normalization(mean, std, shape[0])
        channels = shape[0]
        stages = []
        for stage in range(depth):
            for stride in (1, 2):
                convolution = nn.Conv2d(channels, width << stage, 3, stride, 1, bias=not batch_norm)
                nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
                stages.append(_block(convolution, activation, batch_norm))
                channels = width << stage
        self.stages = nn.Sequential(*stages)
        self.head = last_layer(head, channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of inputs (B, C, H, W)."""
        features: Tensor = self.stages(self.normalize(x))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


def _block(linear: nn.Linear | nn.Conv2d, name: Activation, batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = [linear]
    if batch_norm:
        outputs = linear.weight.shape[0]
        layers.append(nn.BatchNorm1d(outputs) if isinstance(linear, nn.Linear) else nn.BatchNorm2d(outputs))
    return nn.Sequential(*layers, activation(name))
