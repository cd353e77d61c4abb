"""Random points of the ball."""

from __future__ import annotations

import pytest
import torch
from attack_oracles import linear
from torch import Tensor

from wideberth.attacks.random_noise import RandomNoise
from wideberth.checks import InputError, Norm

WIDE = (-10.0, 10.0)
ORDER: dict[Norm, float] = {"linf": float("inf"), "l2": 2, "l1": 1}
each_norm = pytest.mark.parametrize("norm", list(ORDER))


def half_plane(limit: float, features: int = 2) -> torch.nn.Module:
    """Class 1 exactly where the first entry exceeds the limit."""
    weight = torch.zeros(2, features, dtype=torch.float64)
    weight[1, 0] = 1
    return linear(weight, torch.tensor([limit, 0.0]))


def origin(rows: int, features: int = 2) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, features, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64)


@each_norm
def test_one_draw_breaks_as_many_rows_as_the_volume_beyond_the_boundary(norm: Norm) -> None:
    """Of the unit ball in two dimensions, the share with a first entry above 1/2 is known."""
    share = {"linf": 0.25, "l2": (torch.pi / 3 - 3**0.5 / 4) / torch.pi, "l1": 0.125}[norm]
    x, y = origin(20_000)
    broken = RandomNoise(norm=norm, box=WIDE, tries=1)(half_plane(0.5), x, y, eps=1.0).success
    assert broken.double().mean().item() == pytest.approx(share, abs=0.01)


@each_norm
def test_more_tries_break_as_many_rows_as_independent_draws_do(norm: Norm) -> None:
    x, y = origin(10_000)
    once, often = (
        RandomNoise(norm=norm, box=WIDE, tries=tries)(half_plane(0.5), x, y, eps=1.0).success.double().mean().item()
        for tries in (1, 5)
    )
    assert often == pytest.approx(1 - (1 - once) ** 5, abs=0.02)


@each_norm
def test_worst_is_the_highest_of_all_draws_and_first_flip_the_first_beyond(norm: Norm) -> None:
    """A single try with k more before it returns a point at least as bad; the first flip stays where it was."""
    x, y = origin(500)
    model = half_plane(0.5)
    previous = torch.full((500,), -10.0, dtype=torch.float64)
    first: Tensor | None = None
    for tries in range(1, 6):
        worst = RandomNoise(norm=norm, box=WIDE, tries=tries)(model, x, y, eps=1.0)
        flip = RandomNoise(norm=norm, box=WIDE, tries=tries, keep="first_flip")(model, x, y, eps=1.0)
        reached = worst.x[:, 0]
        assert (reached >= previous).all()
        assert torch.equal(worst.success, flip.success)
        assert torch.equal(worst.x[~worst.success], flip.x[~flip.success])
        if first is not None:
            gone = (first[:, 0] > 0.5).nonzero().squeeze(1)
            assert torch.equal(flip.x[gone], first[gone])
        previous, first = reached, flip.x
    assert (worst.x[:, 0] > flip.x[:, 0]).any()


def test_it_is_weak_in_many_dimensions() -> None:
    """In l2, a random direction is nearly at right angles to the one that matters."""
    x, y = origin(50, 1000)
    assert not RandomNoise(norm="l2", box=WIDE, tries=20)(half_plane(0.2, 1000), x, y, eps=1.0).success.any()


def test_refuses_no_tries_and_a_last_point() -> None:
    with pytest.raises(InputError, match="tries=0"):
        RandomNoise(tries=0)
    with pytest.raises(InputError, match="keep='last'"):
        RandomNoise(keep="last")  # type: ignore[arg-type]
