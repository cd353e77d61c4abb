"""What every attack promises, checked for every row of one table; a new attack joins by adding a row."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from attack_oracles import Counting, linear, network, predicted
from exported import exported, norms_of, small
from torch import Tensor, nn

from wideberth import losses
from wideberth.attacks import (
    APGD,
    DDN,
    FAB,
    FGSM,
    FMN,
    MIFGSM,
    PGD,
    PMA,
    Adversarial,
    Attack,
    CarliniWagner,
    DeepFool,
    EarlyStoppedPGD,
    RandomNoise,
    ScaledStep,
    Square,
)
from wideberth.checks import Box, Norm

BATCH, FEATURES, CLASSES = 10, 6, 4
SHAPES = ((6,), (2, 3), (1, 2, 3))
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
RADIUS: dict[Norm, float] = {"linf": 0.14, "l2": 0.28, "l1": 0.4}
"""Radii at which every row of the table breaks some samples and not others."""


def logit_of_label(logits: Tensor, y: Tensor) -> Tensor:
    """A loss of the user's own."""
    return -logits.gather(1, y[:, None]).squeeze(1)


@dataclass(frozen=True)
class Row:
    """An attack in the table.

    Attributes:
        name: of the test.
        attack: with its hyper-parameters; norm and box are set by the tests.
        random: whether the seed changes what it finds; None: not known.
        fixed_cost: forwards and backwards per sample, or None where they depend on what is broken when.
        norms: those that it is defined for.
        classes: how many the model must have at least.
        even: whether all unbroken rows are asked about equally often; a row may be done earlier than others.
        shaped: whether the layout of the input is part of the method, so that an image is not its flattened vector.
    """

    name: str
    attack: Attack
    random: bool | None
    fixed_cost: int | None = None
    norms: tuple[Norm, ...] = ("linf", "l2", "l1")
    classes: int = 2
    even: bool = True
    shaped: bool = False

    @property
    def knows_success(self) -> bool:
        """Whether a call tells success without `check_success`."""
        return self.attack.knows_success or self.attack.restarts > 1


