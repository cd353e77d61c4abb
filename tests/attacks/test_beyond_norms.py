"""Attacks whose eps is not the radius of a norm ball: what they promise all the same, and what their eps means."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from attack_oracles import Counting, linear, network, predicted, schedule_of
from exported import exported
from scipy.ndimage import affine_transform
from torch import Tensor, nn

from wideberth import losses
from wideberth.attacks import NFGSM, Adversarial, Attack, AttackInputs, Flow, Spatial, Wasserstein
from wideberth.attacks.drivers import run_steps
from wideberth.attacks.flow import roughness
from wideberth.attacks.spatial import sampled
from wideberth.checks import Box, InputError
from wideberth.randomness import Noise

BATCH, CLASSES, SHAPE = 10, 4, (2, 4, 5)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Row:
    """An attack in the table.

    Attributes:
        name: of the test.
        attack: with its hyper-parameters.
        eps: the largest that it is tried with.
        random: whether the seed matters.
        cost: forwards and backwards per sample, or None where they depend on what is broken when.
        images: whether it is defined on images alone.
    """

    name: str
    attack: Attack
    eps: float
    random: bool
    cost: int | None
    images: bool = True


TABLE = (
    Row("spatial", Spatial(translation=1, tries=6), 0.2, random=True, cost=6),
    Row("spatial-restarts", Spatial(translation=1, tries=2, restarts=3), 0.2, random=True, cost=None),
    Row("spatial-grid", Spatial(search="grid", translation=1, grid=(2, 2, 2)), 0.2, random=False, cost=8),
    Row("flow", Flow(steps=4), 0.1, random=False, cost=10),
    Row("flow-uniform", Flow(steps=4, start="uniform", step_size=0.02, tau=0), 0.1, random=True, cost=10),
    Row("wasserstein", Wasserstein(steps=3), 0.008, random=False, cost=8),
    Row("wasserstein-sign", Wasserstein(norm="linf", steps=3, order=1), 0.012, random=False, cost=8),
    Row("noise-fgsm", NFGSM(), 0.04, random=True, cost=3, images=False),
    Row("noise-fgsm-absolute-step", NFGSM(noise=1, step_size=0.03), 0.04, random=True, cost=3, images=False),
)
every_attack = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dataclass(frozen=True)
class Setting:
    """A model and a batch, some of it misclassified from the start."""

    model: nn.Module
    x: Tensor
    y: Tensor
    index: Tensor

    def eps(self, row: Row) -> Tensor:
        return row.eps * (0.25 + self.index % 4 / 4)

    def perturb(self, row: Row, **options: Any) -> Adversarial:
        box: Box = options.pop("box", (0.0, 1.0))
        given = {"eps": self.eps(row), "index": self.index} | options
        return replace(row.attack, box=box)(self.model, self.x, self.y, **given)

    def rows(self, where: Any) -> Setting:
        return Setting(self.model, self.x[where], self.y[where], self.index[where])


@cache
def setting(dtype: torch.dtype = torch.float64, box: Box = (0.0, 1.0)) -> Setting:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(BATCH, *SHAPE, generator=generator, dtype=torch.float64)
    x[0], x[1, ..., 0], x[2, 0] = 0, 1, 1
    x = (box[0] + (box[1] - box[0]) * x).to(dtype).clamp(*box)
    model = network(40, CLASSES, dtype)
    y = predicted(model, x).argmax(1)
    y[:2] = (y[:2] + 1) % CLASSES
    return Setting(model, x, y, 100 + 7 * torch.arange(BATCH))


def test_every_exported_attack_without_a_ball_has_a_row() -> None:
    assert set(exported(norm_bounded=False)) == {type(row.attack) for row in TABLE}


@every_attack
def test_setting_has_samples_that_break_and_samples_that_hold(row: Row) -> None:
    success = setting().perturb(row).success
    assert success is not None
    assert 3 <= success.sum() < BATCH - 2


@pytest.mark.parametrize("box", [(0.0, 1.0), (-0.3, 0.7)], ids=str)
@every_dtype
@every_attack
def test_stays_inside_the_box_and_has_the_kind_of_the_input(row: Row, dtype: torch.dtype, box: Box) -> None:
    case = setting(dtype, box)
    for eps in (case.eps(row), 4 * row.eps):
        found = case.perturb(row, box=box, eps=eps)
        assert torch.equal(found.x, found.x.clamp(*box))
        assert (found.x.dtype, found.x.shape) == (dtype, case.x.shape)
        assert not torch.equal(found.x, case.x)
    for name, kind in {"success": torch.bool, "steps_survived": torch.int64, "evaluations": torch.int64}.items():
        value = getattr(found, name)
        assert (value.dtype, tuple(value.shape)) == (kind, (BATCH,))


@every_dtype
@every_attack
def test_eps_zero_returns_the_input(row: Row, dtype: torch.dtype) -> None:
    case = setting(dtype)
    found = case.perturb(row, eps=0.0)
    assert torch.equal(found.x, case.x)
    assert found.success is not None
    assert torch.equal(found.success, losses.misclassified(predicted(case.model, case.x), case.y))
    mixed = torch.where(torch.arange(BATCH) % 3 > 0, 10 * row.eps, 0.0)
    found = case.perturb(row, eps=mixed)
    assert torch.equal(found.x[mixed == 0], case.x[mixed == 0])
    assert (found.x != case.x).flatten(1).any(1)[3:][mixed[3:] > 0].all()


@every_attack
def test_leaves_no_trace(row: Row) -> None:
    case, generator = setting(), torch.random.get_rng_state()
    flags = [module.training for module in case.model.modules()]
    state = {name: value.clone() for name, value in case.model.state_dict().items()}
    wanted = [p.requires_grad for p in case.model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in case.model.parameters()]
    x = case.x.clone()
    found = case.perturb(row)
    assert [module.training for module in case.model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in case.model.state_dict().items())
    assert [p.requires_grad for p in case.model.parameters()] == wanted
    for p, grad in zip(case.model.parameters(), grads, strict=True):
        assert (p.grad is None) if grad is None else torch.equal(p.grad, grad)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert torch.equal(case.x, x)
    assert not found.x.requires_grad


@every_attack
def test_batches_do_not_matter(row: Row) -> None:
    case = setting()
    together = case.perturb(row)
    order = torch.tensor([3, 9, 0, 5, 1, 2, 8, 7, 4, 6])
    for batch in (order, order[:4], order[4:5]):
        found = case.rows(batch).perturb(row)
        torch.testing.assert_close(found.x, together.x[batch], rtol=0, atol=1e-9)
        for name in ("success", "steps_survived", "evaluations"):
            assert torch.equal(getattr(found, name), getattr(together, name)[batch]), name


@every_attack
def test_rows_at_different_iterations_share_a_batch(row: Row) -> None:
    """Refilled slots find what a run of all rows at once finds, in as many looks."""
    if isinstance(row.attack, NFGSM):
        pytest.skip("what its one step leads to is seen by the judge alone: test_hunt")
    case = setting()
    inputs = AttackInputs(case.x, case.y, case.eps(row).double(), Noise(case.index))
    attack = replace(row.attack, restarts=1)
    case.model.eval()
    try:
        together = run_steps(attack, case.model, inputs)
        schedule = schedule_of(attack, case.model, inputs, batch_size=3)
        while schedule.busy:
            for ended in schedule.step():
                assert torch.equal(ended.state.adversarial, together.adversarial[ended.sample])
                assert torch.equal(ended.state.steps_survived, together.steps_survived[ended.sample])
                held = ~ended.state.adversarial
                expected = together.best[ended.sample][held]
                torch.testing.assert_close(ended.state.best[held], expected, rtol=0, atol=1e-9)
    finally:
        case.model.train()
        case.model[5].eval()


@every_attack
def test_seed_decides_what_is_random(row: Row) -> None:
    case = setting()
    found = case.perturb(row, seed=3)
    torch.rand(5)
    assert torch.equal(case.perturb(row, seed=3).x, found.x)
    assert torch.equal(case.perturb(row, seed=4).x, found.x) is not row.random


@every_attack
def test_success_is_what_the_model_says_again(row: Row) -> None:
    case = setting()
    found = case.perturb(row)
    assert found.success is not None
    assert torch.equal(found.success, losses.misclassified(predicted(case.model, found.x), case.y))


@every_attack
def test_target_is_reached_where_it_says_so(row: Row) -> None:
    case = setting()
    target = (case.y + 1) % CLASSES
    found = case.perturb(row, target=target, eps=5 * row.eps)
    assert found.success is not None
    assert torch.equal(found.success, predicted(case.model, found.x).argmax(1) == target)
    assert found.success.any()


@every_attack
def test_evaluations_are_the_forwards_and_backwards_made(row: Row) -> None:
    case = setting()
    counting = Counting(case.model)
    found = replace(case, model=counting).perturb(row)
    assert found.evaluations.sum() == counting.forwards - 1 + counting.backwards
    if row.cost is not None:
        assert (found.evaluations == row.cost).all()


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
@every_attack
def test_constant_images_and_models_without_gradient_do_no_harm(row: Row, level: float) -> None:
    case = setting()
    flat = linear(torch.zeros(CLASSES, 40, dtype=torch.float64), torch.arange(CLASSES))
    for model, x in ((case.model, torch.full_like(case.x, level)), (flat, case.x)):
        found = replace(case, model=model, x=x).perturb(row).x
        assert found.isfinite().all()
        assert torch.equal(found, found.clamp(0, 1))


@pytest.mark.parametrize("shape", [(40,), (5, 8), (2, 4, 5, 1)], ids=str)
@pytest.mark.parametrize("row", [row for row in TABLE if row.images], ids=lambda row: row.name)
def test_what_is_no_image_is_refused_in_one_line(row: Row, shape: tuple[int, ...]) -> None:
    case = setting()
    with pytest.raises(InputError, match=rf"{type(row.attack).__name__} is defined on images, \(B, C, H, W\)") as error:
        row.attack(case.model, case.x.reshape(BATCH, *shape), case.y, eps=row.eps)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Spatial, {"rotation": -1}, "rotation=-1"),
        (Spatial, {"search": "all"}, "search='all'"),
        (Spatial, {"grid": (5, 0, 5)}, "grid=.*each at least 1"),
        (Spatial, {"box": (float("-inf"), 1.0)}, "must be finite"),
        (Flow, {"tau": -0.1}, "tau=-0.1"),
        (Flow, {"steps": 0}, "steps=0"),
        (Wasserstein, {"norm": "l1"}, "norm='l1': accepted are linf, l2"),
        (Wasserstein, {"window": 4}, "window=4: must be odd"),
        (Wasserstein, {"sharpness": 0}, "sharpness=0"),
        (Wasserstein, {"box": (float("-inf"), 1.0)}, "low face must be finite"),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(kind: type[Attack], options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind(**options)


# ---- noise FGSM -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [(-9.0, 9.0), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("noise", [0.0, 2.0, 4.0])
def test_noise_fgsm_reaches_its_noise_and_one_step_more(noise: float, box: Box) -> None:
    """From noise of uniform density, each entry steps eps uphill and is held by the box alone."""
    x = torch.full((2, 4000), 0.5, dtype=torch.float64)
    weight = 1e-3 * torch.stack([torch.ones(4000), -torch.ones(4000)]).double()
    eps = torch.tensor([0.1, 0.2], dtype=torch.float64)
    found = NFGSM(noise=noise, box=box)(linear(weight), x, torch.zeros(2, dtype=torch.int64), eps=eps)
    step = (found.x - x) / eps[:, None]  # downhill of the label: every entry one eps down
    low, slack = ((box[0] - 0.5) / eps).clamp_min(-1 - noise), 0.01 * noise + 1e-9
    assert (step.amin(1) >= low - 1e-9).all()
    assert (step.amin(1) <= low + slack).all()
    if box[0] < 0:
        assert (step.amax(1) <= noise - 1 + 1e-9).all()
        assert (step.amax(1) >= noise - 1 - slack).all()
        assert step.mean().item() == pytest.approx(-1, abs=0.1 * noise + 1e-9)
    assert found.evaluations.tolist() == [3, 3]
    assert found.num_iterates.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l2"}, "norm='l2': accepted are linf"),
        ({"noise": -1.0}, "noise=-1.0: must be at least 0"),
        ({"start": "none"}, "start='none': accepted are uniform"),
    ],
)
def test_noise_fgsm_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NFGSM(**options)


# ---- rotation and translation ---------------------------------------------------------------------------------------


class Recognising(nn.Module):
    """Class 1 exactly for one image."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = image

    def forward(self, x: Tensor) -> Tensor:
        near = ((x - self.image).abs().flatten(1).amax(1) < 1e-9).to(x.dtype)
        return torch.stack([torch.full_like(near, 0.5), near], dim=1)


