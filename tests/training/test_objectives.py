"""What the model pays: the tensors of the fact sheet, and the direction of the divergence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_tools import adam, context_of, fit, mlp, module_of, points_at, tensors

import wideberth as wb
from wideberth import losses
from wideberth.training import objectives
from wideberth.training.catalogue import exported
from wideberth.training.objectives import ALP, LBGAT, MART, TRADES, MaxMargin

CLEAN = torch.tensor([[2, 1, 0, -1], [0.5, 1.5, 0, -0.5]], dtype=torch.float64)
ADVERSARIAL = torch.tensor([[1, 1.5, 0, -1], [0, 2, 0.5, -0.5]], dtype=torch.float64)
Y = torch.tensor([0, 1])

CE_CLEAN, CE_ADVERSARIAL = (0.440190, 0.546006), (1.148017, 0.365025)
KL = (0.233300, 0.071313)
# (1, -.5, 0, 0) and (.5, -.5, -.5, 0) apart.
APART = (1.25 / 4, 0.75 / 4)


class Sure(nn.Module):
    """A teacher of which the fact sheet knows the loss: it says what is said at the adversarial points."""

    def forward(self, x: Tensor) -> Tensor:
        return ADVERSARIAL.to(x)


PAID: dict[str, tuple[objectives.Objective, tuple[float, ...], tuple[float, ...]]] = {
    # The objective on those logits: what a weighting weighs, and what is paid besides.
    "CleanCrossEntropy": (objectives.CleanCrossEntropy(), CE_CLEAN, (0, 0)),
    "AdversarialCrossEntropy": (objectives.AdversarialCrossEntropy(), CE_ADVERSARIAL, (0, 0)),
    "TRADES": (TRADES(beta=6), (6 * KL[0], 6 * KL[1]), CE_CLEAN),
    "MART": (MART(beta=5), (1.888218, 0.533198), (5 * 0.083075, 5 * 0.030004)),
    "ALP": (
        ALP(beta=0.5),
        tuple(0.5 * c + 0.5 * d for c, d in zip(CE_ADVERSARIAL, APART, strict=True)),
        (CE_CLEAN[0] / 2, CE_CLEAN[1] / 2),
    ),
    "LBGAT": (LBGAT(nn.Identity()), APART, CE_CLEAN),
    "LBGAT with beta": (LBGAT(Sure(), beta=6), (6 * KL[0], 6 * KL[1]), CE_ADVERSARIAL),
    # Both clean inputs are right by the soft margin: p_y is above 1/2.
    "MaxMargin": (
        MaxMargin(),
        (2 / 3 * CE_ADVERSARIAL[0], 2 / 3 * CE_ADVERSARIAL[1]),
        (CE_CLEAN[0] / 3, CE_CLEAN[1] / 3),
    ),
}
TOTALS = {"TRADES": 1.406938, "MART": 1.493406}


@pytest.mark.parametrize("name", PAID)
def test_totals(name: str) -> None:
    objective, weighed, besides = PAID[name]
    paid = objective.compute(context_of(nn.Identity(), CLEAN, Y), points_at(ADVERSARIAL))
    assert paid.losses.tolist() == pytest.approx(weighed, abs=5e-6)
    unweighted = torch.zeros(2) if paid.unweighted is None else paid.unweighted
    assert unweighted.tolist() == pytest.approx(besides, abs=5e-6)
    total = sum(weighed + besides) / 2
    assert paid.total(torch.ones(2)).mean().item() == pytest.approx(total, abs=5e-6)
    assert TOTALS.get(name, total) == pytest.approx(total, abs=5e-6)
    for logits, seen in ((paid.clean_logits, CLEAN), (paid.adversarial_logits, ADVERSARIAL)):
        assert logits is None or torch.equal(logits, seen)
    assert (paid.adversarial_logits is not None) == objective.adversarial


def test_every_objective_has_a_row() -> None:
    assert exported("objective").keys() <= PAID.keys()


def random_batch(rows: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Clean and adversarial logits, of which some are right, and labels."""
    generator = torch.Generator().manual_seed(1)
    clean, adversarial = 2 * torch.randn(2, rows, 4, generator=generator, dtype=torch.float64)
    return clean, adversarial, clean.argmax(1) * (torch.arange(rows) > 1)


