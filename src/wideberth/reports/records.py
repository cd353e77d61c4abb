"""What reports read from runs: names, units and numbers in text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from wideberth.checks import InputError
from wideberth.evaluation.record import Evaluation
from wideberth.runs import Run

NORMS = {"linf": "\N{SCRIPT SMALL L}∞", "l2": "\N{SCRIPT SMALL L}2", "l1": "\N{SCRIPT SMALL L}1"}
NOTHING = "\N{EN DASH}"


class NoRecords(InputError):
    """The runs hold nothing to show here; the message says which record is missing."""


@dataclass(frozen=True)
class Unit:
    """A readable unit for distances in input space: multiply by `scale`, and say `name`."""

    scale: float
    name: str


INPUT_UNITS = Unit(1.0, "input units")
PIXEL_STEPS = Unit(255.0, "1/255")


def unit(norm: object, sizes: Iterable[float]) -> Unit:
    """The unit in which distances of these sizes read well: 1/255 for small linf radii, else input units."""
    known = [size for size in sizes if math.isfinite(size)]
    small = bool(known) and max(known) < 0.1
    return PIXEL_STEPS if norm == "linf" and small else INPUT_UNITS


def unit_of(runs: Sequence[Run]) -> Unit:
    """The one unit that suits the evaluations of all runs."""
    evaluated = [evaluation for run in runs if (evaluation := run.evaluation) is not None]
    norms = {evaluation.get("norm") for evaluation in evaluated}
    return unit(norms.pop() if len(norms) == 1 else None, (largest_eps(e) for e in evaluated))


def number(value: object) -> float:
    """The value as a float; NaN where it is absent or no number."""
    return float(value) if isinstance(value, int | float) else math.nan


def largest_eps(verdict: Mapping[str, Any]) -> float:
    """The radius of an evaluation, the largest where it had one per sample; NaN where none is recorded."""
    eps = verdict.get("eps")
    return number(eps.get("max")) if isinstance(eps, dict) else number(eps)


def config_of(run: Run) -> dict[str, Any]:
    """The resolved configuration, empty where the run has none."""
    try:
        return run.config
    except InputError:
        return {}


def norm_of(run: Run) -> object:
    """The norm of the run's evaluation, else that of its training, else None."""
    attack = config_of(run).get("attack")
    arguments = attack.get("init_args") if isinstance(attack, dict) else None
    trained = arguments.get("norm") if isinstance(arguments, dict) else None
    return (run.evaluation or {}).get("norm", trained)


def evaluation_of(run: Run) -> Evaluation | None:
    """The record of the run's evaluation; None where it has none, or one that does not say how each sample ended."""
    protocol, samples = run.evaluation, run.evaluation_samples
    if protocol is None or samples is None or not {"clean_correct", "robust", "attack"} <= set(samples):
        return None
    return Evaluation(samples, protocol)


@dataclass(frozen=True)
class Grade:
    """The grade of an evaluation: whether its robust accuracy can be trusted.

    Attributes:
        verdict: "trusted", "doubtful" or "masked"; "" where only findings are recorded.
        reason: one sentence.
        findings: of the checks that were raised: name, severity, why and advice.
    """

    verdict: str
    reason: str
    findings: tuple[dict[str, str], ...]


def grade_of(run: Run) -> Grade | None:
    """The grade of the run's evaluation; None where it was not graded and no check was raised."""
    return grade_in(run.evaluation or {})


def grade_in(verdict: Mapping[str, Any]) -> Grade | None:
    """The grade in the summary of an evaluation; None where it was not graded and no check was raised."""
    grade = verdict.get("grade") or {}
    raised = tuple(
        {key: printable(str(finding.get(key) or "")) for key in ("name", "severity", "why", "advice")}
        for finding in verdict.get("findings") or ()
        if finding.get("raised")
    )
    if not grade and not raised:
        return None
    word, reason = (printable(str(grade.get(key) or "")) for key in ("verdict", "reason"))
    return Grade(word, reason, raised)


