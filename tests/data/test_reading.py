"""Batches of any kind of data come out alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from wideberth.checks import InputError
from wideberth.data import InMemory, Split, batches, count, read

X = torch.rand(7, 2, 3)
Y = torch.arange(7) % 3


class Named(Dataset[Any]):
    """(x, y, index) in falling order."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, place: int) -> tuple[Tensor, int, int]:
        return X[6 - place], int(Y[6 - place]), 6 - place


@pytest.mark.parametrize(
    ("source", "order"),
    [
        pytest.param((X, Y), range(7), id="tensors"),
        pytest.param(TensorDataset(X, Y), range(7), id="data set"),
        pytest.param(Split(InMemory(X, Y, classes=3)), range(7), id="split"),
        pytest.param(Split(InMemory(X, Y, classes=3), torch.tensor([5, 0, 3])), [5, 0, 3], id="part"),
        pytest.param(Named(), range(6, -1, -1), id="with index"),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_all_sources_are_read_alike(source: Any, order: Any, batch_size: int) -> None:
    parts = list(batches(source, batch_size=batch_size))
    assert count(source) == len(order)
    assert all(len(part[1]) <= batch_size for part in parts)
    x, y, index = (torch.cat(column) for column in zip(*parts, strict=True))
    rows = torch.tensor(list(order))
    assert torch.equal(x, X[rows])
    assert torch.equal(y, Y[rows])
    assert torch.equal(index, rows)
    some = read(source, torch.tensor([2, 0]))
    assert torch.equal(some[0], X[rows[[2, 0]]])
    assert [part[2].tolist() for part in batches(source, [2, 0, 1], 2)] == [rows[[2, 0]].tolist(), [int(rows[1])]]


def test_what_cannot_be_read_is_refused() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(())

    for source, message in [
        (TensorDataset(X, Y + 0.5), r"data: sample 0 has label tensor\(0.5000\): must be an integer class"),
        ([(1.0, 2)], "data: sample 0 is no"),
        ([(X[0],)], "data: sample 0 is no"),
    ]:
        with pytest.raises(InputError, match=message):
            read(source, [0])
    with pytest.raises(InputError, match=r"data: tensors of lengths \[7, 2\]"):
        count((X, Y[:2]))
    with pytest.raises(InputError, match="a Endless without a length"):
        count(Endless())
    with pytest.raises(InputError, match="batch_size=0"):
        next(batches((X, Y), batch_size=0))
