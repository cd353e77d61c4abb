"""Networks of torchvision and timm by name, behind the normalisation that they expect; nothing is ever downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from wideberth.checks import InputError, at_least
from wideberth.configuration import Described, construct
from wideberth.models.heads import Head, last_layer
from wideberth.models.layers import Normalize

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class LibraryModel(Described, nn.Module):
    """A network of another library as `net`, behind `normalize`, so that it takes inputs in [0, 1].

    Penalties on input gradients differentiate twice, which torch's fast attention cannot: the regularizers run
    transformers under `training.curvature.twice_differentiable`, penalties of your own must too.
    """

    def __init__(self, net: nn.Module, mean: Iterable[float], std: Iterable[float]) -> None:
        super().__init__()
        self.normalize = Normalize(tuple(mean), tuple(std))
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of inputs (B, C, H, W) in [0, 1]."""
        logits: Tensor = self.net(self.normalize(x))
        return logits


class Torchvision(LibraryModel):
    """A classification network of torchvision, with random weights.

    Args:
        name: as torchvision lists it, such as "resnet50".
        classes: number of classes; None keeps torchvision's own, 1000.
        mean, std: per channel; None takes ImageNet's, which torchvision's weights expect, or the average of its three
            numbers where there are not three channels.
        options: further arguments of the network, such as {"image_size": 32} of its transformers.
        small_images: for 28x28 or 32x32 images: the 7x7 convolution of stride 2 and the pooling with which a ResNet or
            DenseNet begins, made for 224x224, become a 3x3 convolution of stride 1, as in the networks here.
        channels: of the images.
        head: the last layer, as `wideberth.models.last_layer` takes it, in place of the network's linear one.

    Input (B, channels, H, W) floats in [0, 1]; output (B, classes) logits.

    Raises:
        InputError: when the name is unknown, the network refuses its arguments, or it has not the kind of first or last
            layers that an option here replaces.
    """

    def __init__(
        self,
        name: str,
        classes: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        options: dict[str, Any] | None = None,
        small_images: bool = False,
        channels: int = 3,
        head: Head = "linear",
    ) -> None:
        from torchvision import models  # heavy, and needed here only

        names = models.list_models(module=models)
        if name not in names:
            raise InputError(_unknown("torchvision", name, names))
        arguments = _arguments(classes, options)
        net = construct(models.get_model, f"torchvision/{name}", name, weights=None, **arguments)
        _fit(net, f"torchvision/{name}", small_images, channels, head)
        super().__init__(net, *_statistics(mean, std, IMAGENET_MEAN, IMAGENET_STD, channels))


class Timm(LibraryModel):
    """A classification network of timm, with random weights.

    Args:
        name: as timm lists it, such as "resnet18" or "vit_tiny_patch16_224.augreg_in21k_ft_in1k".
        classes: number of classes; None keeps timm's own.
        mean, std: per channel; None takes what timm records for the name, which its weights expect, or the average of
            its three numbers where there are not three channels.
        options: further arguments of the network, such as {"img_size": 32, "patch_size": 4} of its transformers.
        small_images, channels, head: as `Torchvision` takes them.

    Input (B, channels, H, W) floats in [0, 1]; output (B, classes) logits.

    Raises:
        InputError: when timm is not installed, the name is unknown, the network refuses its arguments, or it has not
            the kind of first or last layers that an option here replaces.
    """

    def __init__(
        self,
        name: str,
        classes: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        options: dict[str, Any] | None = None,
        small_images: bool = False,
        channels: int = 3,
        head: Head = "linear",
    ) -> None:
        try:
            import timm
        except ModuleNotFoundError as error:
            raise InputError(f"timm/{name}: timm is not installed; pip install 'wideberth[timm]' adds it") from error
        # Names of remote hubs are not models of the library, and would fetch.
        if not timm.is_model(name):
            raise InputError(_unknown("timm", name, timm.list_models()))
        arguments = _arguments(classes, options)
        net = construct(timm.create_model, f"timm/{name}", name, pretrained=False, **arguments)
        _fit(net, f"timm/{name}", small_images, channels, head)
        recorded: Mapping[str, Any] = net.pretrained_cfg
        own = recorded.get("mean", IMAGENET_MEAN), recorded.get("std", IMAGENET_STD)
        super().__init__(net, *_statistics(mean, std, *own, channels))


