"""What every shipped network promises, by one table; parameter counts against published ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models import VisionTransformer

from wideberth.checks import InputError
from wideberth.models import MLP, ConvNet, Normalize, PreActResNet18, Torchvision, WideResNet, activation
from wideberth.models.layers import ACTIVATIONS
from wideberth.models.libraries import LibraryModel

RGB = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: MLP((1, 8, 8), hidden=(12, 8)), (1, 8, 8)),
    "mlp linear": (lambda: MLP((5,), hidden=()), (5,)),
    "mlp norm": (lambda: MLP((3, 7), hidden=(9,), batch_norm=True, activation="silu"), (3, 7)),
    "conv 8": (lambda: ConvNet((1, 8, 8), width=4), (1, 8, 8)),
    "conv 28": (lambda: ConvNet((1, 28, 28), width=4, depth=2, activation="softplus"), (1, 28, 28)),
    "conv 32": (lambda: ConvNet((3, 32, 32), width=4, batch_norm=True, mean=RGB[0], std=RGB[1]), (3, 32, 32)),
    "conv oblong": (lambda: ConvNet((2, 9, 17), width=4, activation="leaky_relu"), (2, 9, 17)),
    "preact": (lambda: PreActResNet18((3, 16, 16), width=4, mean=RGB[0], std=RGB[1]), (3, 16, 16)),
    "preact grey": (lambda: PreActResNet18((1, 28, 28), width=4, activation="gelu"), (1, 28, 28)),
    "wrn": (lambda: WideResNet(10, 1, (3, 32, 32)), (3, 32, 32)),
    "wrn elu": (lambda: WideResNet(16, 2, (1, 8, 8), activation="elu", mean=(0.5,), std=(0.5,)), (1, 8, 8)),
    "torchvision": (lambda: Torchvision("squeezenet1_1", 10), (3, 64, 64)),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor]:
    make, shape = NETWORKS[request.param]
    torch.manual_seed(0)
    return make(), torch.rand(4, *shape)


def test_logits_of_a_batch_and_of_each_sample_agree(network: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = network
    model.eval()
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (4, 10)
        assert torch.isfinite(logits).all()
        assert torch.equal(logits, model(x))
        for row in range(4):
            torch.testing.assert_close(model(x[row : row + 1]), logits[row : row + 1], rtol=1e-4, atol=1e-5)


def test_input_is_left_alone(network: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = network
    before = x.clone()
    model(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("train", [False, True])
def test_input_gradients_can_be_penalised(network: tuple[nn.Module, torch.Tensor], train: bool) -> None:
    model, x = network
    model.train(train)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).logsumexp(1).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    # A bias of a piecewise linear net moves no gradient of the last layer; every weight does.
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert gradients[name] is not None, name
    assert all(torch.isfinite(g).all() for g in gradients.values() if g is not None)
    assert sum(float(g.abs().sum()) for g in gradients.values() if g is not None) > 0


def test_every_parameter_is_used(network: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = network
    model(x).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_kept(network: tuple[nn.Module, torch.Tensor], dtype: torch.dtype) -> None:
    model, x = network
    model.eval()
    with torch.no_grad():
        expected = model(x)
        logits = copy.deepcopy(model).to(dtype)(x.to(dtype))
    assert logits.dtype == dtype
    tolerance = 1e-4 if dtype is torch.float64 else 0.1 * float(expected.abs().max() + 1)
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=tolerance)


def test_channels_last_changes_nothing(network: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = network
    if x.dim() != 4:
        pytest.skip("not images")
    model.eval()
    with torch.no_grad():
        expected = model(x)
        layout = torch.channels_last
        logits = copy.deepcopy(model).to(memory_format=layout)(x.to(memory_format=layout))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (PreActResNet18, 11_172_170),
        (lambda: WideResNet(28, 10), 36_479_194),
        (WideResNet, 46_160_474),
        (lambda: MLP((1, 28, 28)), 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10),
        (lambda: ConvNet((3, 32, 32), width=32), 288_298),
    ],
)
def test_parameter_counts_are_the_published_ones(make: Callable[[], nn.Module], count: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in make().parameters()) == count


def test_convnet_keeps_its_signal_without_batch_norm() -> None:
    torch.manual_seed(0)
    net = ConvNet((3, 32, 32), width=32)
    images = torch.rand(16, 3, 32, 32)
    features = net.stages(images).detach()
    assert 0.1 < float(features.std() / images.std()) < 10


def test_wide_resnet_starts_as_published() -> None:
    torch.manual_seed(0)
    net = WideResNet(16, 4)
    last = [module for module in net.modules() if isinstance(module, nn.Conv2d)][-1]
    assert float(last.weight.detach().std()) == pytest.approx((2 / (last.out_channels * 9)) ** 0.5, rel=0.02)
    assert not net.head.bias.any()


def test_transformers_are_twice_differentiable_as_documented() -> None:
    net = VisionTransformer(
        image_size=32, patch_size=16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=10
    )
    model = LibraryModel(net, *RGB)
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(model(x).logsumexp(1).sum(), x, create_graph=True)
        gradient.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 4, 4), (2, 3, 2, 2, 2)])
def test_normalize_works_per_channel_at_any_rank(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape)
    mean, std = (0.1, 0.2, 0.3), (1.0, 2.0, 4.0)
    out = Normalize(mean, std)(x)
    assert out.shape == x.shape
    for channel in range(3):
        torch.testing.assert_close(out[:, channel], (x[:, channel] - mean[channel]) / std[channel])
    torch.testing.assert_close(Normalize((0.5,), (2.0,))(x), (x - 0.5) / 2)


def test_normalisation_is_inside_the_network() -> None:
    torch.manual_seed(0)
    inside = ConvNet((3, 8, 8), width=4, mean=RGB[0], std=RGB[1]).eval()
    torch.manual_seed(0)
    outside = ConvNet((3, 8, 8), width=4).eval()
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(inside(x), outside(Normalize(*RGB)(x)))


def test_normalize_refuses() -> None:
    with pytest.raises(InputError, match="one deviation > 0"):
        Normalize((0.5, 0.5), (1.0,))
    with pytest.raises(InputError, match="one deviation > 0"):
        Normalize((0.5,), (0.0,))
    with pytest.raises(InputError, match="3 channels"):
        Normalize(*RGB)(torch.rand(2, 1, 4, 4))


@pytest.mark.parametrize("name", [*ACTIVATIONS, "torch.nn.Softplus(beta=10)", "torch.nn:Mish", nn.CELU])
def test_activations_come_new_and_out_of_place(name: str | Callable[[], nn.Module]) -> None:
    layer, other = activation(name), activation(name)
    assert layer is not other
    x = torch.linspace(-2, 2, 9)
    before = x.clone()
    assert layer(x).shape == x.shape
    assert torch.equal(x, before)


def test_activations_are_the_named_ones() -> None:
    assert activation("leaky_relu")(torch.tensor(-1.0)).item() == pytest.approx(-0.1)
    assert activation("torch.nn.LeakyReLU(0.3)")(torch.tensor(-1.0)).item() == pytest.approx(-0.3)
    assert activation("torch.nn.ReLU(inplace=True)").inplace is False


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("rellu", "accepted are relu, leaky_relu"),
        ("torch.nn.Relu", "no 'Relu'"),
        ("torch.nn.functional.relu", "missing a required argument"),
        ("torch.nn.Softplus(gamma=1)", "accepted are beta"),
        ("math.gcd()", "must give an nn.Module, gave int"),
        (nn.ReLU(), "such as its class"),
    ],
)
def test_activation_refuses(name: str | Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(InputError, match=says):
        activation(name)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MLP(()), "shape"),
        (lambda: MLP((0,)), "shape"),
        (lambda: MLP((4,), classes=1), "classes"),
        (lambda: MLP((4,), hidden=(3, 0)), "hidden"),
        (lambda: ConvNet((28, 28)), "height, width"),  # type: ignore[arg-type]
        (lambda: ConvNet(width=0), "width"),
        (lambda: ConvNet(depth=0), "depth"),
        (lambda: ConvNet(mean=(0.5,)), "both or neither"),
        (lambda: ConvNet(mean=RGB[0], std=RGB[1]), "1 here"),
        (lambda: ConvNet(activation="swishy"), "activation='swishy'"),
        (lambda: PreActResNet18(width=0), "width"),
        (lambda: WideResNet(depth=30), "6 n \\+ 4"),
        (lambda: WideResNet(depth=4), "6 n \\+ 4"),
        (lambda: WideResNet(factor=0), "factor"),
        (lambda: Torchvision("resnet81"), "close are resnet"),
        (lambda: Torchvision("fcn_resnet50"), "no such classification model"),
        (lambda: Torchvision("resnet18", options={"layers": 3}), "cannot be built"),
    ],
)
def test_networks_refuse(make: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(InputError, match=says) as refusal:
        make()
    assert "\n" not in str(refusal.value)
