"""How much each sample counts: the fact sheet's numbers, and who may weigh what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_tools import batch_of, context_of, fit, halves, mlp, module_of, points_at, tensors

import wideberth as wb
from wideberth.training import objectives
from wideberth.training.batch import TrainingPoints
from wideberth.training.catalogue import exported
from wideberth.training.objectives import LBGAT, MART, TRADES, AdversarialCrossEntropy, CleanCrossEntropy, LossTerms
from wideberth.training.radii import Fixed, InstanceAdaptive, Zero
from wideberth.training.weightings import GAIRAT, MAIL, Uniform, Weighting

CLEAN = torch.tensor([[2, 1, 0, -1], [0.5, 1.5, 0, -0.5]], dtype=torch.float64)
ADVERSARIAL = torch.tensor([[1, 1.5, 0, -1], [0, 2, 0.5, -0.5]], dtype=torch.float64)
Y = torch.tensor([0, 1])

REFUSED: dict[str, list[tuple[Any, str]]] = {
    "Uniform": [],
    "MAIL": [
        (lambda: MAIL(slope=-1), "slope=-1: must be at least 0"),
        (lambda: MAIL(start=-1), "start=-1: must be at least 0"),
        (lambda: MAIL(form="mean"), "form='mean': accepted are released, paper"),  # type: ignore[arg-type]
    ],
    "GAIRAT": [(lambda: GAIRAT(start=-1), "start=-1: must be at least 0")],
}


def test_every_weighting_has_a_row() -> None:
    assert exported("weighting").keys() == REFUSED.keys()


@pytest.mark.parametrize(("make", "message"), [case for cases in REFUSED.values() for case in cases])
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(wb.InputError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)


def paid(objective: objectives.Objective, **options: Any) -> tuple[Any, TrainingPoints, LossTerms]:
    """The batch, its points and the objective's terms there, on the fact sheet's logits."""
    batch, points = context_of(nn.Identity(), CLEAN, Y, **options), points_at(ADVERSARIAL)
    return batch, points, objective.compute(batch, points)


def test_uniform() -> None:
    step, points, terms = paid(TRADES())
    assert torch.equal(Uniform().compute(step, points, terms), torch.ones(2, dtype=torch.float64))


# ---- MAIL -----------------------------------------------------------------------------------------------------------

MAIL_ON_THE_SHEET = [  # slope, bias, weights, MAIL-AT, MAIL-TRADES with beta 5
    (10, -0.5, [0.150372, 9.1948e-5], 0.086332, 0.580819),
    (2, 0, [1.804439, 0.761328], 1.174715, 1.681269),
    (30, -0.07, [2.949851, 3.458e-8], 1.693239, 2.213599),
    (5, 0.05, [2.346881, 0.239099], 1.390768, 1.904544),
]


@pytest.mark.parametrize(("slope", "bias", "weights", "at", "trades"), MAIL_ON_THE_SHEET)
def test_mail(slope: float, bias: float, weights: list[float], at: float, trades: float) -> None:
    mail = MAIL(slope, bias, start=0)
    for objective, total in ((AdversarialCrossEntropy(), at), (TRADES(beta=5), trades)):
        step, points, terms = paid(objective)
        found = mail.compute(step, points, terms)
        assert found.tolist() == pytest.approx(weights, rel=3e-4, abs=5e-7)
        assert terms.total(found).mean().item() == pytest.approx(total, abs=1e-6)


def test_mail_mart_weighs_the_boosted_cross_entropy_alone() -> None:
    step, points, terms = paid(MART(beta=5))
    weights = MAIL(2, 0, start=0).compute(step, points, terms)
    expected = (1.804439 * 1.888218 + 0.761328 * 0.533198) / 2 + 5 * (0.083075 + 0.030004) / 2
    assert terms.total(weights).mean().item() == pytest.approx(expected, abs=3e-6)


def test_the_papers_form_has_mean_one() -> None:
    step, points, terms = paid(AdversarialCrossEntropy())
    released, paper = (MAIL(5, 0.05, start=0, form=form).compute(step, points, terms) for form in ("released", "paper"))  # type: ignore[arg-type]
    assert paper.mean().item() == pytest.approx(1)
    assert (paper / released).tolist() == pytest.approx([(1 / released.mean()).item()] * 2)
    # So far from the boundary that every sigmoid is 0 in float32.
    far = LossTerms(torch.ones(2), adversarial_logits=torch.tensor([[9.0, -9.0], [-9.0, 9.0]]))
    assert MAIL(100, -0.5, start=0, form="paper").compute(step, points, far).tolist() == pytest.approx([1, 1])


def test_more_wrong_weighs_more() -> None:
    logits = torch.linspace(-3, 3, 9)[:, None] * torch.tensor([1.0, -1.0])
    step = context_of(nn.Identity(), logits, torch.zeros(9, dtype=torch.int64))
    weights = MAIL(start=0).compute(step, points_at(logits), LossTerms(torch.ones(9), adversarial_logits=logits))
    assert (weights.diff() < 0).all()
    assert (weights <= 3).all()


# ---- GAIRAT ---------------------------------------------------------------------------------------------------------


def attacked(steps_survived: list[int], iterates: int, epoch: int = 60) -> tuple[Any, TrainingPoints, LossTerms]:
    """A batch, the result of its attack, and losses of 1."""
    count = len(steps_survived)
    step = context_of(nn.Identity(), torch.zeros(count, 2), torch.zeros(count, dtype=torch.int64), epoch=epoch)
    found = step.attack(torch.zeros(count))
    held = torch.tensor(steps_survived)
    found = replace(found, steps_survived=held, num_iterates=torch.full_like(held, iterates))
    return step, TrainingPoints(found.x, found), LossTerms(torch.ones(count, dtype=torch.float64))


def test_gairat() -> None:
    weights = GAIRAT().compute(*attacked([0, 3, 5, 10], 10))
    # The last to the digits that 1 + tanh leaves in float32, in which the sheet has it; here it is sigmoid(-12).
    assert weights.tolist() == pytest.approx([1.999659, 1.761884, 0.238445, 1.228e-5], rel=1e-3, abs=1e-6)
    assert weights.tolist()[3] == pytest.approx(4 * 6.144175e-6 / 1.999671, rel=1e-5)
    again = GAIRAT().compute(*attacked([0, 6, 10, 20], 20))  # a fraction of the steps, however many there are
    assert torch.equal(again, weights)


@pytest.mark.parametrize("shift", [-100.0, -1.0, 0.0, 100.0, float("inf")])
def test_gairat_of_any_shift_has_mean_one(shift: float) -> None:
    weights = GAIRAT(shift).compute(*attacked([0, 1, 2, 3], 3))
    assert weights.mean().item() == pytest.approx(1)
    assert (weights.diff() <= 0).all()
    if shift >= 100:
        assert weights.tolist() == [1.0] * 4


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("keep", ["last", "worst", "first_flip"])
def test_all_iterates_that_the_attack_steps_from_are_counted(keep: Any, check: bool) -> None:
    """The start counts, and what the last step leads to does not; rows at 0.05, 0.15, ... of a boundary, in strides."""
    distance = torch.tensor([-0.05, 0.05, 0.15, 0.25, 0.35, 0.45], dtype=torch.float64)
    x, y = 0.5 + distance[:, None], torch.zeros(6, dtype=torch.int64)
    attack = wb.attacks.PGD(steps=4, step_size=0.1, start="none", keep=keep)
    found = context_of(halves(), x, y, attack=attack).attack(
        torch.full((6,), 0.45, dtype=torch.float64), check_success=check
    )
    assert found.steps_survived.tolist() == [0, 1, 2, 3, 4, 4]
    assert found.num_iterates.tolist() == [4] * 6


def test_gairat_in_the_loop_makes_no_forward_of_its_own() -> None:
    class Counting(wb.models.MLP):
        forwards = 0

        def forward(self, x: Tensor) -> Tensor:
            self.forwards += 1
            return super().forward(x)

    counts = []
    for weighting in (Uniform(), GAIRAT(start=0), MAIL(start=0)):
        model = Counting((5,), 3, (8,))
        module = module_of(model, radius=Fixed(0.3), weighting=weighting, attack=wb.attacks.PGD(steps=5))
        module.training_step(batch_of(tensors(), [0, 1, 2, 3]), 0)
        counts.append(model.forwards)
    assert counts == [6, 6, 6]


# ---- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", [MAIL(start=3), MAIL(start=3, form="paper"), GAIRAT(start=3)])
def test_weights_begin_at_their_epoch(weighting: Weighting) -> None:
    for epoch, uniform in ((0, True), (2, True), (3, False), (9, False)):
        step, points, _ = attacked([0, 1, 2, 2], 2, epoch)
        logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        weights = weighting.compute(step, points, LossTerms(torch.ones(4), adversarial_logits=logits))
        assert (weights.tolist() == [1.0] * 4) is uniform


@pytest.mark.parametrize("weighting", [Uniform(), MAIL(start=0), MAIL(start=0, form="paper"), GAIRAT(start=0)], ids=str)
def test_weights_carry_no_graph_and_go_with_their_rows(weighting: Weighting) -> None:
    step, points, _ = attacked([0, 4, 2, 1], 4)
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = weighting.compute(step, points, LossTerms(logits.sum(1), adversarial_logits=logits))
    assert not weights.requires_grad
    assert weights.shape == (4,)
    order = torch.tensor([2, 0, 3, 1])
    assert points.found is not None
    found = replace(points.found, steps_survived=points.found.steps_survived[order])
    again = weighting.compute(
        replace(step, y=step.y[order]),
        TrainingPoints(found.x, found),
        LossTerms(logits[order].sum(1), adversarial_logits=logits[order]),
    )
    torch.testing.assert_close(again, weights[order])


@pytest.mark.parametrize(
    ("weighting", "objective", "radius", "message"),
    [
        (MAIL(), CleanCrossEntropy(), Zero(), "weighting=MAIL with objective=CleanCrossEntropy: .*never looks at"),
        (GAIRAT(), CleanCrossEntropy(), Zero(), "weighting=GAIRAT with objective=CleanCrossEntropy: .*never looks at"),
        (GAIRAT(), AdversarialCrossEntropy(), Zero(), "weighting=GAIRAT with radius=Zero: .*none is made"),
    ],
)
def test_what_cannot_be_weighed_is_refused(weighting: Any, objective: Any, radius: Any, message: str) -> None:
    with pytest.raises(wb.InputError, match=message) as refusal:
        module_of(mlp(), weighting=weighting, objective=objective, radius=radius)
    assert "\n" not in str(refusal.value)


def test_an_objective_that_hides_its_logits_cannot_be_weighed_by_them() -> None:
    class Hiding(AdversarialCrossEntropy):
        def compute(self, batch: Any, points: Any) -> LossTerms:
            return LossTerms(super().compute(batch, points).losses)

    batch = batch_of(tensors(), [0, 1])
    with pytest.raises(wb.InputError, match="weighting=MAIL: the objective returned no adversarial logits"):
        module_of(mlp(), weighting=MAIL(), objective=Hiding(), radius=Fixed(0.1)).training_step(batch, 0)
    step, points, terms = attacked([0], 1)
    with pytest.raises(wb.InputError, match="weighting=GAIRAT: no attack was made"):
        GAIRAT().compute(step, points_at(points.x), terms)


OBJECTIVES = {
    "at": AdversarialCrossEntropy,
    "trades": TRADES,
    "mart": MART,
    "alp": objectives.ALP,
    "lbgat": lambda: LBGAT(mlp(width=4)),
    "mma": objectives.MaxMargin,
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("weighting", [MAIL(start=0), GAIRAT(start=0)], ids=str)
@pytest.mark.parametrize("radius", [lambda: Fixed(0.1), lambda: InstanceAdaptive(0.1, warmup=0)])
def test_every_combination_trains(weighting: Weighting, objective: str, radius: Any) -> None:
    module = module_of(mlp(), weighting=weighting, objective=OBJECTIVES[objective](), radius=radius())
    loss = module.training_step(batch_of(tensors(), [0, 1, 2, 3, 4]), 0)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_a_run_records_the_mean_weight(tmp_path: Any) -> None:
    run = fit(mlp(), tensors(), tmp_path / "mail", weighting=MAIL(slope=0, start=1), radius=Fixed(0.1))
    assert run.metrics is not None
    assert run.metrics["weight_mean"].tolist() == pytest.approx([1.0, 1.5])  # 1 before it starts, then 3 sigmoid(0)
    plain = fit(mlp(), tensors(), tmp_path / "plain", radius=Fixed(0.1))
    assert plain.metrics is not None
    assert "weight_mean" not in plain.metrics
