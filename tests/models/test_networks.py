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
from wideberth.models import (
    MLP,
    ConvNet,
    IAATWideResNet,
    MadryMNIST,
    Normalize,
    PreActResNet18,
    SmallCNN,
    SmoothReLU,
    Torchvision,
    WideResNet,
    activation,
)
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
    "wrn pool": (lambda: WideResNet(10, 2, (3, 10, 7), activation="leaky_relu", shortcut="pool"), (3, 10, 7)),
    "iaat": (lambda: IAATWideResNet(8, 1, (3, 9, 12), mean=RGB[0], std=RGB[1]), (3, 9, 12)),
    "madry": (lambda: MadryMNIST((1, 9, 10), width=4, hidden=12), (1, 9, 10)),
    "trades": (lambda: begun(SmallCNN((1, 16, 18), width=4, hidden=12)), (1, 16, 18)),
    "mlp cosine": (lambda: MLP((1, 8, 8), hidden=(12,), head="cosine"), (1, 8, 8)),
    "conv mahalanobis": (lambda: ConvNet((1, 8, 8), width=4, activation="smooth_relu", head="mahalanobis"), (1, 8, 8)),
    "preact cosine": (lambda: PreActResNet18((3, 16, 16), width=4, head="cosine"), (3, 16, 16)),
    "wrn mahalanobis": (lambda: WideResNet(10, 1, (1, 8, 8), head="mahalanobis"), (1, 8, 8)),
    "torchvision": (lambda: Torchvision("squeezenet1_1", 10), (3, 64, 64)),
}


def begun(net: SmallCNN) -> SmallCNN:
    """As after a step: its logits are zero before."""
    nn.init.normal_(net.head.weight, std=0.1)
    return net


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
        (lambda: WideResNet(shortcut="pool"), 46_160_474 - 16 * 160 - 160 * 320 - 320 * 640),
        (IAATWideResNet, 46_090_740),
        (MadryMNIST, 3_274_634),
        (SmallCNN, 312_202),
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


