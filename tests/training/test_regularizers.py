"""What the function's shape pays: closed forms on a linear model, finite differences on nets, unbiased estimates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_tools import seeded

import wideberth as wb
from wideberth.randomness import Noise
from wideberth.training.regularizers import EffectiveMargin, InputGradient, Regularizer, settled
from wideberth.training.schedules import Ramp, Steps

W = torch.tensor([[1, 0, 2], [0, -1, 1], [2, 1, 0], [0, 0, 1]], dtype=torch.float64)
X = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=torch.float64)
Y = torch.tensor([2, 0])

ESTIMATORS: dict[str, Callable[[], Regularizer]] = {
    "exact": lambda: EffectiveMargin(1.0, "exact"),
    "projection": lambda: EffectiveMargin(1.0, "projection", draws=2),
    "softmax": lambda: EffectiveMargin(1.0, "softmax", temperature=1.0),
    "softmax, warm": lambda: EffectiveMargin(1.0, "softmax", temperature=40.0),
    "input gradient": lambda: InputGradient(1.0),
}


def linear() -> nn.Module:
    model = nn.Linear(3, 4, bias=False).double()
    model.weight.data.copy_(W)
    return model


def convolutional(activation: type[nn.Module], pool: nn.Module, seed: int = 0) -> nn.Module:
    """A small net in float64 for inputs (B, 2, 6, 6) whose batch norm has statistics of its own."""

    def make() -> nn.Module:
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            activation(),
            pool,
            nn.Conv2d(4, 5, 2),
            activation(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(20, 3),
        )
        norm = model[1]
        assert isinstance(norm, nn.BatchNorm2d)
        for value in (norm.running_mean, norm.bias.data):
            assert value is not None
            value.normal_(0, 0.3)
        for value in (norm.running_var, norm.weight.data):
            assert value is not None
            value.uniform_(0.5, 2)
        model[8].weight.data.mul_(10)  # so that gradients are of order one
        return model.double()

    made: nn.Module = seeded(make, seed)
    return made


NETS: dict[str, Callable[[], nn.Module]] = {
    "relu, max pool": lambda: convolutional(nn.ReLU, nn.MaxPool2d(2)),
    "leaky relu, average pool": lambda: convolutional(nn.LeakyReLU, nn.AvgPool2d(2)),
    "silu, max pool": lambda: convolutional(nn.SiLU, nn.MaxPool2d(2)),
    "tanh, adaptive pool": lambda: convolutional(nn.Tanh, nn.AdaptiveAvgPool2d(3)),
}


def images(rows: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Noise]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.arange(rows) % 3, Noise(torch.arange(rows) + 10, 3)


# ---- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "mean"), [(1, 2.153242), (40, 1.575137), (0.1, 4.674226)])
def test_softmax_estimator_on_the_linear_example(temperature: float, mean: float) -> None:
    values = EffectiveMargin(1.0, "softmax", temperature)(linear(), X, Y, Noise(torch.arange(2)))
    assert values.mean().item() == pytest.approx(mean, rel=1e-6)
    mixture = (X @ W.T / temperature).softmax(1)
    assert torch.allclose(values, (mixture @ W).square().sum(1), rtol=1e-12)


def test_exact_is_the_squared_frobenius_norm() -> None:
    values = EffectiveMargin(1.0, "exact")(linear(), X, Y, Noise(torch.arange(2)))
    assert values.tolist() == pytest.approx([13.0, 13.0], rel=1e-12)


def test_projection_on_the_linear_example() -> None:
    rows = 20_000
    values = EffectiveMargin(1.0)(linear(), X[:1].expand(rows, 3), Y[:1].expand(rows), Noise(torch.arange(rows)))
    assert values.std() > 1  # every row drew its own direction
    assert values.mean().item() == pytest.approx(13, rel=0.02)


@pytest.mark.parametrize("draws", [1, 3])
def test_projection_is_unbiased_on_a_net(draws: int) -> None:
    model, rows = NETS["relu, max pool"](), 4_000
    x, y, noise = images(1)
    exact = EffectiveMargin(1.0, "exact")(model, x, y, noise)
    drawn = EffectiveMargin(1.0, draws=draws)(
        model, x.expand(rows, -1, -1, -1), y.expand(rows), Noise(torch.arange(rows), 5)
    )
    error = drawn.std() / rows**0.5
    assert abs(drawn.mean() - exact) < 4 * error
    assert error < 0.02 * exact  # so that a missing factor could not hide


def test_more_draws_are_less_noisy() -> None:
    rows = 2_000
    x, y = X[:1].expand(rows, 3), Y[:1].expand(rows)
    one, four = (EffectiveMargin(1.0, draws=d)(linear(), x, y, Noise(torch.arange(rows))).var() for d in (1, 4))
    assert (one / four).item() == pytest.approx(4, rel=0.15)


def test_input_gradient_on_the_linear_example() -> None:
    values = InputGradient(1.0)(linear(), X, Y, Noise(torch.arange(2)))
    error = (X @ W.T).softmax(1) - F.one_hot(Y, 4)
    assert torch.allclose(values, (error @ W).square().sum(1), rtol=1e-12)


# ---- one sample at a time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_value_belongs_to_its_sample(estimator: str) -> None:
    model, regularizer = NETS["relu, max pool"]().train(), ESTIMATORS[estimator]()
    x, y, noise = images(4)
    together = regularizer(model, x, y, noise)
    assert together.shape == (4,)
    assert (together > 0).all()
    for row in range(4):
        alone = regularizer(model, x[row : row + 1], y[row : row + 1], Noise(noise.index[row : row + 1], noise.seed))
        assert torch.allclose(together[row], alone, rtol=1e-10)


# ---- gradients to the parameters ------------------------------------------------------------------------------------


def penalty_without_graph(model: nn.Module, estimator: str, fixed: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The mean penalty by plain first derivatives; `fixed` (D, B, K) are the directions held constant."""
    point = x.detach().requires_grad_()
    logits = model(point)
    if estimator == "input gradient":
        outputs = [F.cross_entropy(logits, y, reduction="none")]
    else:
        outputs = [(direction * logits).sum(1) for direction in fixed]
    total = torch.zeros(len(x), dtype=x.dtype)
    for output in outputs:
        (gradient,) = torch.autograd.grad(output.sum(), point, retain_graph=True)
        total = total + gradient.flatten(1).square().sum(1)
    return total.detach().mean()


