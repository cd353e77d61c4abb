"""The loss around a point: exact values where the loss is affine or quadratic, and what each look at it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from regularizer_tools import NETS, ROWS, images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from training_tools import seeded

from wideberth.randomness import Noise
from wideberth.training.early_gradient import with_gradient_taken
from wideberth.training.regularizers import (
    Curvature,
    GradientAlignment,
    InputGradient,
    LocalLinearity,
    Regularizer,
    WeightNorm,
)


class Loss(nn.Module):
    """A model whose cross-entropy to class 0 is a given function of the input, l(x) > 0, exactly.

    Its logits are the logarithms of probabilities, exp(-l) and the rest, which the softmax leaves as they are.
    """

    def __init__(self, weight: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(weight), function
        self.asked: list[tuple[Tensor, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append((x.detach(), self.weight.requires_grad))
        loss = self.function(x, self.weight)
        return torch.stack([-loss, torch.log(-torch.expm1(-loss))], 1)


def of(weight: list[Any]) -> Tensor:
    return torch.tensor(weight, dtype=torch.float64)


def affine(slope: list[float]) -> Loss:
    return Loss(of(slope), lambda x, w: x @ w + 2)


def quadratic(matrix: list[list[float]]) -> Loss:
    """Half of x^T H x, plus 1."""
    return Loss(of(matrix), lambda x, w: ((x @ w) * x).sum(1) / 2 + 1)


X = of([[0.5, 0.4], [0.3, 0.7], [0.6, 0.6]])
H = [[2.0, 0.5], [0.5, 1.0]]


def of_class_0(regularizer: Regularizer, model: nn.Module, x: Tensor = X) -> Tensor:
    return regularizer(model, x, torch.zeros(len(x), dtype=torch.int64), Noise(torch.arange(len(x)), 4))


def test_the_loss_is_the_given_one() -> None:
    expected = ((X @ of(H)) * X).sum(1) / 2 + 1
    losses = F.cross_entropy(quadratic(H)(X), torch.zeros(3, dtype=torch.int64), reduction="none")
    assert torch.allclose(losses, expected, rtol=1e-12)


# ---- finite differences ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1e-3, 0.01, 1.0])
def test_a_finite_difference_of_an_affine_loss_is_exact(step: float) -> None:
    model = affine([0.6, -0.8])
    values = of_class_0(InputGradient(1.0, "finite", step), model)
    assert values.tolist() == pytest.approx([1.0] * 3, rel=1e-9)
    (gradient,) = torch.autograd.grad(values.mean(), model.weight)
    assert gradient.tolist() == pytest.approx([1.2, -1.6], rel=1e-9)  # of |w|^2


@pytest.mark.parametrize("step", [0.01, 0.3])
def test_a_finite_difference_of_a_quadratic_loss_is_half_a_step_off(step: float) -> None:
    """Not the central difference, and along the unit gradient: (|g| + h/2 v.Hv)^2."""
    values = of_class_0(InputGradient(1.0, "finite", step), quadratic(H))
    gradient = X @ of(H)
    direction = F.normalize(gradient)
    expected = (gradient.norm(dim=1) + step / 2 * ((direction @ of(H)) * direction).sum(1)).square()
    assert torch.allclose(values, expected, rtol=1e-9)


@pytest.mark.parametrize("net", NETS)
def test_finite_differences_approach_the_second_derivative(net: str) -> None:
    model, (x, y, noise) = NETS[net]().eval(), images()
    parameters = list(model.parameters())
    off = []
    expected = InputGradient(1.0)(model, x, y, noise).mean()
    exact = torch.autograd.grad(expected, parameters, materialize_grads=True)
    for step in (1e-3, 1e-5):
        value = InputGradient(1.0, "finite", step)(model, x, y, noise).mean()
        found = torch.autograd.grad(value, parameters, materialize_grads=True)
        differences = [(value - expected).abs() / expected]
        differences += [(a - b).norm() / b.norm() for a, b in zip(found, exact, strict=True) if b.norm() > 0]
        off.append(max(differences).item())
    assert off[1] < 1e-3
    assert off[1] < off[0] / 10


def test_a_flat_loss_has_no_direction() -> None:
    model = affine([0.0, 0.0])
    for regularizer in (InputGradient(1.0, "finite"), Curvature(1.0), Curvature(1.0, power=1), LocalLinearity(1.0)):
        values = of_class_0(regularizer, model)
        assert values.tolist() == pytest.approx([0] * 3, abs=1e-12)
        (gradient,) = torch.autograd.grad(values.mean(), model.weight, materialize_grads=True)
        assert torch.isfinite(gradient).all()


# ---- local linearity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 2.0])
def test_an_affine_loss_has_no_gap(share: float) -> None:
    """What is left is the tangent's own rise at the point found."""
    model = affine([0.6, -0.8])
    values = of_class_0(LocalLinearity(1.0, 0.1, gradient_weight=share), model)
    delta = model.asked[-1][0] - X
    assert delta.abs().min() > 1e-3
    assert values.tolist() == pytest.approx((share * (delta @ of([0.6, -0.8])).abs()).tolist(), abs=1e-12)


