"""The optimised copy computes what the model computes, or is the model itself."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wideberth.acceleration import bfloat16, fused_relu, optimised_copy
from wideberth.checks import InputError
from wideberth.models import MLP, ConvNet, PreActResNet18


def trained(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """With batch norm statistics that are not those of initialisation."""
    torch.manual_seed(0)
    for _ in range(3):
        model.train()(2 * torch.rand(16, *shape))
    return model


@pytest.mark.parametrize(
    "model", [ConvNet(shape=(3, 16, 16), classes=5, width=4, batch_norm=True), PreActResNet18(classes=4)]
)
def test_same_logits_and_gradients_without_the_batch_norms_after_convolutions(model: nn.Module) -> None:
    x = torch.rand(6, 3, 16, 16)
    model = trained(model, (3, 16, 16)).double()
    copy = optimised_copy(model, x.double())
    assert copy is not model

    def norms(net: nn.Module) -> int:
        return sum(isinstance(part, nn.BatchNorm2d) for part in net.modules())

    assert norms(copy) <= norms(model) // 2 + 1
    point = x.double().requires_grad_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    expected, found = model(point), copy(point)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for logits in (expected, found):
        logits[:, 0].sum().backward()
    (gradient,) = torch.autograd.grad(copy(point)[:, 0].sum(), point)
    torch.testing.assert_close(2 * gradient, point.grad, rtol=1e-8, atol=1e-9)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_networks_behind_a_normalisation_are_copied_too() -> None:
    """Tracing cannot look at shapes, as `Normalize` does to refuse a wrong number of channels."""
    model = ConvNet(shape=(3, 8, 8), classes=3, width=4, batch_norm=True, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))
    model, x = trained(model, (3, 8, 8)).eval().double(), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    copy = optimised_copy(model, x)
    assert copy is not model
    torch.testing.assert_close(copy(x), model(x))


def test_the_model_keeps_its_flags() -> None:
    model = ConvNet(shape=(1, 8, 8), classes=3, width=4, batch_norm=True).train()
    copy = optimised_copy(model, torch.rand(4, 1, 8, 8))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not copy.training
    assert not any(p.requires_grad for p in copy.parameters())


class Odd(nn.Module):
    """A convolution, and something that a copy cannot follow."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "branch" and bool(x.mean() > 2):
            return self.head(torch.zeros(len(x), 4))
        features = self.stem(x).mean((2, 3))
        if self.kind == "random":
            features = features + torch.randn(4)
        if self.kind == "autograd":
            with torch.enable_grad():
                point = x.detach().requires_grad_()
                (features,) = torch.autograd.grad(self.stem(point).sum(), point)
            features = features.flatten(1)[:, :4]
        return self.head(features)


@pytest.mark.parametrize("kind", ["branch", "random", "autograd"])
def test_a_model_that_cannot_be_copied_is_returned_itself(kind: str) -> None:
    model = Odd(kind)
    assert optimised_copy(model, torch.rand(4, 1, 8, 8)) is model


def test_an_optimised_copy_is_not_traced_again() -> None:
    model, x = ConvNet(shape=(1, 8, 8), classes=3, width=4, batch_norm=True), torch.rand(4, 1, 8, 8)
    copy = optimised_copy(model, x)
    assert copy is not model
    assert optimised_copy(copy, x) is copy


