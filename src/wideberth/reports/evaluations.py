"""The evaluations that runs hold: a table of all, and which of them the figures and the comparison are about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from rich.table import Table

from wideberth.reports.records import (
    NORMS,
    NOTHING,
    eps_text,
    grade_in,
    labels,
    number,
    percent_text,
    printable,
    size_text,
    value_text,
)
from wideberth.runs import EvaluationRecord, Run

THREAT = ("norm", "eps", "suite")
"""What two evaluations must have in common for their robust accuracies to be compared."""


def all_evaluations(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per evaluation of each run, oldest first.

    Columns: run, evaluation (its name), norm, eps (in words), suite, rows (in words), n, clean_accuracy and
    robust_accuracy (fractions; NaN where not recorded), grade ("" where there is none), saved (day, or ""), shown
    (whether `Run.evaluation` is this one).
    """
    columns = ("run", "evaluation", "norm", "eps", "suite", "rows", "n", "clean_accuracy", "robust_accuracy")
    rows = []
    for run, label in zip(runs, labels(runs), strict=True):
        for record in run.evaluations:
            verdict = record.summary
            grade = grade_in(verdict)
            rows.append(
                {
                    "run": label,
                    "evaluation": printable(record.name),
                    "norm": verdict.get("norm"),
                    "eps": eps_text(verdict).removeprefix("eps "),
                    "suite": printable(str(verdict.get("suite") or "")),
                    "rows": printable(str(verdict.get("rows") or "")),
                    "n": number(verdict.get("n")),
                    "clean_accuracy": number(verdict.get("clean_accuracy")),
                    "robust_accuracy": number(verdict.get("robust_accuracy")),
                    "grade": grade.verdict if grade else "",
                    "saved": printable(str(verdict.get("saved") or ""))[:10],
                    "shown": record.name == run.evaluation_name,
                }
            )
    return pd.DataFrame(rows, columns=[*columns, "grade", "saved", "shown"])


def printed_evaluations(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of `all_evaluations` as people read it; columns that no row fills are left out."""
    shown: dict[str, Callable[[Any], str]] = {
        "run": str,
        "evaluation": str,
        "norm": lambda norm: NORMS.get(str(norm), NOTHING),
        "eps": lambda eps: eps or NOTHING,
        "suite": lambda suite: suite or NOTHING,
        "rows": lambda rows: rows or NOTHING,
        "clean_accuracy": percent_text,
        "robust_accuracy": percent_text,
        "grade": lambda grade: grade or NOTHING,
        "saved": lambda saved: saved or NOTHING,
    }
    titles = {"clean_accuracy": "clean, %", "robust_accuracy": "robust, at most, %"}
    columns = {titles.get(name, name): [text(value) for value in table[name]] for name, text in shown.items()}
    if table["run"].nunique() < 2:
        del columns["run"]
    filled = {title: cells for title, cells in columns.items() if any(cell != NOTHING for cell in cells)}
    return list(filled), [list(row) for row in zip(*filled.values(), strict=True)]


def listing(runs: Sequence[Run]) -> tuple[list[str], list[tuple[bool, list[str]]]] | None:
    """All evaluations as a page lists them: headings; of each, whether the page is about it, and its cells.

    None where the page is about all there are.
    """
    table = all_evaluations(runs)
    if not len(table) or table["shown"].all():
        return None
    titles, rows = printed_evaluations(table)
    return titles, list(zip(table["shown"].tolist(), rows, strict=True))


def render_records(runs: Sequence[Run]) -> Table:
    """All evaluations of the runs as a table for the terminal."""
    titles, rows = printed_evaluations(all_evaluations(runs))
    view = Table(box=None, header_style="bold", pad_edge=False)
    for title in titles:
        view.add_column(title, justify="right" if title.endswith("%") else "left", overflow="fold")
    for row in rows:
        view.add_row(*row)
    return view if rows else Table(title="no evaluations yet: run `wideberth evaluate` first", box=None)


def alike(runs: Sequence[Run], name: str | None = None) -> list[Run]:
    """The same runs, each read with the evaluation that can be compared with those of the others.

    That is the newest whose norm, eps and suite every run has an evaluation by; of these each run's newest by the very
    same protocol where all have one. Where there is none, each run's newest.

    Args:
        runs: any.
        name: of an evaluation, which is then taken of each run that has any evaluation.

    Raises:
        InputError: where a run with evaluations has none of this name.
    """
    if name is not None:
        return [run.with_evaluation(name) if run.evaluations else run for run in runs]
    evaluated = [run for run in runs if run.evaluations]
    for key in (_by_name, _by_threat):
        # Of equal keys the newest counts, which comes last.
        known = [{key(record): record.name for record in run.evaluations} for run in evaluated]
        for record in reversed(evaluated[0].evaluations if evaluated else []):
            if (entry := key(record)) and all(entry in names for names in known):
                chosen = {id(run): names[entry] for run, names in zip(evaluated, known, strict=True)}
                return [run.with_evaluation(chosen.get(id(run))) for run in runs]
    return list(runs)


def _by_name(record: EvaluationRecord) -> str:
    return record.name if "id" in record.summary else ""  # the name says nothing of what version 0.1 wrote


def _by_threat(record: EvaluationRecord) -> str:
    return repr([record.summary.get(key) for key in THREAT])


def differing_protocols(runs: Sequence[Run]) -> str:
    """In one line, in what the evaluations of the runs differ; "" where they can be compared."""
    verdicts = [verdict for run in runs if (verdict := run.evaluation) is not None]
    found = []
    for key in (*THREAT, "n", "data"):
        texts = dict.fromkeys(eps_text(v).removeprefix("eps ") if key == "eps" else _text(v.get(key)) for v in verdicts)
        if len(texts) > 1:
            found.append(f"{key} ({', '.join(texts)})")
    return f"not comparable as they stand: the evaluations differ in {'; '.join(found)}" if found else ""


def _text(value: object) -> str:
    return size_text(value) if isinstance(value, float) else value_text(value)