@pytest.mark.parametrize("eps", [0.01, 0.1])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_quadratic_loss_in_one_dimension(eps: float, share: float) -> None:
    """The gap is q/2 d^2, largest at both ends of the ball; the tangent rises by q x d."""
    x = of([[0.2], [0.5], [0.8]])
    values = of_class_0(LocalLinearity(1.0, eps, gradient_weight=share), quadratic([[3.0]]), x)
    expected = 1.5 * eps**2 + share * 3 * x[:, 0] * eps
    assert values.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_search_finds_the_corner_of_a_quadratic(sign: int) -> None:
    """Above the tangent or below it: the gap of x^T Q x / 2, Q diagonal, is largest where every entry is at eps."""
    curved = [4.0, 0.5, 1.0, 2.0, 0.1]
    model = Loss(of(curved), lambda x, w: 9 + sign * (x.square() @ w) / 2)
    x = torch.full((6, 5), 0.5, dtype=torch.float64) + 0.1 * torch.arange(6)[:, None] / 6
    values = of_class_0(LocalLinearity(1.0, 0.05, gradient_weight=0.0), model, x)
    assert values.tolist() == pytest.approx([sum(curved) / 2 * 0.05**2] * 6, rel=1e-6)


def test_the_gap_of_a_mixed_loss_is_at_least_that_of_random_points() -> None:
    model, (x, y, noise) = NETS["tanh, adaptive pool"]().eval(), images(8)
    found = LocalLinearity(1.0, 0.1, gradient_weight=0.0)(model, x, y, noise)
    once = LocalLinearity(1.0, 0.1, steps=1, step_size=1e-9, gradient_weight=0.0)(model, x, y, noise)
    assert (found > once).all()
    assert found.mean() > 3 * once.mean()


def test_the_search_stays_in_ball_and_box_and_freezes_the_parameters() -> None:
    x = of([[0.02, 0.97], [0.5, 0.5], [1.0, 0.0]])
    model = quadratic(H)
    of_class_0(LocalLinearity(1.0, 0.1, steps=4), model, x)
    points, taking = zip(*model.asked, strict=True)
    assert torch.equal(points[0], x)
    for point in points[1:]:
        assert (point - x).abs().max() <= 0.1
        assert 0 <= point.min() <= point.max() <= 1
    assert taking == (True, *[False] * 4, True)
    assert model.weight.requires_grad


def test_the_first_step_has_its_full_size() -> None:
    """Adam's moments are corrected for their beginning at zero: a step of `step_size` radii in every entry."""
    model = quadratic([[3.0]])
    of_class_0(LocalLinearity(1.0, 0.1, steps=1, step_size=0.01), model, of([[0.5], [0.4]]))
    start, end = (point for point, _ in model.asked[1:])
    assert (end - start).abs().flatten().tolist() == pytest.approx([0.001] * 2, rel=1e-6)