ROWS = (
    Row("fgsm", FGSM(), random=False, fixed_cost=2),
    Row("fgsm-random", FGSM(start="uniform", step_size=ScaledStep(1.25)), random=True, fixed_cost=2),
    Row("pgd", PGD(steps=3), random=True, fixed_cost=6),
    Row(
        "pgd-gaussian-worst-margin",
        PGD(steps=3, start="gaussian", keep="worst", loss=losses.margin_loss),
        random=True,
        fixed_cost=7,
    ),
    Row(
        "pgd-none-first-flip-absolute-step",
        PGD(steps=3, start="none", keep="first_flip", step_size=0.1),
        random=False,
        fixed_cost=7,
    ),
    Row(
        "pgd-user-loss-floor",
        PGD(steps=3, loss=logit_of_label, step_size=ScaledStep(2, floor=0.05)),
        random=True,
        fixed_cost=6,
    ),
    Row("pgd-restarts", PGD(steps=2, restarts=3), random=True, fixed_cost=None),
    Row(
        "pgd-restarts-worst-dlr",
        PGD(steps=2, restarts=2, keep="worst", loss=losses.dlr_loss),
        random=True,
        fixed_cost=None,
        classes=3,
    ),
    Row("pma", PMA(steps=3, diverse=0), random=False, fixed_cost=8),
    Row("pma-diverse", PMA(steps=3, diverse=2, restarts=2), random=True, fixed_cost=None),
    Row("fab", FAB(steps=20), random=False, fixed_cost=84),
    # Restarts begin at random points, but in this setting the closest mistake is found without them: see test_fab.
    Row("fab-restarts", FAB(steps=10, restarts=3), random=False, fixed_cost=132),
    Row("fab-targets", FAB(steps=15, targets=3), random=False, fixed_cost=97),
    Row("ddn", DDN(steps=20), random=False, fixed_cost=40, norms=("l2",)),
    Row("ddn-levels", DDN(steps=20, levels=256), random=False, fixed_cost=40, norms=("l2",)),
    Row("fmn", FMN(steps=20), random=False, fixed_cost=40),
    Row(
        "carlini-wagner",
        CarliniWagner(steps=30, search_steps=3, learning_rate=0.1, initial_c=1.0),
        random=False,
        fixed_cost=None,
        norms=("l2", "linf"),
        even=False,
    ),
    Row("deepfool", DeepFool(steps=10), random=False, fixed_cost=44),
    Row("noise", RandomNoise(tries=8), random=True, fixed_cost=8),
    Row("noise-first-flip", RandomNoise(tries=8, keep="first_flip"), random=True, fixed_cost=8),
    Row("early-stopped", EarlyStoppedPGD(steps=3, start="none"), random=False, fixed_cost=6),
    Row(
        "early-stopped-noisy",
        EarlyStoppedPGD(steps=3, tau=1, omega=0.02),
        random=True,
        fixed_cost=6,
    ),
    Row("square", Square(queries=40), random=True, fixed_cost=40, shaped=True),
    Row(
        "square-rescaled",
        Square(queries=40, rescaled=True),
        random=True,
        fixed_cost=40,
        shaped=True,
        even=False,
    ),
    Row(
        "square-restarts",
        Square(queries=20, restarts=2),
        random=True,
        fixed_cost=None,
        shaped=True,
        even=False,
    ),
    Row("apgd", APGD(steps=8), random=True, fixed_cost=18),
    Row("apgd-restarts", APGD(steps=4, restarts=2), random=True, fixed_cost=None),
    Row(
        "apgd-targets",
        APGD(steps=4, targets=3, loss=losses.dlr_loss),
        random=True,
        fixed_cost=None,
        classes=4,
    ),
    Row(
        "apgd-large-eps",
        APGD(norm="l1", steps=10, large_eps=True),
        random=True,
        fixed_cost=26,
        norms=("l1",),
    ),
    Row("mifgsm", MIFGSM(steps=3), random=False, fixed_cost=6),
    Row("mifgsm-worst", MIFGSM(steps=3, start="uniform", keep="worst"), random=True, fixed_cost=7),
    Row("mifgsm-first-flip", MIFGSM(steps=3, keep="first_flip"), random=False, fixed_cost=7),
)

DONE = {type(row.attack) for row in ROWS}
TABLE = ROWS + tuple(
    Row(kind.__name__, small(kind), random=None, norms=norms_of(kind), shaped=True, even=False)
    for kind in exported(norm_bounded=True)
    if kind not in DONE
)
"""A new attack is checked as soon as it is exported; a row of its own above checks its cost and other variants too."""

every_attack = pytest.mark.parametrize(
    ("row", "norm"), [pytest.param(row, norm, id=f"{row.name}-{norm}") for row in TABLE for norm in row.norms]
)
every_device = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))],
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dataclass(frozen=True)
class Setting:
    """A model and a batch, some of it misclassified from the start."""

    model: nn.Module
    x: Tensor
    y: Tensor
    eps: Tensor
    index: Tensor

    def perturb(self, row: Row, norm: Norm, **options: Any) -> Adversarial:
        box: Box = options.pop("box", (0.0, 1.0))
        given = {"eps": self.eps, "index": self.index} | options
        return replace(row.attack, norm=norm, box=box)(self.model, self.x, self.y, **given)

    def to(self, device: str) -> Setting:
        """The same setting on another device; the model is a copy."""
        if device == "cpu":
            return self
        model = copy.deepcopy(self.model).to(device)
        return Setting(model, *(part.to(device) for part in (self.x, self.y, self.eps, self.index)))

    def rows(self, where: Any) -> Setting:
        return Setting(self.model, self.x[where], self.y[where], self.eps[where], self.index[where])


