"""Networks of torchvision and timm by name, behind the normalisation that they expect; nothing is ever downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from wideberth.checks import InputError
from wideberth.configuration import Described, construct
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
        logits: Tensor = self.net(self.normalize(x))
        return logits


class Torchvision(LibraryModel):
    """A classification network of torchvision, with random weights.

    Args:
        name: as torchvision lists it, such as "resnet50".
        classes: number of classes; None keeps torchvision's own, 1000.
        mean, std: per channel; the default is ImageNet's, which torchvision's weights expect.
        options: further arguments of the network, such as {"image_size": 32}.

    Input (B, 3, H, W) floats in [0, 1]; output (B, classes) logits.

    Raises:
        InputError: when the name is unknown, or the network refuses its arguments.
    """

    def __init__(
        self,
        name: str,
        classes: int | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        options: dict[str, Any] | None = None,
    ) -> None:
        from torchvision import models  # heavy, and needed here only

        names = models.list_models(module=models)
        if name not in names:
            raise InputError(_unknown("torchvision", name, names))
        arguments = _arguments(classes, options)
        net = construct(models.get_model, f"torchvision/{name}", name, weights=None, **arguments)
        super().__init__(net, mean, std)


class Timm(LibraryModel):
    """A classification network of timm, with random weights.

    Args:
        name: as timm lists it, such as "resnet18" or "vit_tiny_patch16_224.augreg_in21k_ft_in1k".
        classes: number of classes; None keeps timm's own.
        mean, std: per channel; None takes what timm records for the name, which its weights expect.
        options: further arguments of the network, such as {"img_size": 32}.

    Input (B, 3, H, W) floats in [0, 1]; output (B, classes) logits.

    Raises:
        InputError: when timm is not installed, the name is unknown, or the network refuses its arguments.
    """

    def __init__(
        self,
        name: str,
        classes: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        options: dict[str, Any] | None = None,
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
        recorded: Mapping[str, Any] = net.pretrained_cfg
        super().__init__(net, mean or recorded.get("mean", IMAGENET_MEAN), std or recorded.get("std", IMAGENET_STD))


def _arguments(classes: int | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {**({} if classes is None else {"num_classes": classes}), **(options or {})}


def _unknown(library: str, name: str, names: Iterable[str]) -> str:
    near = get_close_matches(name, list(names), n=3)
    hint = f"close are {', '.join(near)}" if near else f"{library}'s list_models() names them"
    return f"{library}/{name}: {library} has no such classification model; {hint}"