def _fit(net: nn.Module, name: str, small_images: bool, channels: int, head: Head) -> None:
    """Give the network another first layer for its images and another last one, where asked for."""
    at_least("channels", channels, 1)
    if small_images or channels != 3:
        _replace_first(net, name, small_images, channels)
    if head != "linear":
        _replace_last(net, name, head)


def _replace_first(net: nn.Module, name: str, small_images: bool, channels: int) -> None:
    """Put in a first convolution for this many channels; for small images one that loses no pixel, and no pooling."""
    layers = [(path, layer) for path, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.MaxPool2d)]
    path, first = layers[0] if layers else ("", net)
    # A kind of its own, such as one that standardises its weights, would not survive being replaced.
    if type(first) is not nn.Conv2d or first.groups != 1:
        raise InputError(f"{name}: its first layer is no plain convolution, the only kind that other images replace")
    how: dict[str, Any] = {"kernel_size": first.kernel_size, "stride": first.stride, "padding": first.padding}
    if small_images:
        pooling, layer = layers[1] if len(layers) > 1 else ("", first)
        halves = isinstance(layer, nn.MaxPool2d) and layer.stride in (2, (2, 2))
        if (first.kernel_size, first.stride) != ((7, 7), (2, 2)) or not halves:
            raise InputError(
                f"{name}: small_images: it does not begin with a 7x7 convolution of stride 2 and a pooling, as ResNets "
                "do; choose one that does, or give the size of images or patches in options where it takes them"
            )
        how = {"kernel_size": 3, "stride": 1, "padding": 1}
        net.set_submodule(pooling, nn.Identity())
    convolution = nn.Conv2d(channels, first.out_channels, bias=first.bias is not None, **how)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    net.set_submodule(path, convolution)


def _replace_last(net: nn.Module, name: str, head: Head) -> None:
    """Put a head in the place of the linear layer that makes the logits, where there is no doubt which one that is."""
    layers = [(path, layer) for path, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    path, last = layers[-1] if layers else ("", net)
    outputs = [layer.out_features for _, layer in layers if isinstance(layer, nn.Linear)]
    if not isinstance(last, nn.Linear) or outputs.count(last.out_features) > 1:
        raise InputError(f"{name}: head={head!r}: it does not end in one linear layer, the only kind that is replaced")
    net.set_submodule(path, last_layer(head, last.in_features, last.out_features))


def _statistics(
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    own_mean: Sequence[float],
    own_std: Sequence[float],
    channels: int,
) -> tuple[Sequence[float], Sequence[float]]:
    """The mean and the deviation to normalise by: as given, else the network's own; refused for other channels."""
    if channels != len(own_mean):
        own_mean, own_std = (sum(own_mean) / len(own_mean),), (sum(own_std) / len(own_std),)
    mean, std = mean or own_mean, std or own_std
    if len(mean) not in (1, channels):
        raise InputError(f"mean={tuple(mean)}: must hold one number per channel, {channels} here")
    return mean, std


_WEIGHTS = ("weights", "pretrained", "checkpoint_path")
"""Options by which the libraries download weights or unpickle a file of them."""


def _arguments(classes: int | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    for name in options or {}:
        if name in _WEIGHTS:
            raise InputError(f"options: {name}: weights are loaded afterwards, from a file that holds tensors alone")
    return {**({} if classes is None else {"num_classes": classes}), **(options or {})}


def _unknown(library: str, name: str, names: Iterable[str]) -> str:
    near = get_close_matches(name, list(names), n=3)
    hint = f"close are {', '.join(near)}" if near else f"{library}'s list_models() names them"
    return f"{library}/{name}: {library} has no such classification model; {hint}"