def test_pooled_shortcuts_average_and_pad_with_zeros_on_both_sides() -> None:
    net = WideResNet(10, 2, activation="leaky_relu", shortcut="pool").eval()
    x = torch.randn(2, 64, 8, 6)
    for block, inputs, stride in zip((s[0] for s in net.stages), (16, 32, 64), (1, 2, 2), strict=True):  # type: ignore[index]
        block.conv2.weight.data.zero_()
        activated = block.activation1(block.norm1(x[:, :inputs]))
        pooled = torch.nn.functional.avg_pool2d(activated, stride)
        zeros = torch.zeros(2, inputs // 2, *pooled.shape[2:])
        padded = block(x[:, :inputs])
        torch.testing.assert_close(padded[:, inputs // 2 : -inputs // 2] if inputs > 16 else padded[:, 8:24], pooled)
        assert torch.equal(padded[:, : inputs // 2], zeros)
        assert torch.equal(padded[:, -(inputs // 2) :], zeros)
    assert [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)] == []


def test_iaat_network_has_norms_without_weights_but_for_that_of_the_logit_maps() -> None:
    net = IAATWideResNet(14, 1, classes=7)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.affine for m in norms] == [False] * (len(norms) - 1) + [True]
    assert (len(norms), norms[-1].num_features, len(net.blocks)) == (2 * 6 + 2, 7, 6)
    assert not any(isinstance(m, nn.Linear) for m in net.modules())
    assert all(m.bias is None for m in net.modules() if isinstance(m, nn.Conv2d))
    shapes = []
    net.last.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    x = torch.rand(4, 3, 8, 8)
    logits = net(x)
    assert shapes == [(4, 64, 2, 2)]
    # In train mode the last norm gives each map mean zero over the batch, hence each logit.
    torch.testing.assert_close(logits.mean(0), torch.zeros(7), rtol=0, atol=1e-5)


def test_iaat_blocks_add_their_input_as_it_is_or_averaged() -> None:
    net = IAATWideResNet(8, 1).eval()
    x = torch.randn(2, 16, 8, 8)
    for module in net.blocks.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.zero_()
    out = net.blocks[:2](x)
    torch.testing.assert_close(out[:, :16], torch.nn.functional.avg_pool2d(x, 3, 2, 1))
    assert not out[:, 16:].any()


def test_small_cnn_starts_with_equal_logits_and_drops_in_training_only() -> None:
    net, x = SmallCNN((1, 16, 16), width=4, hidden=16), torch.rand(3, 1, 16, 16)
    assert not net(x).any()
    begun(net)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    assert [type(m).__name__ for m in net.hidden] == ["Linear", "ReLU", "Dropout", "Linear", "ReLU"]
    assert SmallCNN((1, 16, 16), width=4, head="cosine").head.weight.any()


def test_madry_network_keeps_the_size_but_for_its_poolings() -> None:
    net = MadryMNIST(width=2, hidden=8)
    assert net.stages(torch.rand(1, 1, 28, 28)).shape == (1, 4, 7, 7)
    assert [type(m).__name__ for m in net.stages] == ["Conv2d", "ReLU", "MaxPool2d"] * 2


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


def test_smooth_relu_is_its_formula_and_has_no_kink() -> None:
    layer = SmoothReLU(3.0).double()
    x = torch.tensor([-1e30, -2.0, -1e-9, 0.0, 1e-9, 0.3, 5.0, 1e30], dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y[:4].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(y[5:7], x[5:7] - torch.log(1 + 9 * x[5:7]) / 9)
    assert y[7] == x[7]
    (slope,) = torch.autograd.grad(y.sum(), x)
    positive = x.detach().clamp_min(0)
    torch.testing.assert_close(slope, 9 * positive / (1 + 9 * positive))
    away = torch.tensor([-1.0, -0.1, 0.2, 1.0, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, away)
    assert torch.autograd.gradgradcheck(layer, away)


def test_smooth_relu_learns_how_smooth_it_is_and_stays_finite() -> None:
    layer = activation("smooth_relu")
    assert isinstance(layer, SmoothReLU)
    assert layer.root.item() == 20
    (gradient,) = torch.autograd.grad(layer(torch.tensor([0.01])).sum(), layer.root)
    b = torch.tensor(400.0, dtype=torch.float64, requires_grad=True)
    (by_b,) = torch.autograd.grad(0.01 - torch.log(1 + b * 0.01) / b, b)
    assert gradient.item() == pytest.approx(2 * 20 * by_b.item(), rel=1e-3)
    big = torch.tensor([-6e4, 0.0, 6e4])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        out = layer(big.to(dtype))  # the layer in float32, as under autocast: 400 * 6e4 is no float16
        assert out.dtype == dtype
        torch.testing.assert_close(out, big.to(dtype).relu())


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
        (lambda: WideResNet(10, 1, shortcut="none"), "shortcut='none': accepted are conv, pool"),  # type: ignore[arg-type]
        (lambda: IAATWideResNet(28), "6 n \\+ 2"),
        (lambda: IAATWideResNet(2), "6 n \\+ 2"),
        (lambda: IAATWideResNet(8, 0), "factor"),
        (lambda: MadryMNIST((28, 28)), "height, width"),  # type: ignore[arg-type]
        (lambda: MadryMNIST(hidden=0), "hidden"),
        (lambda: SmallCNN((1, 15, 28)), "at least 16"),
        (lambda: SmallCNN(dropout=1), "dropout=1"),
        (lambda: SmoothReLU(0), "root=0"),
        (lambda: ConvNet(head="cosin"), "head='cosin': accepted are linear, cosine, mahalanobis"),
        (lambda: Torchvision("resnet81"), "close are resnet"),
        (lambda: Torchvision("fcn_resnet50"), "no such classification model"),
        (lambda: Torchvision("resnet18", options={"layers": 3}), "cannot be built"),
    ],
)
def test_networks_refuse(make: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(InputError, match=says) as refusal:
        make()
    assert "\n" not in str(refusal.value)
