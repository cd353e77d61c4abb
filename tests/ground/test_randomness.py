"""Keyed noise: the same whatever the batch, and as good as independent whatever differs in its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Tensor

from wideberth.randomness import Noise, fold, permutation

INDEX = torch.arange(64) * 3 + 1
DRAWS: dict[str, Callable[[Noise, tuple[int, ...]], Tensor]] = {
    "bits": lambda noise, shape: noise.bits(shape),
    "uniform": lambda noise, shape: noise.uniform(shape),
    "uniform64": lambda noise, shape: noise.uniform(shape, torch.float64),
    "normal": lambda noise, shape: noise.normal(shape),
    "normal64": lambda noise, shape: noise.normal(shape, torch.float64),
    "sign": lambda noise, shape: noise.sign(shape),
    "integer": lambda noise, shape: noise.integer(10, shape),
}

each_draw = pytest.mark.parametrize("name", list(DRAWS))


@each_draw
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    draw = DRAWS[name]
    together = draw(Noise(INDEX, seed=3, draw=2), (2, 5))
    assert together.shape == (64, 2, 5)
    order = permutation(0, 0, 64)
    assert torch.equal(draw(Noise(INDEX[order], seed=3, draw=2), (2, 5)), together[order])
    for row in (0, 17, 63):
        assert torch.equal(draw(Noise(INDEX[row : row + 1], seed=3, draw=2), (2, 5))[0], together[row])


@each_draw
def test_draws_per_row_are_those_of_numbers(name: str) -> None:
    draw = DRAWS[name]
    numbers = torch.arange(64) % 4
    mixed = draw(Noise(INDEX, seed=3).at(numbers), (5,))
    for number in range(4):
        alone = draw(Noise(INDEX, seed=3).at(number), (5,))
        assert torch.equal(mixed[numbers == number], alone[numbers == number])


def test_no_global_generator_is_read_or_moved() -> None:
    state = torch.random.get_rng_state()
    first = [draw(Noise(INDEX), (3,)) for draw in DRAWS.values()], permutation(1, 2, 10)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    second = [draw(Noise(INDEX), (3,)) for draw in DRAWS.values()], permutation(1, 2, 10)
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert torch.equal(first[1], second[1])


def test_values_are_fixed_for_good() -> None:
    """A run resumed by another version of the library must meet the same noise."""
    found = Noise(torch.tensor([0, 7]), seed=1, draw=2).bits((2,))
    assert found.tolist() == [
        [-369299130223196393, 8509033553114938270],
        [4021218558499595214, 3504855123388403722],
    ]
    assert fold(0, "attack", 3) == 6328128215687691214


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_uniform_is_below_one_in_every_dtype(dtype: torch.dtype) -> None:
    found = Noise(torch.arange(2000)).uniform((100,), dtype)
    assert found.dtype == dtype
    assert found.min() >= 0
    assert found.max() < 1
    assert found.double().mean().item() == pytest.approx(0.5, abs=0.005)


def test_float64_uniform_has_more_than_the_bits_of_float32() -> None:
    found = Noise(torch.arange(1000)).uniform((10,), torch.float64)
    assert (found != found.float().double()).double().mean() > 0.99
    assert found.unique().numel() == 10_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "law"), [("uniform", "uniform"), ("normal", "norm")])
def test_values_follow_their_law(name: str, law: str, dtype: torch.dtype) -> None:
    """Down each row, across rows of neighbouring indices, and over draws of one index."""
    draw: Any = getattr(Noise, name)
    samples = {
        "row": draw(Noise(torch.tensor([5]), seed=11), (20_000,), dtype).flatten(),
        "indices": draw(Noise(torch.arange(20_000), seed=11), (), dtype),
        "draws": draw(Noise(torch.full((20_000,), 5), seed=11).at(torch.arange(20_000)), (), dtype),
        "seeds": torch.cat([draw(Noise(torch.tensor([5]), seed=seed), (4,), dtype)[0] for seed in range(2000)]),
    }
    for kind, values in samples.items():
        assert kstest(values.double().numpy(), law).pvalue > 0.005, kind


def test_moments() -> None:
    noise, shape = Noise(torch.arange(500), seed=2), (400,)
    normal, uniform, sign = noise.normal(shape), noise.uniform(shape), noise.sign(shape)
    assert normal.mean().item() == pytest.approx(0, abs=0.01)
    assert normal.var().item() == pytest.approx(1, abs=0.015)
    assert normal.pow(4).mean().item() == pytest.approx(3, abs=0.1)
    assert uniform.var().item() == pytest.approx(1 / 12, abs=0.001)
    assert set(sign.unique().tolist()) == {-1.0, 1.0}
    assert sign.mean().item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("high", [2, 3, 10, 1000])
def test_integers_are_uniform_below_their_limit(high: int) -> None:
    found = Noise(torch.arange(1000), seed=4).integer(high, (50,))
    counts = torch.bincount(found.flatten(), minlength=high)
    assert len(counts) == high
    assert chisquare(counts.numpy()).pvalue > 0.005


@pytest.mark.parametrize(
    "other",
    [
        Noise(INDEX + 1),
        Noise(INDEX + 64 * 3),
        Noise(INDEX, seed=1),
        Noise(INDEX, seed=2**40),
        Noise(INDEX, draw=1),
        Noise(INDEX).fold("sign"),
        Noise(INDEX).fold("reach"),
        Noise(INDEX).fold(0),
        Noise(-INDEX),
        Noise(INDEX.flip(0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["uniform64", "normal64", "sign"])
def test_streams_of_different_names_are_unrelated(name: str, other: Noise) -> None:
    """Correlations of 64 x 500 pairs have a deviation of 0.0056; also those of one stream shifted by one element."""
    ours, theirs = DRAWS[name](Noise(INDEX), (500,)), DRAWS[name](other, (500,))

    def correlation(a: Tensor, b: Tensor) -> float:
        return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])

    assert abs(correlation(ours, theirs)) < 0.02
    assert abs(correlation(ours[:, 1:], theirs[:, :-1])) < 0.02
    assert abs(correlation(ours[:, 1:], ours[:, :-1])) < 0.02
    assert not (ours == theirs).all(1).any()


def test_elements_of_a_row_and_rows_of_an_element_are_unrelated() -> None:
    found = Noise(torch.arange(3000)).normal((20,), torch.float64)
    across = torch.corrcoef(found.T) - torch.eye(20)
    along = torch.corrcoef(found.T.reshape(20 * 3, 1000)) - torch.eye(60)
    assert across.abs().max() < 0.08
    assert along.abs().max() < 0.15


def test_fold_tells_seeds_words_orders_and_numbers_apart() -> None:
    names: list[tuple[int | str, ...]] = [
        (),
        ("attack",),
        ("attack", 0),
        ("attack", 1),
        (0, "attack"),
        (1, "attack"),
        ("attack", "attack"),
        ("order", 0),
        (0,),
        (0, 0),
        (-1,),
        (2**63,),
        (2**70,),
        ("a rather long purpose, longer than eight bytes",),
        ("a rather long purpose, longer than eight bytez",),
        *[("epoch", epoch, "batch", batch) for epoch in range(30) for batch in range(30)],
    ]
    seeds = [0, 1, 2, -1, 2**31, 2**63, 123456789]
    found = {fold(seed, *words) for seed in seeds for words in names}
    assert len(found) == len(seeds) * len(names)
    assert all(0 <= value < 2**63 for value in found)


def test_folding_twice_is_not_folding_once() -> None:
    noise = Noise(INDEX)
    names = [noise.seed, noise.fold("a").seed, noise.fold("a").fold("a").seed, noise.fold("a", "a").seed]
    assert len(set(names)) == 4


@pytest.mark.parametrize("size", [1, 2, 97])
def test_permutation_holds_every_position_once(size: int) -> None:
    assert permutation(3, 4, size).sort().values.tolist() == list(range(size))


def test_permutation_depends_on_seed_and_epoch_alone() -> None:
    orders = {tuple(permutation(seed, epoch, 50).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert torch.equal(permutation(3, 4, 50), permutation(3, 4, 50))
