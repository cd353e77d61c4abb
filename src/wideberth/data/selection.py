"""Which samples an evaluation of fewer rows reads: the same for the command line, Python and `test_rows`."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from wideberth.checks import at_least
from wideberth.data.reading import Readable, count
from wideberth.data.sources import Data
from wideberth.data.splits import Split, sample_rows

DataSet: TypeAlias = Data | Readable
"""What can be evaluated: a `Data` (its test split), a split, any data set of (x, y), or tensors (x, y)."""


def selected_rows(samples: DataSet, rows: int | None = None) -> tuple[Tensor, str]:
    """Which samples are read where only `rows` of them are asked for, and in words how they were chosen.

    Of a `Data`, they are those that `test_rows=rows` takes. Of anything else, whose order may be by class, they are a
    fixed random sample.

    Args:
        samples: what is evaluated.
        rows: how many samples; all if None, or where there are fewer.

    Returns:
        Positions in the test split, the split, the data set or the tensors, ascending, (n,) int64; and words for the
        record, such as "all 500" or "a fixed random sample of 60 of 500".

    Raises:
        InputError: where `rows` is below 1, or tensors have no label for each input.
    """
    if rows is not None:
        at_least("rows", rows, 1)
    whole = samples.test() if isinstance(samples, Data) else samples
    size = count(whole)
    if rows is None or rows >= size:
        return torch.arange(size), f"all {size}"
    if isinstance(samples, Data) and isinstance(whole, Split):
        wanted = samples.test(rows).rows
        by_row, order = whole.rows.sort()
        positions = order[torch.searchsorted(by_row, wanted)].sort().values
    else:
        positions = sample_rows(size, rows)
    first = torch.equal(positions, torch.arange(rows))
    return positions, f"the first {rows} of {size}" if first else f"a fixed random sample of {rows} of {size}"