def test_another_box() -> None:
    model = quadratic([[1.0]])
    of_class_0(LocalLinearity(1.0, 0.5, steps=3, box=(-1.0, 0.1)), model, of([[0.0]]))
    assert all(-0.5 <= point.item() <= 0.1 for point, _ in model.asked)
    assert min(point.item() for point, _ in model.asked) == pytest.approx(-0.5)


def test_the_start_belongs_to_the_row() -> None:
    model, (x, y, noise) = NETS["relu, max pool"]().eval(), images()
    regularizer = ROWS["linearity"].make()
    same = regularizer(model, x, y, noise)
    assert torch.equal(same, regularizer(model, x, y, noise))
    assert not torch.allclose(same, regularizer(model, x, y, Noise(noise.index, noise.seed + 1)))


# ---- gradient alignment ---------------------------------------------------------------------------------------------


def test_alignment_of_a_quadratic_is_the_angle_its_matrix_turns_the_gradient_by() -> None:
    noise = Noise(torch.arange(len(X)), 4)
    delta = 0.3 * (2 * noise.fold("alignment").uniform((2,), torch.float64) - 1)
    expected = 1 - F.cosine_similarity(X @ of(H), (X + delta) @ of(H))
    assert torch.allclose(of_class_0(GradientAlignment(1.0, 0.3), quadratic(H)), expected, rtol=1e-9, atol=1e-12)
    assert expected.max() > 1e-3


def test_alignment_of_samples_far_beyond_what_float32_knows_of_their_cross_entropy() -> None:
    """Logits in the hundreds: the loss and its slope are 0 in float32, and where the slope points is still known."""
    x, y, noise = images(6)
    model = NETS["tanh, adaptive pool"]().eval()
    model[8].weight.data.mul_(100)
    y = model(x).argmax(1)
    assert (F.cross_entropy(model(x).float(), y, reduction="none") == 0).sum() >= 3
    exact = GradientAlignment(1.0, 0.2)(model, x, y, noise)
    exact_gradient = torch.autograd.grad(exact.mean(), model[0].weight)[0]
    found = GradientAlignment(1.0, 0.2)(model.float(), x.float(), y, noise)
    assert torch.allclose(found.double(), exact, atol=1e-5)
    gradient = torch.autograd.grad(found.mean(), model[0].weight)[0]
    assert torch.allclose(gradient.double(), exact_gradient, rtol=1e-3, atol=1e-4 * float(exact_gradient.abs().max()))


def test_gradients_of_an_affine_loss_agree_and_a_flat_one_pays_nothing() -> None:
    model = affine([0.6, -0.8])
    assert of_class_0(GradientAlignment(1.0, 0.3), model).tolist() == pytest.approx([0] * 3, abs=1e-12)
    flat = affine([0.0, 0.0])
    values = of_class_0(GradientAlignment(1.0, 0.3), flat)
    assert values.tolist() == [0, 0, 0]
    (gradient,) = torch.autograd.grad(values.mean(), flat.weight, materialize_grads=True)
    assert gradient.tolist() == [0, 0]


# ---- curvature ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0.05, 0.6])
def test_curvature_of_a_quadratic_is_exact(step: float) -> None:
    z = step * F.normalize((X @ of(H)).sign())
    squared = (z @ of(H)).square().sum(1)
    model = quadratic(H)
    assert torch.allclose(of_class_0(Curvature(1.0, step), model), squared, rtol=1e-9)
    values = of_class_0(Curvature(1.0, step, power=1), model)
    assert torch.allclose(values, squared.sqrt(), rtol=1e-9)
    (gradient,) = torch.autograd.grad(values.sum(), model.weight)
    weight = of(H).requires_grad_()
    symmetric = (weight + weight.T) / 2  # the Hessian of the loss, whatever the weight
    (expected,) = torch.autograd.grad((z @ symmetric).norm(dim=1).sum(), weight)
    assert torch.allclose(gradient, expected, rtol=1e-9)


