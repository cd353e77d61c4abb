"""What a model is attacked within: the norm and the radius, as they were asked for or as the run was trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import torch
from torch import Tensor

from wideberth.checks import InputError, Norm
from wideberth.configuration import construct, import_object
from wideberth.data import Data, selected_rows
from wideberth.reports.records import NORMS, radii_text, size_text
from wideberth.runs import Run, reading
from wideberth.training.radii import Radius
from wideberth.training.schedules import Schedule
from wideberth.trust import NotTrusted, check

NORM: Norm = "linf"
EPS = 8 / 255
"""Norm and radius where neither the command nor the run names them."""


@dataclass(frozen=True)
class Threat:
    """The perturbations that are searched.

    Attributes:
        norm: "linf", "l2" or "l1".
        eps: the radius, or one per row of the test split, (N,) float32.
        reason: one line for the user: which they are, and why.
    """

    norm: Norm
    eps: float | Tensor
    reason: str


@dataclass(frozen=True)
class Trained:
    """What a run was trained for.

    Attributes:
        norm: of its attack; None where that has none, or nothing was attacked.
        eps: what its radius policy is evaluated at; 0 where nothing was perturbed, None where that is not known.
        radius: the name of the policy.
    """

    norm: Norm | None
    eps: float | None
    radius: str


def threat(model: str, norm: Norm | None, eps: float | str | None, data: Data, rows: int | None = None) -> Threat:
    """Norm and radius of an evaluation.

    Args:
        model: as the command line names it; a run directory tells what it was trained for.
        norm: as asked for; by default that of the run's attack, else linf.
        eps: as asked for: a number, or FILE.parquet:COLUMN with one radius per test sample; by default the radius that
            the run was trained for, else 8/255.
        data: whose test split the radii of a file belong to.
        rows: how many of its rows are evaluated.

    Raises:
        InputError: where a file of radii cannot be used, or there is no default that fits the norm.
    """
    trained = trained_for(Run(model).config) if (Path(model) / "config.yaml").is_file() else None
    perturbed = trained is not None and trained.eps != 0 and trained.norm is not None
    own = trained.norm if trained is not None and perturbed else None
    chosen: Norm = norm or own or NORM
    named = f"norm {NORMS[chosen]} ({'as asked for' if norm else f'attack of {model}' if own else 'the default'})"
    if isinstance(eps, str):
        radii = radii_of(eps, data, rows)
        used = radii[selected_rows(data, rows)[0]]
        in_words = radii_text(*(float(value) for value in (used.mean(), used.min(), used.max())))
        return Threat(chosen, radii, f"{named}, {in_words} (from {eps})")
    if eps is not None:
        return Threat(chosen, eps, f"{named}, eps {size_text(eps)} (as asked for)")
    if chosen != (own or NORM):
        raise InputError(f"--eps: needed with --norm {chosen}, since the default radius is one in {own or NORM}")
    if trained is None or not perturbed:
        why = "the default" if trained is None else f"the default: {model} was trained without perturbations"
        return Threat(chosen, EPS, f"{named}, eps {size_text(EPS)} ({why})")
    if trained.eps is None:
        raise InputError(f"--eps: needed, since only the class {trained.radius} knows what {model} was trained for")
    return Threat(chosen, trained.eps, f"{named}, eps {size_text(trained.eps)} (radius {trained.radius} of {model})")


def trained_for(config: dict[str, Any]) -> Trained:
    """What a run was trained for, from its configuration. Only classes of wideberth itself are called.

    Raises:
        InputError: where the configuration's radius cannot be built.
    """
    attack, radius = config.get("attack"), config.get("radius")
    arguments = attack.get("init_args") if isinstance(attack, dict) else None
    norm = arguments.get("norm", NORM if _is_ours(attack) else None) if isinstance(arguments, dict) else NORM
    known: Norm | None = norm if norm in get_args(Norm) else None
    if not isinstance(radius, dict):
        return Trained(known, 0.0, "none")
    path = str(radius.get("class_path"))
    built = _built(radius) if _is_ours(radius) else None
    return Trained(known, built.eval_eps() if isinstance(built, Radius) else None, path.rpartition(".")[2])


def _is_ours(value: object) -> bool:
    return isinstance(value, dict) and str(value.get("class_path")).startswith("wideberth.")


def _built(value: Any) -> Any:
    """A radius policy or a schedule of wideberth from its configuration, which may come from a stranger."""
    if isinstance(value, list):
        return [_built(item) for item in value]
    if not _is_ours(value):
        return value
    path = str(value["class_path"])
    try:  # a path such as wideberth.runs:os.system begins with our name, too
        check({"class_path": path}, Radius | Schedule, "config.yaml", "radius")
    except NotTrusted:
        raise InputError(
            f"config.yaml: radius: {path!r} is neither a radius policy nor a schedule; give --eps"
        ) from None
    kind = import_object(path)
    return construct(kind, path, **{str(key): _built(item) for key, item in (value.get("init_args") or {}).items()})


def radii_of(text: str, data: Data, rows: int | None = None) -> Tensor:
    """The radii that FILE.parquet:COLUMN holds for the test samples, (N,) float32, N rows in the test split.

    Rows are matched by the column `index`, the data set's own numbering; a table without it must have one row per test
    sample, in their order. Where the table has a column `label`, its labels must be those of the samples.

    Args:
        text: FILE.parquet:COLUMN.
        data: whose test split is evaluated.
        rows: how many of its rows; only these need a radius, the others get 0.

    Raises:
        InputError: where there is no such file or column, or some sample has no radius of its own that is finite and
            >= 0.
    """
    table, column = _column(text)
    split = data.test()
    positions, _ = selected_rows(data, rows)
    if "index" not in table:
        if len(table) != len(split):
            raise InputError(f"--eps {text}: has {len(table)} rows and no column 'index', the test split {len(split)}")
        table = table.assign(index=split.rows.numpy())
    if table["index"].duplicated().any():
        raise InputError(f"--eps {text}: holds some 'index' twice; must have one row per sample")
    found = table.set_index("index").reindex(split.rows[positions].tolist())
    missing = found.index[found[column].isna()]
    if len(missing):
        listed = ", ".join(str(row) for row in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(f"--eps {text}: has no radius for {len(missing)} of {len(found)} test samples: index {listed}")
    if "label" in found and (found["label"].to_numpy() != split.labels[positions].numpy()).any():
        raise InputError(f"--eps {text}: its labels are not those of the test samples; is it a table of other samples?")
    values = torch.tensor(found[column].to_numpy(float), dtype=torch.float32)
    if not bool(((values >= 0) & torch.isfinite(values)).all()):
        raise InputError(f"--eps {text}: holds negative or infinite radii; each must be finite and >= 0")
    radii = torch.zeros(len(split))
    radii[positions] = values
    return radii


def _column(text: str) -> tuple[pd.DataFrame, str]:
    """The table that FILE.parquet:COLUMN names, and the name of its column of numbers."""
    path, _, column = text.rpartition(":")
    file = Path(path)
    if not column or file.suffix != ".parquet":
        raise InputError(f"--eps {text}: must be a number such as 8/255, or FILE.parquet:COLUMN")
    if not file.is_file():
        raise InputError(f"--eps {text}: there is no file {path}")
    with reading(file):
        table = pd.read_parquet(file)
    numbers = [str(name) for name in table.select_dtypes("number").columns]
    if column not in numbers:
        raise InputError(f"--eps {text}: no column {column!r} of numbers; there are {', '.join(numbers) or 'none'}")
    return table, column
