"""What the function's shape pays: closed forms on a linear model, finite differences on nets, unbiased estimates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from regularizer_tools import NETS, ROWS, images
from torch import Tensor, nn
from torch.nn import functional as F
from training_tools import batch_of, mlp, module_of, seeded, tensors

import wideberth as wb
from wideberth.models.heads import CosineHead
from wideberth.randomness import Noise
from wideberth.training.catalogue import exported
from wideberth.training.early_gradient import with_gradient_taken
from wideberth.training.regularizers import (
    Curvature,
    EffectiveMargin,
    GradientAlignment,
    InputGradient,
    Jacobian,
    LocalLinearity,
    Regularizer,
    WeightNorm,
)
from wideberth.training.schedules import Ramp, Steps

W = torch.tensor([[1, 0, 2], [0, -1, 1], [2, 1, 0], [0, 0, 1]], dtype=torch.float64)
X = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=torch.float64)
Y = torch.tensor([2, 0])


def linear() -> nn.Module:
    model = nn.Linear(3, 4, bias=False).double()
    model.weight.data.copy_(W)
    return model


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


def test_jacobian_on_the_linear_example() -> None:
    rows = 20_000
    assert Jacobian(1.0, exact=True)(linear(), X, Y, Noise(torch.arange(2))).tolist() == pytest.approx([6.5, 6.5])
    drawn = Jacobian(1.0)(linear(), X[:1].expand(rows, 3), Y[:1].expand(rows), Noise(torch.arange(rows)))
    assert drawn.mean().item() == pytest.approx(6.5, rel=0.02)
    assert drawn.std() > 0.5


@pytest.mark.parametrize("draws", [1, 3])
def test_jacobian_is_half_of_the_effective_margins(draws: int) -> None:
    model, (x, y, noise) = NETS["relu, max pool"](), images()
    emr = EffectiveMargin(1.0, draws=draws)(model, x, y, noise)
    assert torch.allclose(Jacobian(1.0, draws)(model, x, y, noise), emr / 2, rtol=1e-12)


def test_input_gradient_on_the_linear_example() -> None:
    values = InputGradient(1.0)(linear(), X, Y, Noise(torch.arange(2)))
    error = (X @ W.T).softmax(1) - F.one_hot(Y, 4)
    assert torch.allclose(values, (error @ W).square().sum(1), rtol=1e-12)


# ---- weights --------------------------------------------------------------------------------------------------------


def deep(*norms: nn.Module) -> nn.Sequential:
    """Three linear layers without biases and ReLUs between, and `norms` behind the second."""
    made: nn.Sequential = seeded(
        lambda: nn.Sequential(
            nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 5, bias=False), *norms, nn.ReLU(), nn.Linear(5, 4)
        )
    )
    return made.double()


def linear_weights(model: nn.Module) -> list[nn.Parameter]:
    return [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]


def paid(regularizer: Regularizer, model: nn.Module) -> Tensor:
    return regularizer(model, X, Y, Noise(torch.arange(2)))


def test_weight_norm_is_the_logarithm_of_the_product() -> None:
    values = paid(WeightNorm(1.0), linear())
    assert values.tolist() == pytest.approx([torch.tensor(13.0).sqrt().log().item()] * 2)
    model = deep()
    product = torch.stack([weight.norm() for weight in linear_weights(model)]).prod()
    assert torch.allclose(paid(WeightNorm(1.0), model), product.log().expand(2))
    with torch.no_grad():
        linear_weights(model)[0].mul_(1e-6)
    assert (paid(WeightNorm(1.0), model) < 0).all()


def test_sparsity_is_the_ratio_of_the_norms() -> None:
    plain, sparse = (paid(WeightNorm(1.0, sparsity=s), linear()) for s in (0.0, 0.3))
    assert (sparse - plain).tolist() == pytest.approx([0.3 * 9 / 13**0.5] * 2)


def test_weight_norms_gradient_is_the_weight_over_its_square() -> None:
    model = deep()
    paid(WeightNorm(1.0), model).mean().backward()
    for weight in linear_weights(model):
        assert weight.grad is not None
        assert torch.allclose(weight.grad, weight / weight.square().sum(), rtol=1e-12)


def test_moving_scale_between_layers_changes_nothing() -> None:
    """What the function does not see, the penalty does not: factors whose product is one. What it sees, it does."""
    regularizer, model = WeightNorm(1.0, sparsity=0.2), deep()
    values, logits = paid(regularizer, model), model(X)
    with torch.no_grad():
        for weight, factor in zip(linear_weights(model), (4.0, 0.5, 0.5), strict=True):
            weight.mul_(factor)
    assert torch.allclose(model(X), logits, rtol=1e-12)
    assert torch.allclose(paid(regularizer, model), values, rtol=1e-12)
    with torch.no_grad():
        linear_weights(model)[1].mul_(3)
    assert torch.allclose(paid(regularizer, model) - values, torch.tensor(3.0, dtype=values.dtype).log().expand(2))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm1d(5, eps=1e-30),
    "layer": lambda: nn.LayerNorm(5, eps=0),
    "group": lambda: nn.GroupNorm(1, 5, eps=0),
}


@pytest.mark.parametrize("norm", NORMS)
def test_a_scale_that_is_free_is_not_penalised(norm: str) -> None:
    """The first two layers' scales leave the function alone: their logarithms would fall without end."""
    model = deep(NORMS[norm]()).train()
    x = torch.rand(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    values, logits = paid(WeightNorm(1.0), model), model(x)
    with torch.no_grad():
        for weight in linear_weights(model)[:2]:
            weight.mul_(1e-3)
    assert torch.allclose(model(x), logits, rtol=1e-6)
    assert torch.equal(paid(WeightNorm(1.0), model), values)
    assert torch.allclose(values, linear_weights(model)[2].norm().log().expand(2))


@pytest.mark.parametrize(
    ("model", "counted"),
    [
        (lambda: mlp(), [0, 1]),
        (lambda: mlp(batch_norm=True), [1]),
        (lambda: wb.models.PreActResNet18(width=2), [-1]),
        (lambda: deep(nn.Conv1d(1, 1, 1), nn.ConvTranspose1d(1, 1, 1)), [0, 1, 2, 3, 4]),
        (lambda: deep(nn.BatchNorm1d(5), nn.Conv1d(1, 1, 1)), [2, 3]),
        (lambda: nn.Sequential(deep(), CosineHead(4, 3), nn.Linear(3, 3)), [4]),
    ],
    ids=["no norm", "norm", "residual branches", "convolutions", "convolution after a norm", "after a cosine"],
)
def test_which_layers_count(model: Callable[[], nn.Module], counted: list[int]) -> None:
    net = seeded(model)
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    weights = [layer.weight for layer in net.modules() if isinstance(layer, kinds)]
    found = WeightNorm(1.0).weights(net)
    assert [id(weight) for weight in found] == [id(weights[place]) for place in counted]


def test_layers_can_be_named() -> None:
    model = deep(nn.BatchNorm1d(5))
    values = paid(WeightNorm(1.0, layers=["0", "3"]), model)
    assert torch.allclose(values, (model[0].weight.norm() * model[3].weight.norm()).log().expand(2))
    with pytest.raises(wb.InputError, match=r"WeightNorm\(layers=\['9'\]\): the model has no layer '9' of weights"):
        paid(WeightNorm(1.0, layers=["9"]), model)
    with pytest.raises(wb.InputError, match="no layer '1' of weights"):
        paid(WeightNorm(1.0, layers=["1"]), model)
    with pytest.raises(wb.InputError, match=r"no linear or convolution layer after its last normalisation; name"):
        paid(WeightNorm(1.0), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))