def test_without_convolutions_there_is_nothing_to_gain() -> None:
    model = MLP(shape=(5,), classes=3, hidden=(4,))
    assert optimised_copy(model, torch.rand(4, 5)) is model


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with bfloat16, whatever this one has."""
    monkeypatch.setattr(bfloat16, "_has_bfloat16", lambda device: True)


@pytest.mark.usefixtures("able")
def test_bfloat16_layers_keep_small_perturbations_and_precise_logits() -> None:
    """A step that bfloat16 would round away changes the logits as it does in the network, within 10 %."""
    model = trained(ConvNet(shape=(3, 16, 16), classes=5, width=8, batch_norm=True), (3, 16, 16))
    x = 0.5 + 0.4 * torch.rand(8, 3, 16, 16)
    copy = optimised_copy(model, x, "bfloat16")
    assert copy(x).dtype == torch.float32
    model.eval()
    with torch.no_grad():
        exact, found = model(x), copy(x)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.03 * float(exact.std()))
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(copy(point)[:, 0].sum(), point)
    (expected,) = torch.autograd.grad(model(point)[:, 0].sum(), point)
    alike = torch.nn.functional.cosine_similarity(gradient.flatten(1), expected.flatten(1))
    assert alike.median() > 0.99
    assert alike.min() > 0.95
    step = 1e-3 * expected.sign()
    assert ((x + step).to(torch.bfloat16) == x.to(torch.bfloat16)).float().mean() > 0.5, "plain rounding loses it"
    with torch.no_grad():
        moved, should = (copy(x + step) - found)[:, 0].mean(), (model(x + step) - exact)[:, 0].mean()
    assert moved / should == pytest.approx(1, abs=0.1)
    assert next(model.parameters()).dtype == torch.float32


class Forms(nn.Module):
    """ReLUs written in every way after convolutions; the third convolution's output is also used without one."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.relu, self.head = nn.ReLU(), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three, four = self.convolutions
        x = self.relu(one(x))
        x = nn.functional.relu(two(x))
        answer = three(x)
        x = answer + answer.relu()
        return self.head(four(x).relu().mean((2, 3)))


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize("fuse", [True, False])
def test_relus_join_their_convolutions_and_nothing_changes(fuse: bool) -> None:
    torch.manual_seed(0)
    model = Forms()
    x = torch.rand(5, 3, 12, 12)
    copy = optimised_copy(model, x, "bfloat16")
    taken = [part for part in copy.modules() if getattr(part, "relu", None) is True]
    assert len(taken) == 3, "the third is used without its ReLU too"
    for part in taken:
        part.fused = part.fused if fuse else None
    point = x.clone().requires_grad_()
    logits, expected = copy(point), model(point)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.02 * float(expected.detach().abs().max()))
    (found,) = torch.autograd.grad(logits[:, 0].sum(), point)
    (gradient,) = torch.autograd.grad(expected[:, 0].sum(), point)
    alike = nn.functional.cosine_similarity(found.flatten(1), gradient.flatten(1))
    assert alike.min() > 0.98


@pytest.mark.usefixtures("able")
def test_weights_packed_once_serve_inputs_of_every_size() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 17, 3, stride=2), nn.ReLU(), nn.Conv2d(17, 2, 3)
    model, x = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.rand(4, 3, 12, 12)
    parts = [
        part for part in optimised_copy(model, x, "bfloat16").modules() if getattr(part, "fused", None) is not None
    ]
    assert len(parts) == (2 if fused_relu.fuses_relu() else 0)
    for part in parts:
        layer: Any = part.layer
        for size in ((4, 12, 12), (1, 12, 12), (40, 9, 16)):
            given = torch.randn(size[0], layer.weight.shape[1], *size[1:]).bfloat16()
            expected = layer(given).relu()
            torch.testing.assert_close(part.fused.run(given), expected, rtol=0.01, atol=1e-3)


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize(
    ("channels", "size", "settings", "block"),
    [
        (1, (12, 8), {"padding": 1}, 4),
        (1, (9, 6), {"kernel_size": 5, "padding": 2}, 3),
        (2, (8, 8), {}, 2),
        (3, (10, 6), {"kernel_size": (5, 3), "padding": (1, 2)}, 2),
        (1, (7, 7), {"padding": 1}, 1),
        (17, (4, 4), {"padding": 1}, 1),
        (1, (8, 8), {"stride": 2}, 4),
        (3, (10, 6), {"stride": 2, "padding": 1}, 2),
        (1, (7, 7), {"stride": 2}, None),
        (1, (8, 8), {"dilation": 2}, None),
        (1, (8, 8), {"padding": 3}, None),
        (1, (8, 8), {"padding": "same"}, None),
        (1, (8, 8), {"padding": 1, "padding_mode": "reflect"}, None),
    ],
)
def test_gradient_of_the_first_layer_goes_back_to_blocks_of_pixels(
    channels: int, size: tuple[int, int], settings: dict[str, Any], block: int | None
) -> None:
    """The largest that fit (None: as torch does), and bit for bit the same: small whole numbers sum exactly."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(channels, 5, **{"kernel_size": 3} | settings)
    model = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randint(0, 3, (4, channels, *size)).float()
    model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    copy = optimised_copy(model, x, "bfloat16")
    point = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(copy(point)[:, 0].sum(), point)
    (expected,) = torch.autograd.grad(model(point)[:, 0].sum(), point)
    assert torch.equal(found, expected)
    first = next(part for part in copy.modules() if hasattr(part, "transpose"))
    assert list(first.transpose.weights) == ([block] if block and first.fused is not None else [])


class Standardised(nn.Conv2d):
    """A convolution of a kind of its own: its weights are standardised in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return nn.functional.conv2d(x, weight, self.bias, padding=1)


