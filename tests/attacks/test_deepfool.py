"""DeepFool on models whose nearest mistake is known."""

from __future__ import annotations

import pytest
import torch
from attack_oracles import Counting, linear
from boundary_oracles import CLOSE, NORMS, UNIT, WIDE, affine, kinked, lengths, smallest

from wideberth.attacks import DeepFool
from wideberth.checks import InputError, Norm

each_norm = pytest.mark.parametrize("norm", NORMS)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 64])
@each_norm
def test_finds_the_distance_of_a_linear_model(norm: Norm, batch: int, shape: tuple[int, ...]) -> None:
    """Each success halves what is added to the perturbation, so it comes as near as one likes."""
    case = affine(norm, WIDE, batch, shape)
    found = smallest(DeepFool(norm=norm, box=WIDE), case.model, case.x, case.y)
    assert found.success is not None
    assert found.success.all()
    torch.testing.assert_close(lengths(found, case.x, norm), case.distance, rtol=1e-6, atol=0)


@each_norm
def test_first_success_lies_as_far_beyond_as_the_overshoot_says(norm: Norm) -> None:
    case = affine(norm, WIDE, 16)
    found = smallest(DeepFool(norm=norm, box=WIDE, steps=1, overshoot=0.05), case.model, case.x, case.y)
    torch.testing.assert_close(lengths(found, case.x, norm), 1.05 * case.distance)


@each_norm
def test_finds_the_distance_inside_a_box_that_binds(norm: Norm) -> None:
    """With two classes, what is nearest is the hyperplane inside the box."""
    case = affine(norm, UNIT, 64, classes=2, seed=2, tilt=2)
    found = smallest(DeepFool(norm=norm), case.model, case.x, case.y)
    length = lengths(found, case.x, norm)
    assert (length >= case.distance * (1 - 1e-9)).all()
    assert (length <= case.distance * CLOSE[norm]).all()
    assert torch.equal(found.x, found.x.clamp(0, 1))
    free = affine(norm, WIDE, 64, classes=2, seed=2, tilt=2).distance
    assert (case.distance > free * 1.001).sum() > 50  # the box does bind


@each_norm
def test_boundary_outside_the_box_is_not_found(norm: Norm) -> None:
    case = affine(norm, UNIT, 6, classes=2, seed=2, tilt=4)
    assert case.distance.isinf().all()
    found = smallest(DeepFool(norm=norm, steps=20), case.model, case.x, case.y)
    assert found.success is not None
    assert not found.success.any()
    assert torch.equal(found.x, case.x)


@each_norm
def test_follows_a_model_whose_slope_misleads(norm: Norm) -> None:
    case = kinked(norm)
    length = lengths(smallest(DeepFool(norm=norm, box=WIDE), case.model, case.x, case.y), case.x, norm)
    assert (length >= case.distance * (1 - 1e-9)).all()
    assert (length <= case.distance * CLOSE[norm]).all()


def test_is_the_effective_margin_of_a_linear_model() -> None:
    """The worked example: 0.122474 for both samples."""
    weight = torch.tensor([[1.0, 0, 2], [0, -1, 1], [2, 1, 0], [0, 0, 1]], dtype=torch.float64)
    x = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=torch.float64)
    found = smallest(DeepFool(norm="l2", box=WIDE), linear(weight), x, torch.tensor([0, 0]))
    exact = torch.tensor([0.122474, 0.122474]).double()
    torch.testing.assert_close(lengths(found, x, "l2"), exact, rtol=0, atol=1e-6)


def test_candidates_bound_the_cost_and_are_the_likeliest() -> None:
    """Class 1 is ahead of class 2, but class 2 is nearer: with one candidate it is not seen."""
    weight = torch.tensor([[0.0, 0], [1, 0], [0, 4]], dtype=torch.float64)
    model = Counting(linear(weight, torch.tensor([0.0, -1, -1.2])))
    x, y = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3).long()
    one = smallest(DeepFool(norm="l2", box=WIDE, candidates=1), model, x, y)
    assert (model.forwards, model.backwards) == (51 * 3, 51 * 3)
    torch.testing.assert_close(lengths(one, x, "l2"), torch.ones(3).double(), rtol=1e-6, atol=0)
    both = smallest(DeepFool(norm="l2", box=WIDE, candidates=10), model, x, y)
    torch.testing.assert_close(lengths(both, x, "l2"), torch.full((3,), 0.3).double(), rtol=1e-6, atol=0)


@each_norm
def test_target_that_is_aimed_at_is_reached_by_the_shortest_way(norm: Norm) -> None:
    """Of three classes: where the third is not in the way, the distance is that to the hyperplane of two."""
    case = affine(norm, WIDE, 64, classes=3, seed=4)
    target = (case.y + 1) % 3
    found = smallest(DeepFool(norm=norm, box=WIDE), case.model, case.x, case.y, target=target)
    exact = case.each.gather(1, target[:, None]).squeeze(1)
    other = case.each.gather(1, ((case.y + 2) % 3)[:, None]).squeeze(1)
    length, direct = lengths(found, case.x, norm), other > 2 * exact
    assert direct.sum() > 8
    torch.testing.assert_close(length[direct], exact[direct], rtol=1e-6, atol=0)
    assert found.success is not None
    assert found.success[direct].all()
    assert (length >= exact * (1 - 1e-9))[found.success].all()


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"overshoot": -0.1}, {"candidates": 0}], ids=str)
def test_refuses_hyper_parameters_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        DeepFool(**wrong)  # type: ignore[arg-type]