def test_a_layer_of_zeros_is_finite() -> None:
    model = deep()
    nn.init.zeros_(linear_weights(model)[2])
    values = paid(WeightNorm(1.0, sparsity=0.1), model)
    values.mean().backward()
    assert torch.isfinite(values).all()
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in linear_weights(model))


# ---- where it is judged ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["adversarial", "clean"])
def test_a_regularizer_is_given_the_points_it_asks_for(where: str) -> None:
    seen: list[Tensor] = []

    class Look(Regularizer):
        def compute(self, model: nn.Module, point: Tensor, y: Tensor, noise: Noise) -> Tensor:
            seen.append(point.detach())
            return point.flatten(1).sum(1)

    Look.where = where  # type: ignore[assignment]
    batch = batch_of(tensors(), [0, 1, 2])
    module = module_of(mlp(), radius=wb.radii.Fixed(0.1), regularizers=[Look(1.0)], attack=wb.attacks.PGD(steps=2))
    module.training_step(batch, 0)
    (point,) = seen
    assert torch.equal(point, batch[0]) == (where == "clean")
    assert (point - batch[0]).abs().max() <= 0.1


def test_what_is_judged_where() -> None:
    clean = {type(row.make()).__name__ for row in ROWS.values() if row.make().where == "clean"}
    assert clean == {"LocalLinearity", "GradientAlignment", "Curvature"}


def test_the_rows_are_of_exported_classes() -> None:
    """All of ours so far have their value written out; one that is added should, but need not."""
    assert {type(row.make()).__name__ for row in ROWS.values()} <= exported("regularizers").keys()


