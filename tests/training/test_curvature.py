"""Second derivatives without the zeros are the same derivatives: with and without, layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_tools import seeded

from wideberth.training.curvature import twice_differentiable


class Run(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def in_place_and_on(activation: Callable[[Tensor], object]) -> Run:
    """Uses the tensor that was overwritten, as a residual branch may, and not what the activation returns."""

    def function(x: Tensor) -> Tensor:
        x = x * 1
        activation(x)
        return x

    return Run(function)


def batch_norm(affine: bool, tracked: bool = True) -> nn.Module:
    layer = nn.BatchNorm2d(3, affine=affine, track_running_stats=tracked)
    if layer.running_mean is not None and layer.running_var is not None:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "F.relu": lambda: Run(F.relu),
    "F.relu by keyword": lambda: Run(lambda x: F.relu(input=x)),
    "torch.relu": lambda: Run(torch.relu),
    "Tensor.relu": lambda: Run(Tensor.relu),
    "torch.relu_": lambda: Run(lambda x: torch.relu_(x * 1)),
    "F.relu in place, and on with it": lambda: in_place_and_on(lambda x: F.relu(x, inplace=True)),
    "Tensor.relu_, and on with it": lambda: in_place_and_on(lambda x: x.relu_()),
    "F.leaky_relu in place, and on with it": lambda: in_place_and_on(lambda x: F.leaky_relu(x, 0.2, inplace=True)),
    "LeakyReLU": nn.LeakyReLU,
    "LeakyReLU(0.1)": lambda: nn.LeakyReLU(0.1),
    "LeakyReLU(0.3) in place": lambda: nn.LeakyReLU(0.3, inplace=True),
    "LeakyReLU(-0.5)": lambda: nn.LeakyReLU(-0.5),
    "F.leaky_relu by keyword": lambda: Run(lambda x: F.leaky_relu(input=x, negative_slope=0.7)),
    "PReLU": nn.PReLU,
    "ReLU6": nn.ReLU6,
    "SiLU": nn.SiLU,
    "Tanh": nn.Tanh,
    "GELU": nn.GELU,
    "MaxPool2d(2)": lambda: nn.MaxPool2d(2),
    "MaxPool2d(3, 2)": lambda: nn.MaxPool2d(3, 2),
    "MaxPool2d(3, 1, 1), overlapping": lambda: nn.MaxPool2d(3, 1, 1),
    "MaxPool2d((2, 3), (2, 1), (1, 0))": lambda: nn.MaxPool2d((2, 3), (2, 1), (1, 0)),
    "MaxPool2d dilated": lambda: nn.MaxPool2d(2, 1, dilation=2),
    "MaxPool2d, ceil mode": lambda: nn.MaxPool2d(2, ceil_mode=True),
    "F.max_pool2d": lambda: Run(lambda x: F.max_pool2d(x, 2, stride=1)),
    "F.max_pool2d by keyword": lambda: Run(lambda x: F.max_pool2d(input=x, kernel_size=2)),
    "F.max_pool2d with its indices": lambda: Run(lambda x: F.max_pool2d(x, 2, return_indices=True)[0]),
    "torch.max_pool2d": lambda: Run(lambda x: torch.max_pool2d(x, 2)),
    "one image": lambda: Run(lambda x: torch.stack([F.max_pool2d(image, 2) for image in x])),
    "AvgPool2d": lambda: nn.AvgPool2d(2),
    "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d(2),
    "AdaptiveMaxPool2d": lambda: nn.AdaptiveMaxPool2d(2),
    "BatchNorm2d": lambda: batch_norm(affine=True),
    "BatchNorm2d without affine": lambda: batch_norm(affine=False),
    "BatchNorm2d without statistics": lambda: batch_norm(affine=True, tracked=False),
    "Dropout": lambda: nn.Dropout(0.5),
    "LayerNorm": lambda: nn.LayerNorm(5),
    "BatchNorm, ReLU in place": lambda: nn.Sequential(batch_norm(affine=True), nn.ReLU(inplace=True)),
    "max pool of ReLU": lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)),
}


def derivatives(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Values, input and parameter gradients of a function, and the gradients of the squared input gradient."""
    point = x.clone().requires_grad_()
    parameters = [point, *model.parameters()]
    values = model(point)
    generator = torch.Generator().manual_seed(3)
    output = (values * torch.rand(values.shape, generator=generator, dtype=values.dtype)).square().sum()
    first = torch.autograd.grad(output, parameters, create_graph=True, materialize_grads=True)
    squared = first[0].square().sum()
    second = torch.autograd.grad(squared, parameters, materialize_grads=True) if squared.requires_grad else ()
    return values.detach(), *(gradient.detach() for gradient in first), *second


