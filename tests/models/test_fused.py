"""The copy that a search asks says what the model says, or is the model itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from wideberth.models import MLP, ConvNet, PreActResNet18
from wideberth.models.fused import fused


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
    copy = fused(model, x.double())
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


def test_model_is_lent_and_given_back() -> None:
    model = ConvNet(shape=(1, 8, 8), classes=3, width=4, batch_norm=True).train()
    copy = fused(model, torch.rand(4, 1, 8, 8))
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
def test_what_cannot_be_copied_is_asked_itself(kind: str) -> None:
    model = Odd(kind)
    assert fused(model, torch.rand(4, 1, 8, 8)) is model


def test_without_convolutions_there_is_nothing_to_gain() -> None:
    model = MLP(shape=(5,), classes=3, hidden=(4,))
    assert fused(model, torch.rand(4, 5)) is model