@pytest.mark.parametrize("power", [1, 2])
def test_an_affine_loss_does_not_bend(power: Any) -> None:
    model = affine([0.6, -0.8])
    values = of_class_0(Curvature(1.0, 0.3, power), model)
    assert values.tolist() == pytest.approx([0] * 3, abs=1e-12)
    (gradient,) = torch.autograd.grad(values.mean(), model.weight, materialize_grads=True)
    assert torch.isfinite(gradient).all()


def test_the_derivative_at_no_curvature_is_zero() -> None:
    """Two pieces of a ReLU net that lie on one: the change is zero bit for bit, and its norm has a corner there."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 2)).double())
    nn.init.zeros_(model[0].weight)
    values = of_class_0(Curvature(1.0, power=1), model, torch.zeros(2, 3, dtype=torch.float64))
    assert values.tolist() == [0, 0]
    for gradient in torch.autograd.grad(values.mean(), list(model.parameters()), materialize_grads=True):
        assert torch.equal(gradient, torch.zeros_like(gradient))


# ---- what it costs --------------------------------------------------------------------------------------------------


class Passes(TorchDispatchMode):
    """Counts what goes through the layer of 5 channels: convolutions, input gradients and weight gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = self.inputs = self.weights = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.ops.aten.convolution.default and args[1].shape[0] == 5:
            self.convolutions += 1
        if func == torch.ops.aten.convolution_backward.default and args[2].shape[0] == 5:
            self.inputs += args[-1][0]
            self.weights += args[-1][1]
        return func(*args, **(kwargs or {}))


COSTS: dict[str, tuple[Callable[[], Regularizer], tuple[int, int, int], tuple[int, int, int]]] = {
    # A forward, an input gradient; then a forward's worth and weight gradients for the second derivative, and a
    # backward, as the loss gradient depends on the logits.
    "InputGradient": (lambda: InputGradient(1.0), (1, 1, 0), (1, 1, 2)),
    "InputGradient finite": (lambda: InputGradient(1.0, "finite"), (2, 1, 0), (0, 2, 2)),
    "LocalLinearity": (lambda: LocalLinearity(1.0), (1 + 10 + 1, 1 + 10, 0), (1, 2, 3)),
    "GradientAlignment": (lambda: GradientAlignment(1.0), (2, 2, 0), (1, 1, 2)),
    "Curvature": (lambda: Curvature(1.0), (2, 2, 0), (2, 2, 4)),
    "EffectiveMargin": (ROWS["softmax"].make, (1, 1, 0), (1, 0, 1)),
    "Jacobian": (ROWS["Jacobian"].make, (1, 1, 0), (1, 0, 1)),
    "WeightNorm": (lambda: WeightNorm(1.0), (0, 0, 0), (0, 0, 0)),
}


@pytest.mark.parametrize("name", COSTS)
def test_passes_through_the_model(name: str) -> None:
    """Exactly those on its card in docs/methods.md: in the penalty, and in its gradient."""
    make, penalty, gradient = COSTS[name]
    model, (x, y, noise) = NETS["relu, max pool"]().train(), images()
    with Passes() as asked:
        value = make()(model, x, y, noise).mean()
    assert (asked.convolutions, asked.inputs, asked.weights) == penalty
    with Passes() as paid:
        with_gradient_taken(value, model.parameters())
    assert (paid.convolutions, paid.inputs, paid.weights) == gradient


@pytest.mark.parametrize(
    ("name", "prepared"),
    [
        ("input gradient", [True]),
        ("input gradient, finite", [False, False]),
        ("curvature", [True, True]),
        ("alignment", [False, True]),
        ("linearity", [True, False, False, False, False]),
    ],
)
def test_only_what_is_differentiated_twice_is_prepared_for_it(name: str, prepared: list[bool]) -> None:
    model, (x, y, noise) = NETS["relu, max pool"](), images()
    seen: list[bool] = []
    model[0].register_forward_hook(lambda module, given, output: seen.append("_Convolution" in output.grad_fn.name()))
    ROWS[name].make()(model, x, y, noise)
    assert seen == prepared


def test_every_regularizer_has_a_cost() -> None:
    assert {type(make()) for make, _, _ in COSTS.values()} == {type(row.make()) for row in ROWS.values()}