OBJECTIVES = [objective for name, (objective, *_) in PAID.items() if name != "LBGAT with beta"]


@pytest.mark.parametrize("objective", [*OBJECTIVES, LBGAT(nn.Identity(), beta=2)], ids=lambda o: type(o).__name__)
def test_losses_belong_to_their_rows(objective: objectives.Objective) -> None:
    """A batch twice costs the same, and another order pays in that order."""
    clean, adversarial, y = random_batch()
    near = torch.tensor([True, True, False, True, True, False])

    def compute(where: Tensor) -> tuple[Tensor, Tensor]:
        step = context_of(nn.Identity(), clean[where], y[where])
        paid = objective.compute(step, points_at(adversarial[where], near[where]))
        none = torch.zeros_like(paid.losses)
        return paid.losses, none if paid.unweighted is None else paid.unweighted

    whole = compute(torch.arange(6))
    for order in (torch.tensor([3, 0, 5, 1, 4, 2]), torch.arange(12) % 6, torch.tensor([4])):
        for part, all_of_it in zip(compute(order), whole, strict=True):
            torch.testing.assert_close(part, all_of_it[order], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("scale", [1e4, 1e-30])
def test_extreme_logits_give_finite_losses_and_gradients(objective: objectives.Objective, scale: float) -> None:
    clean, adversarial, y = random_batch()
    clean, adversarial = ((scale * part).float().requires_grad_() for part in (clean, adversarial))
    paid = objective.compute(context_of(nn.Identity(), clean, y), points_at(adversarial)).total(torch.ones(6)).mean()
    assert paid.isfinite()
    for gradient in torch.autograd.grad(paid, (clean, adversarial), allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("make", [objectives.CleanCrossEntropy, objectives.AdversarialCrossEntropy, TRADES, ALP])
@pytest.mark.parametrize("loss", [losses.LabelSmoothing(0.2), losses.AdditiveMargin(0.2, 3), losses.center_distance])
def test_another_loss_in_place_of_cross_entropy(make: Any, loss: losses.Loss) -> None:
    step = context_of(nn.Identity(), CLEAN, Y)
    plain, other = (
        made.compute(step, points_at(ADVERSARIAL)).total(torch.ones(2)) for made in (make(), make(loss=loss))
    )
    parts = {"CleanCrossEntropy": (1, 0), "AdversarialCrossEntropy": (0, 1), "TRADES": (1, 0), "ALP": (0.5, 0.5)}
    clean, adversarial = parts[make.__name__]
    change = clean * (loss(CLEAN, Y) - losses.cross_entropy(CLEAN, Y))
    change = change + adversarial * (loss(ADVERSARIAL, Y) - losses.cross_entropy(ADVERSARIAL, Y))
    torch.testing.assert_close(other - plain, change)
    assert make(loss=loss).attack_loss(step) is None or make is TRADES  # the attack ascends what it did


# ---- MART -----------------------------------------------------------------------------------------------------------


def as_released(clean: Tensor, adversarial: Tensor, y: Tensor, beta: float) -> Tensor:
    """The original's arithmetic, with its guards, written out from the formula; per sample."""
    p, q = clean.softmax(1), adversarial.softmax(1)
    order = q.argsort(dim=1)
    rival = torch.where(order[:, -1] == y, order[:, -2], order[:, -1])
    boosted = F.cross_entropy(adversarial, y, reduction="none")
    boosted = boosted + F.nll_loss((1.0001 - q + 1e-12).log(), rival, reduction="none")
    drift = F.kl_div((q + 1e-12).log(), p, reduction="none").sum(1)
    return boosted + beta * drift * (1.0000001 - p.gather(1, y[:, None]).squeeze(1))


def test_mart_is_the_released_one_with_its_gradients() -> None:
    clean, adversarial, y = random_batch()
    clean.requires_grad_()
    adversarial.requires_grad_()
    ours = MART(beta=3).compute(context_of(nn.Identity(), clean, y), points_at(adversarial)).total(torch.ones(6))
    theirs = as_released(clean, adversarial, y, beta=3)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    pairs = [torch.autograd.grad(paid.sum(), (clean, adversarial)) for paid in (ours, theirs)]
    for gradient, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    # The weight learns too: with it held constant, the clean gradient is another.
    doubt = (1 - clean.softmax(1).gather(1, y[:, None]).squeeze(1)).detach()
    held = (3 * losses.kl_divergence(clean, adversarial) * doubt).sum()
    assert (torch.autograd.grad(held, clean)[0] - pairs[0][0]).abs().max() > 0.01


def test_mart_is_paid_in_float32_under_autocast() -> None:
    """In bfloat16, 1 - p of a confident rival is 0 or 0.004; here it keeps its digits."""
    model = mlp().train()
    x, y, _ = tensors().train().tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        paid = MART().compute(context_of(model, x, y), points_at(x))
        assert model(x).dtype == torch.bfloat16
    assert paid.unweighted is not None
    assert (paid.losses.dtype, paid.unweighted.dtype) == (torch.float32, torch.float32)
    sure = torch.tensor([[0.0, 12.0]]).bfloat16()
    boosted = MART().compute(context_of(nn.Identity(), sure, Y[:1]), points_at(sure)).losses
    q = torch.tensor([[0.0, 12.0]], dtype=torch.float64).softmax(1)
    assert boosted.item() == pytest.approx((-q[0, 0].log() - (1.0001 - q[0, 1]).log()).item(), rel=1e-5)


# ---- LBGAT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_lbgat_teaches_both_networks(tmp_path: Path, beta: float) -> None:
    student, teacher = mlp(), mlp(width=6)
    before = [p.detach().clone() for p in (*student.parameters(), *teacher.parameters())]
    objective = LBGAT(teacher, beta)
    run = fit(student, tensors(), tmp_path / "run", objective=objective, radius=wb.radii.Fixed(0.1), epochs=1)
    after = [*student.parameters(), *teacher.parameters()]
    assert all(not torch.equal(was, now) for was, now in zip(before, after, strict=True))
    # What the run leaves is the student alone; its checkpoint has both.
    kept = wb.load_model(str(run.path)).state_dict()
    assert kept.keys() == student.state_dict().keys()
    assert run.checkpoint is not None
    saved = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    assert torch.equal(saved["objective.teacher.head.weight"], teacher.state_dict()["head.weight"])


def test_the_pairing_reaches_the_teacher() -> None:
    teacher = nn.Linear(4, 4).double()
    paid = LBGAT(teacher).compute(context_of(nn.Identity(), CLEAN, Y), points_at(ADVERSARIAL))
    (gradient,) = torch.autograd.grad(paid.losses.sum(), teacher.weight)
    difference = teacher(CLEAN) - ADVERSARIAL
    assert torch.allclose(gradient, 2 / 4 * difference.T @ CLEAN)


@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_lbgat_resumes_as_if_it_had_not_stopped(tmp_path: Path, beta: float) -> None:
    def run(out: Path, epochs: int, **options: Any) -> list[Tensor]:
        student, teacher = mlp(batch_norm=True), mlp(width=6, batch_norm=True)
        policies = {"objective": LBGAT(teacher, beta), "radius": wb.radii.Fixed(0.1), "optimizer": adam}
        fit(student, tensors(), out, epochs=epochs, **policies, **options)
        return [value.clone() for part in (student, teacher) for value in part.state_dict().values()]

    straight = run(tmp_path / "straight", 4)
    half = run(tmp_path / "run", 2)
    resumed = run(tmp_path / "run", 4, resume=True)
    assert all(map(torch.equal, straight, resumed))
    assert not any(torch.equal(a, b) for a, b in zip(half, resumed, strict=True) if a.dim())


def test_the_teacher_is_in_train_mode_and_sees_clean_inputs_once() -> None:
    teacher = mlp(batch_norm=True)
    module = module_of(mlp(batch_norm=True), objective=LBGAT(teacher), radius=wb.radii.Fixed(0.1))
    module.training_step(tensors().train().tensors(), 0)
    norms = {name: m for name, m in module.named_modules() if isinstance(m, nn.BatchNorm1d)}
    assert {name.split(".")[0] for name in norms} == {"model", "objective"}
    for norm in norms.values():
        assert norm.num_batches_tracked == 1
    x = tensors().train().tensors()[0]
    first = next(layer for layer in teacher.modules() if isinstance(layer, nn.Linear))
    seen = next(norm for name, norm in norms.items() if name.startswith("objective")).running_mean
    assert torch.allclose(seen, 0.1 * first(x).mean(0), atol=1e-6)


def test_a_teacher_of_other_classes_is_refused() -> None:
    module = module_of(mlp(), objective=LBGAT(mlp(classes=4)), radius=wb.radii.Fixed(0.1))
    with pytest.raises(wb.InputError, match=r"teacher: returned shape \(12, 4\): must be the model's, \(12, 3\)"):
        module.training_step(tensors().train().tensors(), 0)


def test_lbgat_refuses_an_attack_that_could_not_move() -> None:
    attack = wb.attacks.PGD(start="none")
    with pytest.raises(wb.InputError, match=r'attack.start="none" with objective=LBGAT: the gradient of the KL'):
        module_of(mlp(), attack=attack, objective=LBGAT(mlp()), radius=wb.radii.Fixed(0.1))


# ---- MMA ------------------------------------------------------------------------------------------------------------


def test_max_margin_pays_by_where_the_boundary_is() -> None:
    """Right and near: at the boundary. Right and far: nothing. Wrong, also where the plurality is right: as it is."""
    clean = torch.tensor([[2.0, 0, 0], [2, 0, 0], [0, 2, 0], [0.3, 0, 0]], dtype=torch.float64)
    there = torch.tensor([[0.0, 1, 0]] * 4, dtype=torch.float64)
    y, near = torch.zeros(4, dtype=torch.int64), torch.tensor([True, False, True, True])
    paid = MaxMargin(share=0.25).compute(context_of(nn.Identity(), clean, y), points_at(there, near))
    here, boundary = losses.cross_entropy(clean, y), losses.cross_entropy(there, y)
    expected = 0.75 * torch.stack([boundary[0], torch.zeros_like(here[1]), here[2], here[3]])
    torch.testing.assert_close(paid.losses, expected)
    torch.testing.assert_close(paid.unweighted, 0.25 * here)


def test_gradient_of_max_margin() -> None:
    """(2/3) grad L_MMA + (1/3) grad CE_clean."""
    model = nn.Linear(4, 4).double()
    paid = MaxMargin().compute(context_of(model, CLEAN, Y), points_at(ADVERSARIAL, torch.tensor([True, True])))
    (gradient,) = torch.autograd.grad(paid.total(torch.ones(2)).mean(), model.weight)
    right = (losses.soft_margin_loss(model(CLEAN), Y) < 0)[:, None]
    mixed = torch.where(right, ADVERSARIAL, CLEAN)
    (margin,) = torch.autograd.grad(F.cross_entropy(model(mixed), Y), model.weight)
    (clean,) = torch.autograd.grad(F.cross_entropy(model(CLEAN), Y), model.weight)
    assert torch.allclose(gradient, 2 / 3 * margin + 1 / 3 * clean, atol=1e-12)


# ---- TRADES ---------------------------------------------------------------------------------------------------------


def test_the_divergence_is_from_the_clean_prediction() -> None:
    divergence = objectives.TRADES(beta=1).compute(context_of(nn.Identity(), CLEAN, Y), points_at(ADVERSARIAL)).losses
    assert divergence.tolist() == pytest.approx([0.233300, 0.071313], abs=1e-6)  # the other way: .236449, .058543


def test_what_the_attack_ascends() -> None:
    step = context_of(nn.Identity(), CLEAN, Y)
    assert objectives.AdversarialCrossEntropy().attack_loss(step) is None
    assert objectives.TRADES(inner="attack").attack_loss(step) is None
    for objective in (objectives.TRADES(), LBGAT(nn.Identity()), LBGAT(nn.Identity(), beta=6)):
        ascended = objective.attack_loss(step)
        assert ascended is not None
        assert ascended(ADVERSARIAL, Y).tolist() == pytest.approx([0.233300, 0.071313], abs=1e-6)
    for own in (MART(), ALP(), MaxMargin()):
        assert own.attack_loss(step) is None


def test_kl_is_ascended_from_the_prediction_in_the_attack_mode() -> None:
    """Dropout would make the constant p(x) of the attack random; in eval mode it is the model's prediction."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.9)).train()
    x = torch.rand(6, 3)
    ascended = objectives.TRADES().attack_loss(context_of(model, x, torch.zeros(6, dtype=torch.int64)))
    assert ascended is not None
    assert ascended(model[0](x), Y).abs().max() < 1e-6
    assert model.training
    assert model[1].training


def test_gradient_flows_through_both_arguments_of_the_divergence() -> None:
    clean, adversarial = CLEAN.clone().requires_grad_(), ADVERSARIAL.clone().requires_grad_()
    paid = objectives.TRADES(beta=1).compute(context_of(nn.Identity(), clean, Y), points_at(adversarial)).losses.sum()
    p, q = clean.softmax(1), adversarial.softmax(1)
    ratio = (p / q).log()
    expected = (p * (ratio - (p * ratio).sum(1, keepdim=True)), q - p)
    for gradient, formula in zip(torch.autograd.grad(paid, (clean, adversarial)), expected, strict=True):
        assert torch.allclose(gradient, formula, atol=1e-12)


class Half(wb.weightings.Weighting):
    """Counts class 0 alone, twice."""

    def compute(self, batch: Any, points: object, terms: objectives.LossTerms) -> Tensor:
        return 2.0 * (batch.y == 0)


def test_weights_multiply_the_losses() -> None:
    data = tensors()
    x, y, index = data.train().tensors()
    loss = module_of(mlp(), weighting=Half()).training_step((x, y, index), 0)
    expected = (F.cross_entropy(mlp()(x), y, reduction="none") * 2 * (y == 0)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TRADES(beta=-1), "beta=-1: must be at least 0"),
        (lambda: TRADES(inner="ce"), "inner='ce': accepted are kl, attack"),  # type: ignore[arg-type]
        (lambda: MART(beta=-1), "beta=-1: must be at least 0"),
        (lambda: ALP(beta=-1), "beta=-1: must be at least 0"),
        (lambda: LBGAT(nn.Identity(), beta=-1), "beta=-1: must be at least 0"),
        (lambda: MaxMargin(share=2), r"share=2: a share, must be in \[0, 1\]"),
    ],
)
def test_refusals(make: Callable[[], objectives.Objective], message: str) -> None:
    with pytest.raises(wb.InputError, match=message):
        make()


# ---- heads with losses of their own ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [objectives.AdversarialCrossEntropy, TRADES, ALP])
def test_hypersphere_embedding_is_a_head_and_a_loss(make: Any) -> None:
    """The attack sees scaled cosines; what is paid has the margin."""
    model = mlp(head="cosine")
    loss = losses.AdditiveMargin(margin=0.2, scale=15.0)
    module = module_of(model, objective=make(loss=loss), radius=wb.radii.Zero())
    x, y, index = tensors().train().tensors()
    paid = module.training_step((x, y, index), 0)
    cosines = model(x) / 15
    assert cosines.abs().max() <= 1 + 1e-6
    expected = F.cross_entropy(15 * (cosines - 0.2 * F.one_hot(y, 3)), y)
    assert paid.item() == pytest.approx(expected.item(), rel=1e-5)


def test_max_mahalanobis_center_loss_is_a_head_and_a_loss() -> None:
    model: Any = mlp(head="mahalanobis")
    features: list[Tensor] = []
    model.head.embed.register_forward_hook(lambda _, __, out: features.append(out))
    x, y, _ = tensors().train().tensors()
    paid = objectives.CleanCrossEntropy(losses.center_distance).compute(context_of(model, x, y), points_at(x)).losses
    expected = model.head.scale * (features[0] - model.head.centers[y]).square().sum(1)
    torch.testing.assert_close(paid, expected, rtol=1e-4, atol=1e-4)