def recognised(attack: Attack, x: Tensor, wanted: Tensor, eps: float = 1.0) -> bool:
    found = attack(Recognising(wanted), x[None], torch.zeros(1, dtype=torch.int64), eps=eps)
    assert found.success is not None
    return bool(found.success.item())


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("box", [(0.0, 1.0), (-1.0, 1.0)], ids=str)
def test_translation_by_whole_pixels_shifts_and_brings_in_the_low_face(box: Box) -> None:
    x = picture(2, 5, 7)
    shifted = torch.full_like(x, box[0])
    shifted[:, 2:, :-1] = x[:, :-2, 1:]
    attack = Spatial(box=box, search="grid", translation=2, grid=(5, 5, 1))
    assert recognised(attack, x, shifted)
    assert not recognised(attack, x, shifted, eps=0.75)
    assert not recognised(replace(attack, translation=1), x, shifted)
    assert recognised(replace(attack, translation=1), x, shifted, eps=2.0)


def test_rotation_turns_about_the_centre_without_stretching() -> None:
    square, wide = picture(2, 6, 6), picture(2, 3, 6)
    quarter = Spatial(search="grid", rotation=90, grid=(1, 1, 3))
    assert recognised(quarter, square, square.rot90(1, (1, 2)))
    assert recognised(quarter, square, square.rot90(-1, (1, 2)))
    assert recognised(quarter, wide, wide.flip(1, 2), eps=2.0)
    assert not recognised(quarter, square, square.rot90(1, (1, 2)), eps=0.9)


