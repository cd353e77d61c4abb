"""Splits: what they yield, and which index names a sample."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from wideberth.checks import InputError
from wideberth.data import Data, Digits, FromDatasets, InMemory, Lazy, Split, Tensors


class Pairs(Dataset[Any]):
    """A user's data set."""

    def __init__(self, pairs: list[Any]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> Any:
        return self.pairs[row]


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def tensors(**options: Any) -> Tensors:
    return Tensors(images(20), torch.arange(20) % 3, images(9, 1), torch.arange(9) % 3, **options)


def from_datasets(**options: Any) -> FromDatasets:
    halves = [Pairs([(x / 255, i % 3) for i, x in enumerate(images(n, seed))]) for n, seed in ((20, 0), (9, 1))]
    return FromDatasets(*halves, classes=3, **options)


@pytest.mark.parametrize("make", [tensors, from_datasets, Digits])
def test_a_split_yields_x_y_index(make: Any) -> None:
    data: Data = make(validation=5)
    for split in (data.train(), data.validation(), data.test()):
        assert split is not None
        x, y, index = split.__getitems__([2, 0, 1])
        assert x.dtype == torch.float32
        assert y.dtype == index.dtype == torch.int64
        assert x.shape == (3, *data.shape)
        assert y.shape == index.shape == (3,)
        assert data.box[0] <= x.min()
        assert x.max() <= data.box[1]
        one = split[2]
        assert all(torch.equal(a, b[0]) for a, b in zip(one, (x, y, index), strict=True))
        everything = split.tensors()
        assert torch.equal(everything[0][[2, 0, 1]], x)
        assert torch.equal(everything[1], split.labels)
        assert torch.equal(everything[2], split.rows)
        assert len(split) == len(split.labels)
        assert set(split.labels.tolist()) <= set(range(data.classes))


@pytest.mark.parametrize("make", [tensors, from_datasets])
def test_index_is_the_row_in_the_source(make: Any) -> None:
    full = make().train().tensors()
    assert full[2].tolist() == list(range(20))
    for options in ({"train_rows": 12}, {"validation": 7}, {"train_rows": 12, "validation": 5, "validation_seed": 3}):
        data = make(**options)
        for split in (data.train(), data.validation()):
            if split is not None:
                x, y, index = split.tensors()
                assert torch.equal(x, full[0][index])
                assert torch.equal(y, full[1][index])
                assert split.source_size == 20


def test_held_out_rows_are_disjoint_and_keyed() -> None:
    data = tensors(train_rows=15, validation=6)
    held_out = data.validation()
    assert held_out is not None
    assert len(held_out) == 6
    assert sorted(held_out.rows.tolist() + data.train().rows.tolist()) == list(range(15))
    again = tensors(train_rows=15, validation=6).validation()
    other = tensors(train_rows=15, validation=6, validation_seed=1).validation()
    assert again is not None
    assert other is not None
    assert torch.equal(again.rows, held_out.rows)
    assert not torch.equal(other.rows, held_out.rows)
    assert tensors().validation() is None
    assert len(tensors(test_rows=4).test()) == 4


def test_digits_are_real_and_fixed() -> None:
    train, test = Digits().train(), Digits().test()
    assert (len(train), len(test)) == (1297, 500)
    assert train.tensors()[0].max() == 1
    assert torch.bincount(test.labels, minlength=10).min() > 30
    seen = {tuple(x.flatten().tolist()) for x in train.tensors()[0]}
    assert not any(tuple(x.flatten().tolist()) in seen for x in test.tensors()[0])
    assert test.labels[:8].tolist() == Digits().test().labels[:8].tolist()


def test_uint8_stays_uint8_until_fetched() -> None:
    x = images(4)
    source = InMemory(x, torch.arange(4) % 2, classes=2)
    assert source.x.data_ptr() == x.data_ptr()
    assert torch.equal(source.fetch(torch.tensor([3]))[0], x[3:].to(torch.float32) / 255)


def test_any_rank_and_float_dtype() -> None:
    x = torch.rand(6, 5, dtype=torch.float64) * 4 - 2
    data = Tensors(x.numpy(), torch.arange(6) % 2, x, torch.arange(6) % 2, box=(-2, 2))
    assert data.shape == (5,)
    assert data.classes == 2
    assert torch.equal(data.train().tensors()[0], x.float())


def test_a_split_survives_pickling() -> None:
    split = tensors(validation=3).train()
    assert torch.equal(pickle.loads(pickle.dumps(split)).tensors()[0], split.tensors()[0])


def test_lazy_labels_come_from_targets_or_from_reading() -> None:
    pairs = Pairs([(torch.zeros(2), i % 3) for i in range(7)])
    assert Lazy(pairs, classes=3).labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    pairs.targets = [2] * 7  # type: ignore[attr-defined]
    assert Lazy(pairs, classes=3).labels.tolist() == [2] * 7


X, Y = torch.rand(4, 3), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tensors(X, Y, X + 1, Y), r"x_test spans \[1\..*\]: must lie in the box \[0\.0, 1\.0\]"),
        (lambda: Tensors(X / 0, Y, X, Y), "x_train holds NaN or infinite values"),
        (lambda: Tensors(X * torch.nan, Y, X, Y), "x_train holds NaN or infinite values"),
        (lambda: Tensors(X, Y, X, Y - 1), "y_test spans -1..0: with 2 classes"),
        (lambda: Tensors(X, Y, X, Y + 1, classes=2), r"y_test spans 1..2: with 2 classes, labels must be in 0\.\.1"),
        (lambda: Tensors(X, Y * 0, X, Y * 0), "classes=1: must be at least 2"),
        (lambda: Tensors(X[:0], Y[:0], X, Y), r"x_train of shape \(0, 3\): .* at least one sample"),
        (lambda: Tensors(X, Y[:3], X, Y), r"y_train of shape \(3,\)"),
        (lambda: Tensors(X, Y.float(), X, Y), r"y_train of shape \(4,\) and torch.float32"),
        (lambda: Tensors(X.long(), Y, X, Y), "x_train is torch.int64: must be floating point"),
        (lambda: Tensors(X, Y, X[:, :2], Y), r"x_test has inputs of shape \(2,\): must be \(3,\)"),
        (lambda: Tensors(X, Y, X, Y, box=(1, 0)), r"box=\(1, 0\): must be"),
        (lambda: Tensors(images(4), Y, images(4), Y, box=(-1, 0.5)), r"x_train spans \[0, 1\]: must lie in"),
        (lambda: Tensors(X, Y, X, Y, train_rows=0), "train_rows=0: must be at least 1"),
        (lambda: Tensors(X, Y, X, Y, validation=-1), "validation=-1: must be at least 0"),
        (lambda: Tensors(X, Y, X, Y, validation=4).train(), "validation=4: must leave some of the 4 training rows"),
        (lambda: Tensors(X, Y, X, Y, train_rows=5).train(), "train_rows=5: Tensors has 4 train rows"),
        (lambda: Tensors(X, Y, X, Y, test_rows=5).test(), "test_rows=5: Tensors has 4 test rows"),
        (lambda: Split(InMemory(X, Y, classes=2), torch.tensor([4])), r"rows of shape \(1,\): .* 0\.\.3"),
        (lambda: FromDatasets(Pairs([]), Pairs([(X[0], 0)]), classes=2), "train is empty"),
        (lambda: FromDatasets(Pairs([(X[0], 0)]), Pairs([X[0]]), classes=2), "test yields a Tensor: must yield pairs"),
        (lambda: FromDatasets(Pairs([("a", 0)]), Pairs([]), classes=2), "test is empty"),
        (lambda: Lazy(Pairs([("a", 0)]), classes=2).labels, "dataset yields x as str: must be a tensor"),
        (lambda: Lazy(Pairs([(X[0], 0.5)]), classes=2).labels, "dataset yields y as float 0.5: must be an integer"),
        (lambda: Lazy(Pairs([(X[0], 2)]), classes=2).labels, "labels of dataset spans 2..2: with 2 classes"),
        (lambda: Lazy(Dataset(), classes=2), "dataset is a Dataset without a length"),
        (lambda: Lazy(Pairs([(X[0] + 1, 0)]), classes=2).fetch(torch.tensor([0])), r"dataset spans \[1\."),
        (
            lambda: Lazy(Pairs([(X[0], 0), (X[0, :2], 0)]), classes=2).fetch(torch.tensor([0, 1])),
            r"dataset yields samples of shapes \[\(2,\), \(3,\)\]",
        ),
    ],
)
def test_bad_data_are_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        make()
    assert re.search(message, str(refusal.value))
    assert "\n" not in str(refusal.value)