def directions(model: nn.Module, estimator: str, x: Tensor, noise: Noise) -> Tensor:
    """What each estimator contracts the Jacobian with, so that the penalty is a sum of squares over the first axis."""
    rows, classes = len(x), 3
    if estimator == "exact":
        return torch.eye(classes, dtype=x.dtype)[:, None].expand(-1, rows, -1)
    if estimator == "projection":
        drawn = torch.stack([noise.fold("projection", d).normal((classes,), x.dtype) for d in range(2)])
        return F.normalize(drawn, dim=2) * (classes / 2) ** 0.5
    temperature = 40.0 if "warm" in estimator else 1.0
    return (model(x) / temperature).softmax(1).detach()[None]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_parameter_gradients_are_finite_differences(estimator: str, net: str) -> None:
    model = NETS[net]().eval()
    x, y, noise = images()
    fixed = directions(model, estimator, x, noise)
    value = ESTIMATORS[estimator]()(model, x, y, noise).mean()
    assert value.item() == pytest.approx(penalty_without_graph(model, estimator, fixed, x, y).item(), rel=1e-10)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
    assert any(gradient.abs().max() > 0.01 for gradient in gradients)
    generator = torch.Generator().manual_seed(2)
    size = 1e-5
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * size)
            sides.append(penalty_without_graph(model, estimator, fixed, x, y))
            with torch.no_grad():
                parameter.sub_(direction, alpha=sign * size)
        difference = (sides[0] - sides[1]) / (2 * size)
        assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_settled_penalty_has_the_same_gradients(estimator: str) -> None:
    """Also where the loss is scaled afterwards, where a parameter is frozen, and where one is never reached."""
    x, y, noise = images()
    found = []
    for settle in (False, True):
        model = NETS["relu, max pool"]().eval()  # without the draws of dropout, the two can be compared
        model[0].weight.requires_grad_(False)
        model.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
        penalty = 0.3 * ESTIMATORS[estimator]()(model, x, y, noise).mean()
        total = settled(penalty, model.parameters()) if settle else penalty
        (7 * total + F.cross_entropy(model(x), y)).backward()
        found.append((total.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (plain, expected), (ours, gradients) = found
    assert torch.equal(ours, plain)
    assert gradients["idle"] is gradients["0.weight"] is None
    for name, gradient in gradients.items():
        if gradient is not None:
            assert torch.allclose(gradient, expected[name], rtol=1e-12, atol=1e-14), name
            assert gradient.abs().max() > 0


def test_settling_what_has_no_gradient_changes_nothing() -> None:
    value = torch.tensor(2.0)
    assert settled(value, [nn.Parameter(torch.ones(1))]) is value


# ---- manners --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_model_comes_back_as_it_was(estimator: str) -> None:
    model = NETS["relu, max pool"]().train()
    model[1].eval()  # a batch norm that its owner froze
    model[0].weight.requires_grad_(False)
    flags = [(module.training) for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y, noise = images()
    ESTIMATORS[estimator]()(model, x, y, noise).mean().backward()
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not x.requires_grad
    assert model[0].weight.grad is None
    assert model[4].weight.grad is not None


def test_dropout_and_batch_statistics_play_no_part() -> None:
    model = NETS["relu, max pool"]()
    x, y, noise = images()
    trained = EffectiveMargin(1.0, "exact")(model.train(), x, y, noise)
    evaluated = EffectiveMargin(1.0, "exact")(model.eval(), x, y, noise)
    assert torch.equal(trained, evaluated)
    coupled = EffectiveMargin(1.0, "exact", mode="train")(model.train(), x, y, noise)
    assert not torch.allclose(coupled, evaluated)


def test_half_precision_does_not_reach_the_squares() -> None:
    """Gradients of 1e-5 square to 1e-10, which bfloat16 keeps to two digits at best; float32 is asked for inside."""
    model = linear().float()
    noise = Noise(torch.arange(2))
    plain = EffectiveMargin(1.0, "softmax")(model, X.float(), Y, noise)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = EffectiveMargin(1.0, "softmax")(model, X.float(), Y, noise)
    assert mixed.dtype == torch.float32
    assert torch.equal(plain, mixed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_any_precision(estimator: str, net: str, dtype: torch.dtype) -> None:
    model = NETS[net]().to(dtype)
    x, y, noise = images()
    values = ESTIMATORS[estimator]()(model, x.to(dtype), y, noise)
    assert values.dtype == dtype
    reference = ESTIMATORS[estimator]()(NETS[net](), x, y, noise)
    assert torch.allclose(values.double(), reference, rtol=0.3 if dtype == torch.bfloat16 else 1e-4)


def test_the_weight_follows_its_schedule() -> None:
    assert InputGradient(0.5).weight_at(7.3) == 0.5
    assert [EffectiveMargin(Steps(1.0, [2, 4])).weight_at(e) for e in (0, 1.99, 2, 3.5, 4)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )
    assert [EffectiveMargin(Ramp(2.0, 4)).weight_at(e) for e in (0, 1, 4, 9)] == pytest.approx([0, 0.5, 2, 2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EffectiveMargin(-1.0), "weight=-1.0: must be at least 0"),
        (lambda: EffectiveMargin(float("nan")), "weight=nan: must be at least 0"),
        (lambda: InputGradient(-0.1), "weight=-0.1: must be at least 0"),
        (lambda: EffectiveMargin(Ramp(1.0, 3, start=-1.0)), "weight=-1.0: must be at least 0"),
        (lambda: Ramp(1.0, 0), "must be positive"),
        (lambda: EffectiveMargin(1.0, "sketch"), "estimator='sketch': accepted are exact, projection, softmax"),  # type: ignore[arg-type]
        (lambda: EffectiveMargin(1.0, "softmax", temperature=0), "temperature=0: must be positive"),
        (lambda: EffectiveMargin(1.0, "softmax", temperature=-2), "temperature=-2: must be positive"),
        (lambda: EffectiveMargin(1.0, draws=0), "draws=0: must be at least 1"),
    ],
)
def test_refusals(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(wb.InputError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)