def test_grid_returns_the_highest_loss_of_the_misclassified_or_else_of_all() -> None:
    """Against every transform of the grid made by scipy, for a model with mistakes both likely and unlikely."""
    x = picture(8, 1, 5, 6)
    weight = picture(3, 30, seed=1) - 0.5
    model = linear(4 * weight)
    y = predicted(model, x).argmax(1)
    eps = torch.linspace(0.1, 1, 8, dtype=torch.float64)
    attack = Spatial(search="grid", rotation=40, translation=1.5, grid=(3, 3, 5))
    found = attack(model, x, y, eps=eps)
    assert found.success is not None
    assert 0 < found.success.sum() < 8
    middle = np.array([2, 2.5])
    for i in range(8):
        tried = []
        for down in (-1.5, 0, 1.5):
            for across in (-1.5, 0, 1.5):
                for degrees in (-40, -20, 0, 20, 40):
                    angle = np.deg2rad(degrees) * eps[i].item()
                    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
                    offset = middle - turn @ (middle + np.array([down, across]) * eps[i].item())
                    image = affine_transform(x[i, 0].numpy(), turn, offset, order=1, mode="grid-constant")
                    tried.append(torch.from_numpy(image))
        images = torch.stack(tried)[:, None]
        logits, label = predicted(model, images), y[i].expand(len(images))
        loss, wrong = losses.cross_entropy(logits, label), losses.misclassified(logits, label)
        best = torch.where(wrong | ~wrong.any(), loss, -1).argmax()
        assert found.success[i] == wrong.any()
        torch.testing.assert_close(found.x[i], images[best], rtol=0, atol=1e-12)


