"""Fewer rows are those of `test_rows`; where the order may be by class, they are a sample of all."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from wideberth.checks import InputError
from wideberth.data import Data, Digits, Split, Tensors, selected_rows

X, Y = torch.rand(60, 3), torch.arange(60) // 20


class ByClass(Tensors):
    """As image folders are: all of a class, then all of the next."""

    _by_class = True


@pytest.mark.parametrize("kind", [Tensors, ByClass])
@pytest.mark.parametrize("limit", [None, 40])
def test_fewer_rows_of_a_data_set_are_those_of_test_rows(kind: type[Tensors], limit: int | None) -> None:
    data, limited = kind(X, Y, X, Y, test_rows=limit), kind(X, Y, X, Y, test_rows=12)
    positions, words = selected_rows(data, 12)
    assert torch.equal(data.test().rows[positions], limited.test().rows)
    assert torch.equal(data.test(12).rows, limited.test().rows)
    by_class = kind is ByClass
    assert (data.test().labels[positions].unique().numel() == 3) == by_class
    assert words == f"{'a fixed random sample of' if by_class else 'the first'} 12 of {limit or 60}"


def test_of_anything_else_they_are_a_sample() -> None:
    source = Tensors(X, Y, X, Y).test()
    for samples in (source, TensorDataset(X, Y), (X, Y)):
        positions, words = selected_rows(samples, 12)
        assert len(positions) == 12
        assert (positions.diff() > 0).all()
        assert Y[positions].unique().numel() == 3
        assert words == "a fixed random sample of 12 of 60"
        fewer, _ = selected_rows(samples, 5)
        assert set(fewer.tolist()) < set(positions.tolist())


def test_all_rows_where_there_are_no_more() -> None:
    for samples in (Digits(test_rows=9), Split(Digits().test().source, torch.arange(9))):
        for rows in (None, 9, 100):
            positions, words = selected_rows(samples, rows)
            assert torch.equal(positions, torch.arange(9))
            assert words == "all 9"


def test_refusals() -> None:
    data: Data = Digits()
    with pytest.raises(InputError, match="rows=0: must be at least 1"):
        selected_rows(data, 0)
    with pytest.raises(InputError, match=r"tensors of lengths \[60, 3\]"):
        selected_rows((X, Y[:3]), 2)
