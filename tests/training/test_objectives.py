"""What the model pays: the tensors of the fact sheet, and the direction of the divergence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_tools import defined_in, mlp, module_of, step_of, tensors

import wideberth as wb
from wideberth.training import objectives, weightings

CLEAN = torch.tensor([[2, 1, 0, -1], [0.5, 1.5, 0, -0.5]], dtype=torch.float64)
ADVERSARIAL = torch.tensor([[1, 1.5, 0, -1], [0, 2, 0.5, -0.5]], dtype=torch.float64)
Y = torch.tensor([0, 1])

PAID = {  # total of the objective on those logits
    "CleanCrossEntropy": (objectives.CleanCrossEntropy(), (0.440190 + 0.546006) / 2),
    "AdversarialCrossEntropy": (objectives.AdversarialCrossEntropy(), (1.148017 + 0.365025) / 2),
    "TRADES": (objectives.TRADES(beta=6), 1.406938),
}


@pytest.mark.parametrize("name", PAID)
def test_totals(name: str) -> None:
    objective, total = PAID[name]
    paid = objective.pay(step_of(nn.Identity(), CLEAN, Y), ADVERSARIAL)
    assert paid.losses.shape == (2,)
    assert paid.total(torch.ones(2)).mean().item() == pytest.approx(total, abs=1e-6)
    for logits, seen in ((paid.clean_logits, CLEAN), (paid.adversarial_logits, ADVERSARIAL)):
        assert logits is None or torch.equal(logits, seen)
    assert (paid.adversarial_logits is not None) == objective.adversarial


def test_every_objective_has_a_row() -> None:
    assert defined_in(objectives, objectives.Objective) == PAID.keys()


def test_the_divergence_is_from_the_clean_prediction() -> None:
    divergence = objectives.TRADES(beta=1).pay(step_of(nn.Identity(), CLEAN, Y), ADVERSARIAL).losses
    assert divergence.tolist() == pytest.approx([0.233300, 0.071313], abs=1e-6)  # the other way: .236449, .058543


def test_what_the_attack_ascends() -> None:
    step = step_of(nn.Identity(), CLEAN, Y)
    assert objectives.AdversarialCrossEntropy().attack_loss(step) is None
    assert objectives.TRADES(inner="attack").attack_loss(step) is None
    ascended = objectives.TRADES().attack_loss(step)
    assert ascended is not None
    assert ascended(ADVERSARIAL, Y).tolist() == pytest.approx([0.233300, 0.071313], abs=1e-6)


def test_kl_is_ascended_from_the_prediction_in_the_attack_mode() -> None:
    """Dropout would make the constant p(x) of the attack random; in eval mode it is the model's prediction."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.9)).train()
    x = torch.rand(6, 3)
    ascended = objectives.TRADES().attack_loss(step_of(model, x, torch.zeros(6, dtype=torch.int64)))
    assert ascended is not None
    assert ascended(model[0](x), Y).abs().max() < 1e-6
    assert model.training
    assert model[1].training


def test_gradient_flows_through_both_arguments_of_the_divergence() -> None:
    clean, adversarial = CLEAN.clone().requires_grad_(), ADVERSARIAL.clone().requires_grad_()
    paid = objectives.TRADES(beta=1).pay(step_of(nn.Identity(), clean, Y), adversarial).losses.sum()
    p, q = clean.softmax(1), adversarial.softmax(1)
    ratio = (p / q).log()
    expected = (p * (ratio - (p * ratio).sum(1, keepdim=True)), q - p)
    for gradient, formula in zip(torch.autograd.grad(paid, (clean, adversarial)), expected, strict=True):
        assert torch.allclose(gradient, formula, atol=1e-12)


def test_uniform_weights() -> None:
    assert defined_in(weightings, weightings.Weighting) == {"Uniform"}
    payment = objectives.Payment(torch.tensor([3.0, 4.0], dtype=torch.float64))
    weights = weightings.Uniform().weigh(step_of(nn.Identity(), CLEAN, Y), payment)
    assert torch.equal(weights, torch.ones(2, dtype=torch.float64))


class Half(wb.weightings.Weighting):
    """Counts class 0 alone, twice."""

    def weigh(self, step: object, payment: objectives.Payment) -> Tensor:
        return 2.0 * (step.y == 0)  # type: ignore[attr-defined]


def test_weights_multiply_the_losses() -> None:
    data = tensors()
    x, y, index = data.train().tensors()
    loss = module_of(mlp(), weighting=Half()).training_step((x, y, index), 0)
    expected = (F.cross_entropy(mlp()(x), y, reduction="none") * 2 * (y == 0)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beta": -1}, "beta=-1: must be at least 0"), ({"inner": "ce"}, "inner='ce': accepted are kl, attack")],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(wb.InputError, match=message):
        objectives.TRADES(**options)  # type: ignore[arg-type]
