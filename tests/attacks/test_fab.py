"""FAB on models whose nearest mistake is known, alone and under a schedule."""

from __future__ import annotations

import pytest
import torch
from attack_oracles import Counting, linear, network, predicted, schedule_of
from boundary_oracles import CLOSE, NORMS, UNIT, WIDE, TwoBoundaries, affine, kinked, lengths, smallest
from torch import Tensor

from wideberth import losses
from wideberth.attacks import FAB, AttackInputs
from wideberth.attacks.drivers import perturb_batch
from wideberth.attacks.restarts import inputs_of_jobs
from wideberth.checks import InputError, Norm
from wideberth.margins import effective_margin
from wideberth.randomness import Noise

each_norm = pytest.mark.parametrize("norm", NORMS)


def assert_near(found: Tensor, exact: Tensor, norm: Norm) -> None:
    """No shorter than can be, and hardly longer."""
    assert (found >= exact * (1 - 1e-9)).all()
    assert (found <= exact * CLOSE[norm]).all(), (found / exact).max()


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 64])
@each_norm
def test_finds_the_distance_of_a_linear_model(norm: Norm, batch: int, shape: tuple[int, ...]) -> None:
    case = affine(norm, WIDE, batch, shape)
    found = smallest(FAB(norm=norm, box=WIDE, steps=40), case.model, case.x, case.y)
    assert found.success is not None
    assert found.success.all()
    assert_near(lengths(found, case.x, norm), case.distance, norm)


@each_norm
def test_finds_the_distance_inside_a_box_that_binds(norm: Norm) -> None:
    """With two classes, what is nearest is the hyperplane inside the box."""
    case = affine(norm, UNIT, 64, classes=2, seed=2, tilt=2)
    found = smallest(FAB(norm=norm), case.model, case.x, case.y)
    assert_near(lengths(found, case.x, norm), case.distance, norm)
    assert torch.equal(found.x, found.x.clamp(0, 1))
    free = affine(norm, WIDE, 64, classes=2, seed=2, tilt=2).distance
    assert (case.distance > free * 1.001).sum() > 50  # the box does bind


@each_norm
def test_boundary_outside_the_box_is_not_found(norm: Norm) -> None:
    case = affine(norm, UNIT, 6, classes=2, seed=2, tilt=4)
    assert case.distance.isinf().all()
    found = smallest(FAB(norm=norm, steps=20), case.model, case.x, case.y)
    assert found.success is not None
    assert not found.success.any()
    assert torch.equal(found.x, case.x)


@each_norm
def test_targets_find_the_nearest_class_that_the_box_leaves(norm: Norm) -> None:
    """Which class is nearest inside the box cannot be seen without trying each."""
    case = affine(norm, UNIT, 32, seed=3)
    found = smallest(FAB(norm=norm, targets=4, steps=50), case.model, case.x, case.y)
    assert_near(lengths(found, case.x, norm), case.distance, norm)


@each_norm
def test_target_that_is_aimed_at_is_reached_by_the_shortest_way(norm: Norm) -> None:
    """Of three classes: where the third is not in the way, the distance is that to the hyperplane of two."""
    case = affine(norm, WIDE, 64, classes=3, seed=4)
    target = (case.y + 1) % 3
    found = smallest(FAB(norm=norm, box=WIDE), case.model, case.x, case.y, target=target)
    exact = case.each.gather(1, target[:, None]).squeeze(1)
    other = case.each.gather(1, ((case.y + 2) % 3)[:, None]).squeeze(1)
    length, direct = lengths(found, case.x, norm), other > 2 * exact
    assert direct.sum() > 8
    assert_near(length[direct], exact[direct], norm)
    assert found.success is not None
    assert found.success[direct].all()
    assert (length >= exact * (1 - 1e-9))[found.success].all()
    assert (predicted(case.model, found.x).argmax(1) == target)[found.success].all()


@each_norm
def test_follows_a_model_whose_slope_misleads(norm: Norm) -> None:
    case = kinked(norm)
    found = smallest(FAB(norm=norm, box=WIDE), case.model, case.x, case.y)
    assert_near(lengths(found, case.x, norm), case.distance, norm)


def test_is_the_effective_margin_of_a_linear_model() -> None:
    """The worked example: three inputs, four classes, margin 0.122474 for both samples."""
    weight = torch.tensor([[1.0, 0, 2], [0, -1, 1], [2, 1, 0], [0, 0, 1]], dtype=torch.float64)
    x = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=torch.float64)
    model, y = linear(weight), torch.tensor([0, 0])
    found = lengths(smallest(FAB(norm="l2", box=WIDE), model, x, y), x, "l2")
    torch.testing.assert_close(effective_margin(model, x, y), torch.tensor([0.122474] * 2).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found, effective_margin(model, x, y), rtol=0.01, atol=0)


