"""The comparison of runs: as data, as printed cells, and as a table in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
from rich.table import Table
from rich.text import Text

from wideberth.reports.records import (
    NORMS,
    NOTHING,
    Unit,
    config_of,
    duration_text,
    eps_text,
    figures_text,
    labels,
    largest_eps,
    last,
    number,
    percent_text,
    size_text,
    unit,
    value_text,
)
from wideberth.runs import Run

PROTOCOL = ("data", "split", "norm", "eps", "suite", "n")


def comparison(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per run: accuracies as fractions with their intervals, medians in input units, cost, and the protocol.

    Columns: name; clean_accuracy, clean_low, clean_high; robust_accuracy, robust_low, robust_high; effective_margin
    and effective_weight_norm (medians over the evaluated samples); epochs; kept_epoch (whose weights the run exported,
    counted from 1); seconds (of training); data, split, norm, eps (in words where there is one per sample), suite, n;
    largest_eps. NaN or None where a run does not hold the record.
    """
    return pd.DataFrame([_row(run, name) for run, name in zip(runs, labels(runs), strict=True)])


def _row(run: Run, name: str) -> dict[str, object]:
    verdict = run.evaluation or {}
    metrics = run.metrics
    row: dict[str, object] = {"name": name}
    for kind in ("clean", "robust"):
        low, high = verdict.get(f"{kind}_interval") or (math.nan, math.nan)
        row[f"{kind}_accuracy"] = number(verdict.get(f"{kind}_accuracy"))
        row[f"{kind}_low"], row[f"{kind}_high"] = number(low), number(high)
    samples = run.evaluation_samples
    for column in ("effective_margin", "effective_weight_norm"):
        row[column] = number((verdict.get(column) or {}).get("median"))
        if math.isnan(number(row[column])) and samples is not None and column in samples:
            row[column] = float(samples[column].median())
    trained = last(metrics, "epoch") + 1
    row["epochs"] = trained if math.isfinite(trained) else number(config_of(run).get("epochs"))
    row["kept_epoch"] = number((run.export or {}).get("epoch")) + 1
    row["seconds"] = (
        float(metrics["seconds"].sum(min_count=1)) if metrics is not None and "seconds" in metrics else math.nan
    )
    for key in PROTOCOL:
        row[key] = number(verdict.get(key)) if key in ("eps", "n") else verdict.get(key)
    if isinstance(verdict.get("eps"), dict):
        row["eps"] = eps_text(verdict)
    row["largest_eps"] = largest_eps(verdict)
    return row


class Cell(NamedTuple):
    """One printed value: its text, the interval behind it, and whether it is the best of its column."""

    text: str
    interval: str = ""
    best: bool = False


def printed(comparison: pd.DataFrame) -> tuple[list[str], list[list[Cell]]]:
    """Headings and cells of a comparison as people read it.

    Columns that no run fills are left out. The protocols are shown where they differ; then no accuracy is marked as
    best, because the rows cannot be compared.
    """
    evaluated = comparison[comparison["robust_accuracy"].notna()]
    differing = [key for key in PROTOCOL if evaluated[key].astype(str).nunique() > 1]
    norms = set(evaluated["norm"])
    distance = unit(norms.pop() if len(norms) == 1 else None, evaluated["largest_eps"])
    columns: dict[str, list[Cell]] = {"run": [Cell(str(name)) for name in comparison["name"]]}
    for kind in ("clean", "robust"):
        values = comparison[f"{kind}_accuracy"]
        best = values.max() if not differing and len(evaluated) > 1 else math.inf
        columns[f"{kind} accuracy, %"] = [
            Cell(percent_text(value), _interval(low, high), bool(value >= best))
            for value, low, high in zip(values, comparison[f"{kind}_low"], comparison[f"{kind}_high"], strict=True)
        ]
    columns[f"effective margin, {distance.name}"] = _numbers(comparison["effective_margin"], distance)
    columns["effective weight norm"] = _numbers(comparison["effective_weight_norm"], Unit(1.0, ""))
    columns["epochs"] = _numbers(comparison["epochs"], Unit(1.0, ""))
    if (comparison["kept_epoch"] < comparison["epochs"]).any():
        columns["weights of epoch"] = _numbers(comparison["kept_epoch"], Unit(1.0, ""))
    columns["training time"] = [Cell(duration_text(value)) for value in comparison["seconds"]]
    for key in differing:
        columns[key] = [Cell(_protocol(key, value)) for value in comparison[key]]
    filled = {title: cells for title, cells in columns.items() if any(cell.text != NOTHING for cell in cells)}
    return list(filled), [list(row) for row in zip(*filled.values(), strict=True)]


def render(comparison: pd.DataFrame) -> Table:
    """The comparison as a table for the terminal; names are printed as they are, never read as markup."""
    titles, rows = printed(comparison)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in titles:
        table.add_column(title, justify="left" if title == "run" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_rich(cell) for cell in row))
    return table


def _rich(cell: Cell) -> Text:
    text = Text(cell.text, style="bold" if cell.best else "")
    return text.append(f" {cell.interval}", style="dim not bold") if cell.interval else text


def _interval(low: float, high: float) -> str:
    return f"[{100 * low:.1f}, {100 * high:.1f}]" if math.isfinite(low) and math.isfinite(high) else ""


def _numbers(values: Sequence[float] | pd.Series[float], shown: Unit) -> list[Cell]:
    return [Cell(figures_text(value * shown.scale)) for value in values]


def _protocol(key: str, value: object) -> str:
    if value is None or value != value:
        return NOTHING
    if key == "norm":
        return NORMS.get(str(value), str(value))
    if key == "eps":
        return value if isinstance(value, str) else size_text(number(value))
    return f"{value:,.0f}" if key == "n" else value_text(value)