@cache
def setting(
    norm: Norm,
    dtype: torch.dtype = torch.float64,
    shape: tuple[int, ...] = (6,),
    box: Box = (0.0, 1.0),
    classes: int = CLASSES,
) -> Setting:
    """Inputs in the box, some entries on its faces; labels as predicted, except the first two; various radii."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(BATCH, *shape, generator=generator, dtype=torch.float64)
    x[0], x[1, ..., 0] = 0, 1
    x = (box[0] + (box[1] - box[0]) * x).to(dtype).clamp(*box)
    model = network(FEATURES, classes, dtype)
    y = predicted(model, x).argmax(1)
    y[:2] = (y[:2] + 1) % classes
    scale = 0.5 + torch.arange(BATCH, dtype=torch.float64) % 4 / 2
    eps = (RADIUS[norm] * (box[1] - box[0]) * scale).to(torch.promote_types(dtype, torch.float32))
    return Setting(model, x, y, eps, 100 + 7 * torch.arange(BATCH))


def lengths(delta: Tensor, norm: Norm) -> Tensor:
    """The norm of each row, spelled out."""
    flat = delta.flatten(1).double().abs()
    return {"linf": flat.amax(1), "l2": flat.square().sum(1).sqrt(), "l1": flat.sum(1)}[norm]


def assert_allowed(found: Tensor, x: Tensor, eps: Tensor | float, norm: Norm, box: Box = (0.0, 1.0)) -> None:
    """Finite, inside the ball as float64 sees it, inside the box as the dtype sees it."""
    assert found.isfinite().all()
    assert (lengths(found.double() - x.double(), norm) <= eps * (1 + 1e-6)).all()
    assert torch.equal(found, found.clamp(*box))


def test_every_exported_attack_has_a_row() -> None:
    assert {type(row.attack) for row in TABLE} == set(exported(norm_bounded=True))


@every_attack
def test_setting_has_samples_that_break_and_samples_that_hold(row: Row, norm: Norm) -> None:
    """Without both, most of the tests below would show nothing."""
    success = setting(norm).perturb(row, norm).success
    assert success is not None
    assert 3 <= success.sum() < BATCH - 2


@every_device
@every_dtype
@every_attack
def test_stays_inside_ball_and_box(row: Row, norm: Norm, dtype: torch.dtype, device: str) -> None:
    case = setting(norm, dtype).to(device)
    found = case.perturb(row, norm).x
    assert_allowed(found, case.x, case.eps, norm)
    assert not torch.equal(found, case.x)


@every_dtype
@every_attack
def test_stays_inside_a_box_whose_faces_no_float_meets_exactly(row: Row, norm: Norm, dtype: torch.dtype) -> None:
    box = (-0.3, 0.7)
    case = setting(norm, dtype, box=box)
    assert_allowed(case.perturb(row, norm, box=box).x, case.x, case.eps, norm, box)


@every_attack
def test_uses_a_wider_box(row: Row, norm: Norm) -> None:
    case = setting(norm, box=(-1.0, 1.0))
    found = case.perturb(row, norm, box=(-1.0, 1.0)).x
    assert_allowed(found, case.x, case.eps, norm, (-1.0, 1.0))
    assert (found != case.x)[case.x < 0].any()


@every_device
@every_dtype
@every_attack
def test_radius_zero_returns_the_input(row: Row, norm: Norm, dtype: torch.dtype, device: str) -> None:
    case = setting(norm, dtype).to(device)
    assert torch.equal(case.perturb(row, norm, eps=0.0).x, case.x)
    mixed = torch.where(torch.arange(BATCH) % 3 > 0, 10.0, 0.0)
    found = case.perturb(row, norm, eps=mixed).x
    assert torch.equal(found[mixed == 0], case.x[mixed == 0])
    assert (found != case.x).flatten(1).any(1)[2:][mixed[2:] > 0].all()


@every_attack
def test_each_row_has_its_own_radius(row: Row, norm: Norm) -> None:
    """A batch with (B,) radii is what each row gives alone with its number."""
    case = setting(norm)
    together = case.perturb(row, norm)
    for i in (0, 4, 7):
        alone = case.rows([i]).perturb(row, norm, eps=float(case.eps[i]))
        torch.testing.assert_close(alone.x[0], together.x[i], rtol=0, atol=1e-9)


@every_attack
def test_leaves_no_trace(row: Row, norm: Norm) -> None:
    case = setting(norm)
    model, generator = case.model, torch.random.get_rng_state()
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = [p.requires_grad for p in model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    inputs = [value.clone() for value in (case.x, case.y, case.eps, case.index)]
    case.perturb(row, norm)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == wanted
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) if grad is None else torch.equal(p.grad, grad)
    assert torch.equal(torch.random.get_rng_state(), generator)
    for given, before in zip((case.x, case.y, case.eps, case.index), inputs, strict=True):
        assert torch.equal(given, before)
        assert not given.requires_grad


@every_attack
def test_does_not_follow_a_graph_that_the_input_brings(row: Row, norm: Norm) -> None:
    case = setting(norm)
    found = replace(case, x=case.x.clone().requires_grad_()).perturb(row, norm)
    assert torch.equal(found.x, case.perturb(row, norm).x)
    assert not found.x.requires_grad


@every_device
@every_dtype
@every_attack
def test_result_has_the_kind_of_the_input(row: Row, norm: Norm, dtype: torch.dtype, device: str) -> None:
    case = setting(norm, dtype).to(device)
    found = case.perturb(row, norm)
    assert (found.x.dtype, found.x.device, found.x.shape) == (dtype, case.x.device, case.x.shape)
    assert not found.x.requires_grad
    kinds = {
        "success": torch.bool,
        "steps_survived": torch.int64,
        "evaluations": torch.int64,
        "num_iterates": torch.int64,
    }
    for name, kind in kinds.items():
        value = getattr(found, name)
        assert (value.dtype, tuple(value.shape)) == (kind, (BATCH,))


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@every_attack
def test_the_rank_of_the_input_does_not_matter(row: Row, norm: Norm, shape: tuple[int, ...]) -> None:
    case = setting(norm, shape=shape)
    found = case.perturb(row, norm).x
    assert found.shape == case.x.shape
    if row.shaped:
        assert_allowed(found, case.x, case.eps, norm)
        return
    flat = replace(case, x=case.x.flatten(1)).perturb(row, norm).x
    torch.testing.assert_close(found.flatten(1), flat, rtol=0, atol=1e-12)


@every_attack
def test_batches_do_not_matter(row: Row, norm: Norm) -> None:
    """Neither the order of the rows nor who else is in the batch, as long as the index goes with the row."""
    case = setting(norm)
    together = case.perturb(row, norm)
    order = torch.tensor([3, 9, 0, 5, 1, 2, 8, 7, 4, 6])
    for batch in (order, order[:4], order[4:5]):
        found = case.rows(batch).perturb(row, norm)
        torch.testing.assert_close(found.x, together.x[batch], rtol=0, atol=1e-9)
        for name in ("success", "steps_survived", "evaluations"):
            assert torch.equal(getattr(found, name), getattr(together, name)[batch]), name


@every_attack
def test_seed_decides_what_is_random(row: Row, norm: Norm) -> None:
    case = setting(norm)
    found = case.perturb(row, norm, seed=3)
    torch.rand(5)
    assert torch.equal(case.perturb(row, norm, seed=3).x, found.x)
    if row.random is not None:
        assert torch.equal(case.perturb(row, norm, seed=4).x, found.x) is not row.random


@every_attack
def test_success_is_what_the_model_says_again(row: Row, norm: Norm) -> None:
    case = setting(norm)
    found = case.perturb(row, norm)
    assert found.success is not None
    assert torch.equal(found.success, losses.misclassified(predicted(case.model, found.x), case.y))


@every_attack
def test_target_is_reached_where_it_says_so(row: Row, norm: Norm) -> None:
    case = setting(norm)
    target = (case.y + 1) % CLASSES
    found = case.perturb(row, norm, target=target, eps=4 * case.eps)
    logits = predicted(case.model, found.x)
    assert found.success is not None
    assert torch.equal(found.success, logits.argmax(1) == target)
    assert_allowed(found.x, case.x, 4 * case.eps, norm)
    assert found.success.any()


@every_attack
def test_unjudged_result_is_the_same_and_says_less(row: Row, norm: Norm) -> None:
    case = setting(norm)
    judged, unjudged = case.perturb(row, norm), case.perturb(row, norm, check_success=False)
    assert torch.equal(judged.x, unjudged.x)
    assert torch.equal(judged.steps_survived, unjudged.steps_survived)
    if row.knows_success:
        assert unjudged.success is not None
        assert torch.equal(judged.success, unjudged.success)
    else:
        assert unjudged.success is None


@pytest.mark.parametrize("judge", [True, False])
@every_attack
def test_evaluations_are_the_forwards_and_backwards_made(row: Row, norm: Norm, judge: bool) -> None:
    case = setting(norm)
    counting = Counting(case.model)
    found = replace(case, model=counting).perturb(row, norm, check_success=judge)
    probe = 1  # one row, to see what kind of output the model has
    assert found.evaluations.sum() == counting.forwards - probe + counting.backwards
    if row.fixed_cost is not None:
        assert (found.evaluations == row.fixed_cost + (judge and not row.knows_success)).all()


@every_attack
def test_survived_counts_the_iterates_before_the_flip(row: Row, norm: Norm) -> None:
    case = setting(norm)
    found = case.perturb(row, norm, eps=0.0)
    held = found.steps_survived[2:]
    assert found.steps_survived.tolist()[:2] == [0, 0]
    assert (held <= found.num_iterates[2:]).all()
    if row.even:
        assert held.tolist() == [held[0].item()] * (BATCH - 2)
    assert (held > 0).all()
    if isinstance(row.attack, PGD):
        assert held[0] == row.attack.steps * row.attack.restarts
        assert torch.equal(held, found.num_iterates[2:])


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
@every_attack
def test_constant_inputs(row: Row, norm: Norm, level: float) -> None:
    case = setting(norm)
    x = torch.full_like(case.x, level)
    # What looks for the smallest perturbation returns the input where there is none within the radius.
    eps = 8 * case.eps if row.attack.minimum_norm else case.eps
    found = replace(case, x=x).perturb(row, norm, eps=eps).x
    assert_allowed(found, x, eps, norm)
    assert not torch.equal(found, x)


@every_dtype
@every_attack
def test_radius_larger_than_the_box(row: Row, norm: Norm, dtype: torch.dtype) -> None:
    case = setting(norm, dtype)
    assert_allowed(case.perturb(row, norm, eps=100.0).x, case.x, 100.0, norm)


@every_attack
def test_model_without_gradient_to_follow(row: Row, norm: Norm) -> None:
    case = setting(norm)
    flat = linear(torch.zeros(CLASSES, FEATURES, dtype=torch.float64), torch.arange(CLASSES))
    found = replace(case, model=flat).perturb(row, norm)
    assert_allowed(found.x, case.x, case.eps, norm)
    assert found.success is not None
    assert torch.equal(found.success, case.y != CLASSES - 1)


@every_attack
def test_two_classes(row: Row, norm: Norm) -> None:
    if row.classes > 2:
        pytest.skip("a ratio that needs more classes, and says so: test_losses")
    case = setting(norm, classes=2)
    found = case.perturb(row, norm)
    assert_allowed(found.x, case.x, case.eps, norm)
    assert found.success is not None
    assert torch.equal(found.success, predicted(case.model, found.x).argmax(1) != case.y)
