"""Parts that the networks share: normalisation inside the model, activations by name, refusals of bad shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from wideberth.checks import InputError, at_least
from wideberth.configuration import construct, import_object, parse_call

Activation: TypeAlias = str | Callable[[], nn.Module]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    # The slope of the challenge nets of Madry et al. (2018) and of the nets of the EMR paper; torch's own is 0.01.
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "smooth_relu": lambda: SmoothReLU(),
}


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation per channel, so that radii stay in the units of the input.

    Both are buffers and travel with the weights: weights trained behind another normalisation do not load silently.

    Args:
        mean: one number per channel, or a single one for all channels.
        std: likewise, each > 0.

    Input and output: (B, C, ...) of any rank >= 2 and any floating dtype, which is kept.

    Raises:
        InputError: when lengths differ or a deviation is not positive; in the forward, when the channels do not match.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not mean or len(mean) != len(std) or not all(s > 0 for s in std):
            raise InputError(
                f"mean={tuple(mean)}, std={tuple(std)}: must be one mean and one deviation > 0 per channel"
            )
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.get_default_dtype()))
        self.register_buffer("std", torch.tensor(std, dtype=torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        """The inputs (B, C, ...) less the mean, over the deviation."""
        channels = len(self.mean)
        # Broadcasting would quietly turn a grey image into three channels. Tracing comes with what has no shape yet.
        if isinstance(x, Tensor) and channels not in (1, x.shape[1]):
            raise InputError(f"inputs of shape {tuple(x.shape)}: the model normalises {channels} channels")
        per_channel = (1, channels) + (1,) * (x.dim() - 2)
        return (x - self.mean.to(x.dtype).view(per_channel)) / self.std.to(x.dtype).view(per_channel)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"mean={tuple(self.mean.tolist())}, std={tuple(self.std.tolist())}"


class SmoothReLU(nn.Module):
    """max(0, x - log(1 + b |x|) / b): a ReLU without a kink, for smooth adversarial training (Xie et al., 2020).

    Zero below zero as ReLU is; above, its slope b x / (1 + b x) rises from 0 to 1, the sooner the larger b, which is
    learned, one for each layer. b is the square of the parameter, so that it stays positive.

    Args:
        root: what the parameter starts as, not 0; 20 as in the authors' code, so that b starts as 400.

    Input and output: any shape and floating dtype, which are kept.

    Raises:
        InputError: when the root is 0 or not finite.

    What we do differently: nothing; as there, the parameter decays with the weights.
    """

    def __init__(self, root: float = 20.0) -> None:
        super().__init__()
        if not 0 < abs(root) < float("inf"):
            raise InputError(f"root={root}: must be a finite number other than 0")
        # One axis, so that under autocast float32 wins over the input's dtype: b |x| leaves float16's range.
        self.root = nn.Parameter(torch.tensor([root]))

    def forward(self, x: Tensor) -> Tensor:
        """The activation of each entry."""
        b = self.root.square()
        return (x - torch.log1p(b * x.abs()) / b).relu().to(x.dtype)


def activation(name: Activation) -> nn.Module:
    """A new activation layer, never in place: penalties on input gradients differentiate through it twice.

    Args:
        name: "relu", "leaky_relu" (slope 0.1), "silu", "softplus", "gelu", "elu", "tanh" or "smooth_relu" (one
            `SmoothReLU` a layer); an import path, with arguments where needed, such as "torch.nn.Softplus(beta=10)"; or
            a callable that returns a layer.

    Raises:
        InputError: when the name is unknown or does not lead to an `nn.Module`.
    """
    if isinstance(name, str):
        if name in ACTIVATIONS:
            return ACTIVATIONS[name]()
        path, args, kwargs = parse_call(name)
        if "." not in path:
            raise InputError(
                f"activation={name!r}: accepted are {', '.join(ACTIVATIONS)}, "
                "or an import path such as torch.nn.Softplus(beta=10)"
            )
        layer = construct(import_object(path), path, *args, **kwargs)
    elif isinstance(name, nn.Module):
        raise InputError(f"activation={name!r}: is one layer, must be what makes a new one, such as its class")
    else:
        layer = construct(name, f"activation {name!r}")
    if not isinstance(layer, nn.Module):
        raise InputError(f"activation={name!r}: must give an nn.Module, gave {type(layer).__name__}")
    if "inplace" in vars(layer):
        vars(layer)["inplace"] = False
    return layer


def normalization(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> nn.Module:
    """`Normalize` for this many channels, or the identity when neither mean nor std is given.

    Raises:
        InputError: when only one is given, or their length is neither 1 nor `channels`.
    """
    if mean is None and std is None:
        return nn.Identity()
    if mean is None or std is None:
        raise InputError(f"mean={mean}, std={std}: give both or neither")
    if len(mean) not in (1, channels):
        raise InputError(f"mean={tuple(mean)}: must hold one number per channel, {channels} here")
    return Normalize(mean, std)


def valid_shape(shape: Sequence[int], classes: int, *, image: bool = False) -> None:
    """Refuse shapes that are not sizes of one input (of one image), and fewer than 2 classes (`InputError`)."""
    at_least("classes", classes, 2)
    if not shape or any(size < 1 for size in shape) or (image and len(shape) != 3):
        accepted = "(channels, height, width)" if image else "the positive sizes of one input"
        raise InputError(f"shape={tuple(shape)}: must be {accepted}")