def around(layer: nn.Module, size: int = 5, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The layer between convolutions, so that there are derivatives to go through it."""
    return nn.Sequential(nn.Conv2d(2, 3, 1), layer, nn.Conv2d(3, 2, 1)).to(dtype).eval()


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_derivatives_are_the_same(name: str) -> None:
    model = seeded(lambda: around(LAYERS[name]()), 4)
    x = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    plain = derivatives(model, x)
    with twice_differentiable():
        ours = derivatives(model, x)
    assert len(plain) == len(ours) > 2 * len(list(model.parameters()))
    for ordinary, rewritten in zip(plain, ours, strict=True):
        assert rewritten.dtype == ordinary.dtype
        assert torch.allclose(rewritten, ordinary, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "name", ["ReLU", "LeakyReLU(0.1)", "MaxPool2d(2)", "BatchNorm2d", "BatchNorm2d without affine"]
)
def test_the_dtype_stays(name: str, dtype: torch.dtype) -> None:
    model = seeded(lambda: LAYERS[name]()).to(dtype).eval()
    x = torch.randn(2, 3, 4, 4).to(dtype)
    with torch.no_grad(), twice_differentiable():
        ours = model(x)
    assert ours.dtype == model(x).dtype == dtype


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.LeakyReLU(0.1)])
def test_the_corner_has_torchs_derivative(layer: nn.Module) -> None:
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x).sum(), x)
    with twice_differentiable():
        (ours,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(plain, ours)


def test_no_path_for_zeros() -> None:
    """What it is for: the input gradient of a piecewise-linear net depends on the weights alone, not on the input."""
    model = seeded(lambda: around(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))))
    x = torch.rand(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    with twice_differentiable():
        (ours,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    assert torch.autograd.grad(ours.sum(), x, allow_unused=True, retain_graph=True) == (None,)
    (plain,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    assert torch.autograd.grad(plain.sum(), x, allow_unused=True) != (None,)


def test_training_statistics_move_as_ever() -> None:
    x = torch.randn(4, 3, 2, 2)
    plain, ours = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    expected = plain(x)
    with twice_differentiable():
        assert torch.equal(ours(x), expected)
    assert ours.running_mean is not None
    assert plain.running_mean is not None
    assert torch.equal(ours.running_mean, plain.running_mean)
    assert ours.num_batches_tracked == 1


def test_attention_can_be_differentiated_twice() -> None:
    attention = seeded(lambda: nn.MultiheadAttention(4, 2, batch_first=True)).double().eval()
    model = Run(lambda x: attention(x, x, x, need_weights=False)[0])
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    with twice_differentiable():
        ours = derivatives(model, x)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = derivatives(model, x)
    assert all(torch.allclose(a, b) for a, b in zip(plain, ours, strict=True))


def test_the_mode_ends_with_its_block() -> None:
    with pytest.raises(ZeroDivisionError), twice_differentiable():
        raise ZeroDivisionError
    x = torch.ones(1, requires_grad=True)
    assert "Relu" in type(F.relu(x).grad_fn).__name__
