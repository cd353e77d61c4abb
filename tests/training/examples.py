"""One example of every policy that is exported: by default arguments, or by a row where these will not do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import wideberth as wb
from wideberth.training.catalogue import exported

WEIGHT = 0.01
ROWS: dict[str, Callable[[], Any]] = {
    # Needs arguments.
    "ClassWise": lambda: wb.radii.ClassWise([0.05 + 0.01 * k for k in range(10)]),
    "LBGAT": lambda: wb.objectives.LBGAT(wb.models.MLP((64,), 10, (8,), batch_norm=True)),
    # Would do nothing in the first epoch.
    "InstanceAdaptive": lambda: wb.radii.InstanceAdaptive(0.1, warmup=0),
    "ShortestSuccessful": lambda: wb.radii.ShortestSuccessful(0.3, 0.05),
    "MAIL": lambda: wb.weightings.MAIL(start=0),
    "GAIRAT": lambda: wb.weightings.GAIRAT(start=0),
    # Would take long.
    "LocalLinearity": lambda: wb.regularizers.LocalLinearity(WEIGHT, 0.1, steps=1),
}


def examples(option: str) -> dict[str, Callable[[], Any]]:
    """What makes one policy of each exported class of a kind, by name; a regularizer has the weight `WEIGHT`."""
    given = {"weight": WEIGHT} if option == "regularizers" else {}
    return {name: ROWS.get(name, partial(kind, **given)) for name, kind in exported(option).items()}