class Blind(nn.Module):
    """A layer that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        assert bool(x.max() < 1e9)
        return x


def strange(kind: str) -> nn.Module:
    first: nn.Module = nn.Conv2d(3, 6, 3, padding=1, groups=3 if kind == "grouped" else 1)
    if kind == "hooked":
        first.register_forward_hook(lambda module, given, answer: answer.clamp(max=0.2) - 0.5)
    if kind == "standardised":
        first = Standardised(3, 6, 3)
    body = nn.Sequential(first, nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU())
    return nn.Sequential(Blind() if kind == "standardised" else nn.Identity(), body, nn.Flatten(), nn.Linear(216, 4))


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize("kind", ["grouped", "hooked", "standardised"])
def test_a_copy_with_other_logits_is_not_used(kind: str) -> None:
    torch.manual_seed(3)
    model, x = strange(kind).eval(), torch.rand(16, 3, 8, 8)
    copy = optimised_copy(model, x, "bfloat16")
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(copy(x).float(), expected, rtol=0, atol=0.03 * float(expected.abs().max()))


@pytest.mark.usefixtures("able")
def test_layers_that_take_no_bfloat16_fall_back_on_autocast() -> None:
    class Stubborn(nn.Module):
        """Raises unless it gets float32 between its layers."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            if hidden.dtype == torch.bfloat16 and not torch.is_autocast_enabled("cpu"):
                raise TypeError("float32 only")
            return self.last(hidden)

    model, x = Stubborn(), torch.rand(5, 4)
    copy = optimised_copy(model, x, "bfloat16")
    torch.testing.assert_close(copy(x).float(), model(x), rtol=0.03, atol=0.03)
    assert next(model.parameters()).dtype == torch.float32


def test_machines_without_bfloat16_and_models_in_float64_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = MLP(shape=(4,), classes=3, hidden=(8, 8)), torch.rand(5, 4)
    monkeypatch.setattr(bfloat16, "_has_bfloat16", lambda device: True)
    assert optimised_copy(model, x, "bfloat16") is not model
    assert optimised_copy(model.double(), x.double(), "bfloat16") is model
    monkeypatch.setattr(bfloat16, "_has_bfloat16", lambda device: False)
    assert optimised_copy(model.float(), x, "bfloat16") is model


@pytest.mark.usefixtures("able")
def test_a_single_layer_is_left_in_float32() -> None:
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)), torch.rand(5, 2, 3)
    torch.testing.assert_close(optimised_copy(model, x, "bfloat16")(x), model(x), rtol=0, atol=0)
    alone = nn.Linear(6, 3)
    assert optimised_copy(alone, x.flatten(1), "bfloat16") is alone


class Views(nn.Module):
    """Needs its features contiguous, as many networks of tutorials do: fails on a copy that is channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x)).view(x.shape[0], -1))


class Talkative(nn.Module):
    """Prints and warns while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 8)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):
            print("traced")
            warnings.warn("traced", stacklevel=1)
        return self.stem(x).flatten(1) + (torch.ones(2) if isinstance(x, torch.fx.Proxy) else 0)


@pytest.mark.usefixtures("able")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [Views, Talkative])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_pass_that_fails_prints_nothing(
    kind: type[nn.Module], precision: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """torch.fx prints the traceback of a traced forward that raises."""
    model, x = kind().eval(), torch.rand(4, 1, 8, 8)
    copy = optimised_copy(model, x, precision)
    assert capfd.readouterr() == ("", "")
    assert (copy is model) == (precision == "float32")
    torch.testing.assert_close(copy(x).float(), model(x), rtol=0.03, atol=0.03)


def test_a_precision_of_another_name_is_refused() -> None:
    with pytest.raises(InputError, match="precision='float16': accepted are float32, bfloat16"):
        optimised_copy(nn.Linear(2, 2), torch.rand(1, 2), "float16")  # type: ignore[arg-type]
