"""Which evaluation it is: what is known of it before the search, and the name under which its record is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from wideberth.configuration import describe
from wideberth.data import Data, DataSet
from wideberth.evaluation.protocol import Protocol

DISTINCT = ("data", "split", "rows", "norm", "eps", "box", "suite", "seed", "radii")
"""The entries of a protocol in which two evaluations of one model may differ: each combination has its own record."""


def describe_samples(samples: DataSet, rows: str) -> dict[str, Any]:
    """What a record says of the evaluated samples: data, split, and in words which rows (see `selected_rows`)."""
    known = isinstance(samples, Data)
    return {
        "data": describe(samples) if known else type(samples).__name__,
        "split": "test" if known else "given",
        "rows": rows,
    }


def describe_search(protocol: Protocol, eps: float | Tensor) -> dict[str, Any]:
    """What a record says of the search that is known before it.

    Args:
        protocol: how the evaluation proceeds.
        eps: one radius, or one per evaluated sample, (n,), of which the record tells the least, the greatest, and the
            mean.
    """
    return {
        "norm": protocol.norm,
        "eps": radii_summary(eps) if isinstance(eps, Tensor) else float(eps),
        "box": [float(side) for side in protocol.box],
        "suite": protocol.suite if isinstance(protocol.suite, str) else "custom",
        "seed": protocol.seed,
        "radii": protocol.radii,
    }


def radii_summary(eps: Tensor) -> dict[str, Any]:
    """What a protocol says of one radius per sample (n,): that there is one, the least, the mean and the greatest."""
    values = eps.double()
    return {
        "per_sample": True,
        "min": float(values.min()),
        "mean": float(values.mean()),
        "max": float(values.max()),
    }


def record_name(protocol: Mapping[str, Any], count: int, eps: Tensor | np.ndarray[Any, Any] | None = None) -> str:
    """The folder's name of a record, such as "linf-0.0314-standard-n500-3fa9c2": readable, and one for each protocol.

    Args:
        protocol: holds the entries of `DISTINCT`; for a custom suite also `attacks`, whose settings then count.
        count: how many samples are evaluated.
        eps: the radius of each, (n,), where each has its own.
    """
    told: dict[str, Any] = {key: protocol.get(key) for key in DISTINCT} | {"n": count}
    if protocol.get("suite") == "custom":
        told["attacks"] = [(attack.get("name"), attack.get("settings")) for attack in protocol.get("attacks") or ()]
    size = protocol.get("eps")
    if eps is not None:
        values = np.asarray(eps.cpu() if isinstance(eps, Tensor) else eps, dtype=np.float32)  # in a table: float64, too
        told["eps"] = hashlib.sha256(values.tobytes()).hexdigest()
        size_text = f"mean{values.mean(dtype=np.float64):.3g}"
    else:
        size_text = f"{size:.3g}" if isinstance(size, int | float) else "eps"
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:6]
    return f"{protocol.get('norm')}-{size_text}-{protocol.get('suite')}-n{count}-{digest}"