@each_norm
def test_radius_decides_what_counts(norm: Norm) -> None:
    case = affine(norm, WIDE, 40)
    attack = FAB(norm=norm, box=WIDE, steps=40)
    wide = attack(case.model, case.x, case.y, eps=case.distance * CLOSE[norm])
    assert wide.success is not None
    assert wide.success.all()
    tight = attack(case.model, case.x, case.y, eps=case.distance * 0.999)
    assert tight.success is not None
    assert not tight.success.any()
    assert torch.equal(tight.x, case.x)


@each_norm
def test_misclassified_input_is_its_own_nearest_mistake(norm: Norm) -> None:
    case = affine(norm, WIDE, 8)
    found = smallest(FAB(norm=norm, box=WIDE, steps=5), case.model, case.x, (case.y + 1) % 5)
    assert torch.equal(found.x, case.x)
    assert found.steps_survived.eq(0).all()


@pytest.mark.parametrize("eps", [1.2, float("inf")])
@each_norm
def test_restarts_find_a_boundary_that_the_first_run_does_not_see(norm: Norm, eps: float) -> None:
    x = torch.zeros(16, 2, dtype=torch.float64)
    inputs = AttackInputs(x, torch.zeros(16).long(), torch.full((16,), eps).double(), Noise(torch.arange(16)))
    model = TwoBoundaries()
    once = perturb_batch(FAB(norm=norm, box=WIDE, steps=40), model, inputs)
    assert_near(lengths(once, x, norm), torch.full((16,), model.far, dtype=torch.float64), norm)
    often = perturb_batch(FAB(norm=norm, box=WIDE, steps=40, restarts=12), model, inputs)
    assert_near(lengths(often, x, norm), torch.full((16,), model.near, dtype=torch.float64), norm)


def test_restarts_begin_at_random_points_of_their_own() -> None:
    """Where the model is asked in the second round: the same for a seed, another for each restart and row."""
    case = affine("l2", UNIT, 6)
    attack = FAB(norm="l2", restarts=3)

    def second(run: int, seed: int) -> Tensor:
        inputs = AttackInputs(case.x, case.y, torch.full((6,), 0.5).double(), Noise(torch.arange(6), seed))
        inputs = inputs_of_jobs(attack, inputs, torch.full((6,), run), None)
        state = attack.update(case.model, inputs, attack.init(inputs))
        reach = torch.minimum(affine("l2", UNIT, 6).distance, torch.tensor(0.25))
        if run:
            assert ((state.point - case.x).norm(dim=1) <= reach * (1 + 1e-9)).all()
        return state.point

    assert torch.equal(second(0, 1), second(0, 2))
    assert torch.equal(second(1, 1), second(1, 1))
    assert (second(1, 1) != second(1, 2)).any(1).all()
    assert (second(1, 1) != second(2, 1)).any(1).all()


@pytest.mark.parametrize("parallel_restarts", [1, 3])
@pytest.mark.parametrize("options", [{}, {"restarts": 3}, {"targets": 2, "restarts": 2}], ids=str)
def test_a_schedule_that_refills_finds_the_same(options: dict[str, int], parallel_restarts: int) -> None:
    """Rows at different steps, restarts and targets share batches of four."""
    x, model = torch.rand(10, 6, generator=torch.Generator().manual_seed(0)).double(), network().eval()
    y = predicted(model, x).argmax(1)
    attack = FAB(norm="l2", steps=6, **options)
    inputs = AttackInputs(x, y, torch.full((10,), float("inf")).double(), Noise(torch.arange(10), 3))
    whole = perturb_batch(attack, model, inputs)
    ranked = losses.likeliest(predicted(model, x), y) if attack.targets else None
    options = {"batch_size": 4, "ranked": ranked, "parallel_restarts": parallel_restarts}
    schedule = schedule_of(attack, model, inputs, 4, **options)
    best, kept = torch.full((10,), float("-inf")).double(), x.clone()
    while schedule.busy:
        for ended in schedule.step():
            better = ended.state.best_loss > best[ended.sample]
            kept[ended.sample[better]], best[ended.sample[better]] = (
                ended.state.best[better],
                ended.state.best_loss[better],
            )
            schedule.confirm(ended, torch.ones_like(ended.sample) > 0)
    assert whole.success is not None
    assert whole.success.all()
    torch.testing.assert_close(kept, whole.x, rtol=0, atol=1e-9)


def test_a_step_asks_once() -> None:
    case = affine("l2", WIDE, 7)
    model = Counting(case.model)
    smallest(FAB(norm="l2", box=WIDE, steps=10), model, case.x, case.y)
    assert (model.forwards, model.backwards) == (11 * 7, 11 * 7 * 4)
    model = Counting(case.model)
    smallest(FAB(norm="l2", box=WIDE, steps=10), model, case.x, case.y, target=(case.y + 1) % 5)
    assert (model.forwards, model.backwards) == (11 * 7, 11 * 7)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"eta": 0.5}, {"beta": 1.5}, {"alpha_max": -0.1}], ids=str)
def test_refuses_hyper_parameters_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        FAB(**wrong)  # type: ignore[arg-type]