# ---- one sample at a time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_a_value_belongs_to_its_sample(name: str) -> None:
    model, regularizer = NETS["relu, max pool"]().train(), ROWS[name].make()
    x, y, noise = images(4)
    together = regularizer(model, x, y, noise)
    assert together.shape == (4,)
    assert (together.abs() > 1e-3).all()
    for row in range(4):
        alone = regularizer(model, x[row : row + 1], y[row : row + 1], Noise(noise.index[row : row + 1], noise.seed))
        assert torch.allclose(together[row], alone, rtol=1e-10)


# ---- gradients to the parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ROWS)
def test_parameter_gradients_are_finite_differences(name: str, net: str) -> None:
    model = NETS[net]().eval()
    x, y, noise = images()
    held = ROWS[name].hold(model, x, y, noise)

    def by_hand() -> Tensor:
        return ROWS[name].value(model, x, y, held).detach().mean()

    value = ROWS[name].make()(model, x, y, noise).mean()
    assert value.item() == pytest.approx(by_hand().item(), rel=1e-10)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)
    generator = torch.Generator().manual_seed(2)
    size = 1e-5
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * size)
            sides.append(by_hand())
            with torch.no_grad():
                parameter.sub_(direction, alpha=sign * size)
        difference = (sides[0] - sides[1]) / (2 * size)
        assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ROWS)
def test_a_settled_penalty_has_the_same_gradients(name: str) -> None:
    """Also where the loss is scaled afterwards, where a parameter is frozen, and where one is never reached."""
    x, y, noise = images()
    found = []
    for settle in (False, True):
        model = NETS["relu, max pool"]().eval()  # without the draws of dropout, the two can be compared
        model[0].weight.requires_grad_(False)
        model.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
        penalty = 0.3 * ROWS[name].make()(model, x, y, noise).mean()
        total = with_gradient_taken(penalty, model.parameters()) if settle else penalty
        (7 * total + F.cross_entropy(model(x), y)).backward()
        found.append((total.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (plain, expected), (ours, gradients) = found
    assert torch.equal(ours, plain)
    assert gradients["idle"] is gradients["0.weight"] is None
    for parameter, gradient in gradients.items():
        if gradient is not None:
            assert torch.allclose(gradient, expected[parameter], rtol=1e-12, atol=1e-14), parameter
            assert gradient.abs().max() > 0


def test_settling_what_has_no_gradient_changes_nothing() -> None:
    value = torch.tensor(2.0)
    assert with_gradient_taken(value, [nn.Parameter(torch.ones(1))]) is value


# ---- manners --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_the_model_comes_back_as_it_was(name: str) -> None:
    model = NETS["relu, max pool"]().train()
    model[1].eval()  # a batch norm that its owner froze
    model[0].weight.requires_grad_(False)
    flags = [(module.training) for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y, noise = images()
    ROWS[name].make()(model, x, y, noise).mean().backward()
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
@pytest.mark.parametrize("name", ROWS)
def test_any_precision(name: str, net: str, dtype: torch.dtype) -> None:
    if ROWS[name].differences and dtype == torch.bfloat16:
        pytest.skip("a difference of two numbers of three digits")
    model = NETS[net]().to(dtype)
    x, y, noise = images()
    values = ROWS[name].make()(model, x.to(dtype), y, noise)
    assert values.dtype == dtype
    reference = ROWS[name].make()(NETS[net](), x, y, noise)
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
        (lambda: Jacobian(1.0, draws=0), "draws=0: must be at least 1"),
        (lambda: InputGradient(1.0, "triple"), "method='triple': accepted are double, finite"),  # type: ignore[arg-type]
        (lambda: InputGradient(1.0, "finite", step=0), "step=0: must be positive"),
        (lambda: LocalLinearity(1.0, eps=-0.1), "eps=-0.1: must be a finite number >= 0"),
        (lambda: LocalLinearity(1.0, steps=0), "steps=0: must be at least 1"),
        (lambda: LocalLinearity(1.0, step_size=0.0), "step_size=0.0: must be positive"),
        (lambda: LocalLinearity(1.0, gradient_weight=-1), "gradient_weight=-1: must be at least 0"),
        (lambda: LocalLinearity(1.0, box=(1.0, 0.0)), "box=\\(1.0, 0.0\\): must be"),
        (lambda: GradientAlignment(1.0, eps=-0.1), "eps=-0.1: must be a finite number >= 0"),
        (lambda: Curvature(1.0, step=-1.0), "step=-1.0: must be positive"),
        (lambda: Curvature(1.0, power=3), "power=3: accepted are 1, 2"),  # type: ignore[arg-type]
        (lambda: WeightNorm(1.0, sparsity=-0.1), "sparsity=-0.1: must be at least 0"),
    ],
)
def test_refusals(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(wb.InputError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)