def drawn(x: Tensor, eps: float, **limits: float) -> Tensor:
    """One random transform of the image for each of 300 rows, (300, H, W)."""
    model = rising(torch.zeros_like(x))
    rows = x.expand(300, 1, *x.shape)
    return Spatial(tries=1, **limits)(model, rows, torch.ones(300, dtype=torch.int64), eps=eps).x[:, 0]


def assert_fills(found: Tensor, limit: float) -> None:
    assert found.abs().max() <= limit + 1e-9
    assert found.min() < -0.95 * limit
    assert found.max() > 0.95 * limit


@pytest.mark.parametrize("eps", [0.5, 1.0])
def test_random_transforms_fill_the_limits_and_keep_them(eps: float) -> None:
    """A bright spot tells how far it was moved, a ramp how far it was turned; rows draw for themselves."""
    along = torch.arange(9, dtype=torch.float64) - 4
    spot = torch.zeros(9, 9, dtype=torch.float64)
    spot[4, 4] = 1
    moved = drawn(spot, eps, rotation=0, translation=3)
    down, across = (moved.sum(2) * along).sum(1), (moved.sum(1) * along).sum(1)
    assert_fills(down, 3 * eps)
    assert_fills(across, 3 * eps)
    assert torch.corrcoef(torch.stack([down, across]))[0, 1].abs() < 0.2
    turned = drawn((0.5 + 0.05 * along).expand(9, 9), eps, rotation=40, translation=0)
    assert_fills(torch.atan2(turned[:, 5, 4] - turned[:, 3, 4], turned[:, 4, 5] - turned[:, 4, 3]).rad2deg(), 40 * eps)


