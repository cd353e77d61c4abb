"""Networks of torchvision and timm with another first or last layer than their own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from wideberth.checks import InputError
from wideberth.models import CosineHead, MahalanobisHead, Timm, Torchvision
from wideberth.models.libraries import IMAGENET_MEAN


def sizes(model: nn.Module, layer: nn.Module, x: torch.Tensor) -> list[tuple[int, ...]]:
    """The shapes that enter a layer of the model."""
    seen: list[tuple[int, ...]] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[1:])))
    with torch.no_grad():
        model.eval()(x)
    hook.remove()
    return seen


@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28)])
def test_small_images_keep_their_size_up_to_the_first_stage(channels: int, side: int) -> None:
    model = Torchvision("resnet18", 10, small_images=True, channels=channels)
    x = torch.rand(2, channels, side, side)
    assert sizes(model, model.net.layer1, x) == [(64, side, side)]
    assert sizes(model, model.net.avgpool, x) == [(512, side // 8 + (side % 8 > 0), side // 8 + (side % 8 > 0))]
    first = model.net.conv1
    assert (first.in_channels, first.kernel_size, first.stride, first.padding) == (channels, (3, 3), (1, 1), (1, 1))
    assert first.bias is None
    fan_out = 64 * 9
    assert float(first.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)


def test_without_the_option_the_network_is_the_librarys() -> None:
    model = Torchvision("resnet18", 10)
    assert model.net.conv1.kernel_size == (7, 7)
    assert sizes(model, model.net.layer1, torch.rand(1, 3, 64, 64)) == [(64, 16, 16)]
    assert model.normalize.mean.tolist() == pytest.approx(IMAGENET_MEAN)


def test_densenet_begins_in_the_same_way() -> None:
    model = Torchvision("densenet121", 10, small_images=True)
    assert sizes(model, model.net.features.denseblock1, torch.rand(1, 3, 8, 8)) == [(64, 8, 8)]


def test_other_channels_alone_leave_kernel_and_stride() -> None:
    model = Torchvision("squeezenet1_1", 4, channels=2)
    first = model.net.features[0]
    assert (first.in_channels, first.kernel_size, first.stride, first.bias is None) == (2, (3, 3), (2, 2), False)
    assert model.normalize.mean.tolist() == pytest.approx([sum(IMAGENET_MEAN) / 3])
    assert model(torch.rand(2, 2, 64, 64)).shape == (2, 4)
    own = Torchvision("squeezenet1_1", 4, (0.1, 0.2), (0.3, 0.4), channels=2)
    assert own.normalize.std.tolist() == pytest.approx([0.3, 0.4])


@pytest.mark.parametrize(
    ("name", "last"), [("resnet18", "fc"), ("shufflenet_v2_x0_5", "fc"), ("mobilenet_v3_small", "classifier.3")]
)
def test_a_head_takes_the_place_of_the_last_linear_layer(name: str, last: str) -> None:
    model = Torchvision(name, 7, head="cosine").eval()
    head = model.net.get_submodule(last)
    assert isinstance(head, CosineHead)
    assert model(torch.rand(2, 3, 64, 64)).abs().max() <= head.scale * (1 + 1e-6)


def test_transformers_take_a_head_too() -> None:
    with torch.device("meta"):
        model = Torchvision("vit_b_16", 7, options={"image_size": 32}, head="cosine")
    assert isinstance(model.net.heads.head, CosineHead)
    assert model.net.heads.head.weight.shape == (7, 768)


def test_a_head_with_arguments() -> None:
    model = Torchvision("resnet18", 7, head="wideberth.models.MahalanobisHead(radius=4, scale=1)")
    assert isinstance(model.net.fc, MahalanobisHead)
    assert (model.net.fc.radius, model.net.fc.centers.shape) == (4, (7, 512))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Torchvision("squeezenet1_1", 10, small_images=True), "squeezenet1_1: small_images: it does not begin"),
        (lambda: Torchvision("mobilenet_v3_small", 10, small_images=True), "7x7 convolution of stride 2 and a pooling"),
        (lambda: Torchvision("vit_b_16", small_images=True), "size of images or patches in options"),
        (lambda: Torchvision("squeezenet1_1", 10, head="cosine"), "does not end in one linear layer"),
        (lambda: Torchvision("squeezenet1_1", 10, channels=0), "channels=0"),
        (lambda: Torchvision("squeezenet1_1", 10, (0.5,) * 3, (0.5,) * 3, channels=1), "mean=.*1 here"),
        (lambda: Torchvision("resnet18", 10, head="cosin"), "head='cosin'"),
        (lambda: Torchvision("resnet18", 1000, head="mahalanobis"), "features=512: must be at least 999"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(make: Callable[[], object], says: str) -> None:
    with pytest.raises(InputError, match=says) as refusal, torch.device("meta"):
        make()
    assert "\n" not in str(refusal.value)


def test_two_layers_of_as_many_outputs_leave_a_doubt() -> None:
    with pytest.raises(InputError, match="does not end in one linear layer"):
        Torchvision("vgg11", 4096, head="cosine", options={"init_weights": False})


class Standardised(nn.Conv2d):
    """A convolution of its own kind, as timm has some."""


@pytest.mark.parametrize("kind", [nn.Conv2d, Standardised])
def test_timm_networks_are_changed_alike(kind: type[nn.Conv2d], monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Sequential):
        pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}  # noqa: RUF012

    def create_model(name: str, pretrained: bool, num_classes: int) -> nn.Module:
        stem = kind(3, 4, 7, 2, 3), nn.MaxPool2d(3, 2, 1)
        return Net(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

    timm: Any = ModuleType("timm")
    timm.create_model, timm.is_model, timm.list_models = create_model, "tiny".__eq__, lambda: ["tiny"]
    monkeypatch.setitem(sys.modules, "timm", timm)
    if kind is Standardised:
        with pytest.raises(InputError, match="timm/tiny: its first layer is no plain convolution"):
            Timm("tiny", 5, small_images=True)
        return
    model = Timm("tiny", 5, small_images=True, channels=1, head="cosine")
    assert sizes(model, model.net[2], torch.rand(2, 1, 8, 8)) == [(4, 8, 8)]
    assert isinstance(model.net[4], CosineHead)
    assert model.normalize.mean.tolist() == pytest.approx([0.2])