def labels(runs: Sequence[Run]) -> list[str]:
    """One printable name per run, all different.

    The configured name where these are distinct; else the directory's name, with its parent, with its whole path;
    and a number where one directory is given twice.
    """
    namings = (
        [str(config_of(run).get("name") or run.name) for run in runs],
        [run.name for run in runs],
        ["/".join(run.path.resolve().parts[-2:]) for run in runs],
        [str(run.path.resolve()) for run in runs],
        [f"{run.name} ({position})" for position, run in enumerate(runs, start=1)],
    )
    readable = ([printable(name) for name in names] for names in namings)
    return next(names for names in readable if len(set(names)) == len(names))


def printable(text: str) -> str:
    """The text with control characters replaced: they break terminals, SVG and HTML."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def shortened(name: str, limit: int = 30) -> str:
    """The name with its middle left out where it is too long for a figure: the ends tell runs apart."""
    tail = limit // 3
    return name if len(name) <= limit else f"{name[: limit - tail - 1]}…{name[-tail:]}"


def size_text(value: float) -> str:
    """A number as a paper prints it: 8/255 where it is such a fraction (up to 32/255), else four digits."""
    steps = value * 255
    whole = round(steps) if math.isfinite(steps) else 0
    if 1 <= whole <= 32 and math.isclose(steps, whole, rel_tol=1e-5):
        return f"{whole}/255"
    return f"{value:.4g}"


def eps_of(verdict: Mapping[str, Any]) -> float:
    """The radius of an evaluation; NaN where it had one per sample, or none is recorded."""
    return number(verdict.get("eps"))


def eps_text(verdict: Mapping[str, Any]) -> str:
    """The radius of an evaluation in words: "eps 8/255", or that there is one per sample; "" where none is recorded."""
    eps = verdict.get("eps")
    if isinstance(eps, dict):
        return radii_text(number(eps.get("mean")), number(eps.get("min")), number(eps.get("max")))
    return f"eps {size_text(eps_of(verdict))}" if math.isfinite(eps_of(verdict)) else ""


def radii_text(mean: float, low: float, high: float) -> str:
    """One radius per sample, in words."""
    return f"one radius per sample, mean {size_text(mean)} ({size_text(low)} to {size_text(high)})"


def figures_text(value: float) -> str:
    """A number to three figures, or whole from a thousand on; "–" where it is not finite."""
    if not math.isfinite(value):
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent_text(fraction: float) -> str:
    """A fraction in percent to one decimal; "–" where it is not finite."""
    return f"{100 * fraction:.1f}" if math.isfinite(fraction) else NOTHING


def duration_text(seconds: float) -> str:
    """A duration in its two largest units: "42 s", "3 min 20 s", "5 h 12 min"."""
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def value_text(value: object) -> str:
    """A configured value on one line: components read as calls, `EffectiveMargin(weight=0.02)`."""
    match value:
        case {"class_path": str(path), **rest}:
            arguments = rest.get("init_args")
            inside = _pairs(arguments) if isinstance(arguments, dict) else ""
            return path.rpartition(".")[2] + (f"({inside})" if inside else "")
        case dict():
            return _pairs(value) or NOTHING
        case list() | tuple():
            return ", ".join(map(value_text, value)) or NOTHING
        case None:
            return NOTHING
        case float():
            return size_text(value)
        case _:
            return str(value)


def _pairs(mapping: dict[Any, Any]) -> str:
    return ", ".join(f"{key}={_inner(value)}" for key, value in mapping.items())


def _inner(value: object) -> str:
    """A value inside a call, with brackets where its own commas would read as the call's."""
    match value:
        case {"class_path": str()}:
            return value_text(value)
        case dict():
            return f"{{{_pairs(value)}}}"
        case list() | tuple():
            return f"[{', '.join(map(_inner, value))}]"
        case _:
            return value_text(value)


def shared_and_differing(
    facts: Sequence[dict[str, str]],
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Split one mapping per run into what all agree on and, per key, the values that differ ("–" where absent)."""
    keys = dict.fromkeys(key for fact in facts for key in fact)
    values = {key: [fact.get(key, NOTHING) for fact in facts] for key in keys}
    shared = {key: found[0] for key, found in values.items() if len(set(found)) == 1}
    return shared, {key: found for key, found in values.items() if key not in shared}


def last(table: pd.DataFrame | None, column: str) -> float:
    """The last finite value of a column; NaN where there is none."""
    if table is None or column not in table:
        return math.nan
    found = pd.to_numeric(table[column], errors="coerce").dropna()
    return float(found.iloc[-1]) if len(found) else math.nan