# ---- flow -----------------------------------------------------------------------------------------------------------


def ramp(rows: int = 4, columns: int = 6) -> Tensor:
    """Brightness that rises by 0.1 per column: a pixel moved by d columns changes by 0.1 d."""
    return (0.2 + 0.1 * torch.arange(columns, dtype=torch.float64)).expand(1, 1, rows, columns)


def rising(weight: Tensor) -> nn.Module:
    """Logits (0, weight * x): for label 0, the worst point is the one of the largest product."""
    flat = weight.flatten()
    return linear(torch.stack([torch.zeros_like(flat), flat]))


@pytest.mark.parametrize("eps", [0.3, 0.8, 1.7])
def test_flow_of_a_ramp_reaches_the_best_displacement_of_every_pixel(eps: float) -> None:
    """Each pixel goes as far as it may up or down the ramp, as its weight says, and no further than the border."""
    x, weight = ramp(), picture(4, 6, seed=3) - 0.5
    found = Flow(tau=0, steps=10)(rising(weight), x, torch.zeros(1, dtype=torch.int64), eps=eps).x
    place = (torch.arange(6, dtype=torch.float64) + eps * weight.sign()).clamp(0, 5)
    torch.testing.assert_close(found[0, 0], 0.2 + 0.1 * place, rtol=0, atol=1e-9)


def flow_of(attack: Flow, weight: Tensor, eps: float) -> Tensor:
    inputs = AttackInputs(
        ramp(), torch.zeros(1).long(), torch.tensor([eps], dtype=torch.float64), Noise(torch.zeros(1).long())
    )
    state = run_steps(attack, rising(weight), inputs)
    return state.flow


def test_a_rough_flow_costs_what_it_differs_between_neighbours() -> None:
    flow = picture(1, 2, 3, 4)
    total = 0.0
    for r in range(3):
        for c in range(4):
            for other in ((r + 1, c), (r, c + 1)):
                if other[0] < 3 and other[1] < 4:
                    total += (flow[0, :, r, c] - flow[0, :, *other]).norm().item()
    assert roughness(flow).item() == pytest.approx(total, rel=1e-5)


def test_the_penalty_closes_a_hole_in_the_flow() -> None:
    """All pixels but one gain by moving: without a penalty that one stays, with it, it goes where the others go."""
    weight = torch.ones(4, 6, dtype=torch.float64)
    weight[1, 2] = 0
    alone = flow_of(Flow(tau=0, steps=10), weight, 0.5)[0, 1]
    assert alone[1, 2] == 0
    assert (alone[:, :5] == 0.5).sum() == 19
    together = flow_of(Flow(tau=0.01, steps=20), weight, 0.5)[0, 1]
    torch.testing.assert_close(together[:, :5], torch.full((4, 5), 0.5, dtype=torch.float64), rtol=0, atol=0.07)


def test_between_the_pixels_the_image_is_what_grid_sample_says_and_has_slopes_up_to_its_edge() -> None:
    x = picture(3, 2, 5, 7)
    rows, columns = 4 * picture(3, 5, 7, seed=1), 6 * picture(3, 5, 7, seed=2)
    where = torch.stack([columns / 3 - 1, rows / 2 - 1], dim=3)
    expected = torch.nn.functional.grid_sample(x, where, align_corners=True)
    torch.testing.assert_close(sampled(x, rows, columns), expected, rtol=0, atol=1e-12)
    torch.autograd.gradcheck(lambda r, c: sampled(x, r, c), (rows.requires_grad_(), columns.requires_grad_()))
    edge = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 2).requires_grad_()
    (slope,) = torch.autograd.grad(sampled(ramp(1, 2), torch.zeros_like(edge), edge).sum(), edge)
    torch.testing.assert_close(slope, torch.full_like(slope, 0.1))
