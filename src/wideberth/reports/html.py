"""The report: one HTML file that opens offline, from the records of one run or of many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from wideberth.checks import InputError
from wideberth.reports import figures, verdicts
from wideberth.reports.evaluations import listing
from wideberth.reports.records import (
    NORMS,
    NOTHING,
    NoRecords,
    config_of,
    eps_of,
    eps_text,
    evaluation_of,
    figures_text,
    grade_of,
    labels,
    last,
    number,
    percent_text,
    printable,
    shared_and_differing,
    size_text,
    value_text,
)
from wideberth.reports.style import data_uri, look
from wideberth.reports.tables import PROTOCOL, comparison, printed
from wideberth.runs import Run, write_atomically


@dataclass(frozen=True)
class Picture:
    """A figure inside the page; width and height are in CSS pixels."""

    source: str
    width: int
    height: int
    alt: str
    caption: str
    title: str = ""


@dataclass
class Section:
    """One heading with what stands under it; a section without pictures and notes is left out."""

    anchor: str
    title: str
    lead: str
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, draw: Callable[[], Figure], alt: str | Callable[[], str], caption: str, title: str = "") -> None:
        """Draw a figure into the section, unless the runs hold no records for it; `alt` may need them too."""
        try:
            figure = draw()
        except NoRecords as reason:
            if isinstance(reason, figures.NotImages):
                self.notes.append(str(reason))
            return
        alt = alt if isinstance(alt, str) else alt()
        width, height = (round(96 * inches) for inches in figure.get_size_inches())
        self.pictures.append(Picture(data_uri(figure), width, height, alt, caption, title))


def write_report(runs: Sequence[Run], out: Path, title: str | None = None) -> Path:
    """Write one self-contained HTML page about the runs: what was measured, how they compare, and why.

    Sections that no run has records for are left out.

    Args:
        runs: at least one; the order is kept, and gives each run its colour.
        out: the file to write.
        title: heading of the page; by default the name of the run, or how many are compared.

    Returns:
        `out`.

    Raises:
        InputError: when there are no runs, or `out` is a directory.
    """
    if not runs:
        raise InputError("runs=[]: a report needs at least one run")
    if out.is_dir():
        raise InputError(f"out={str(out)!r} is a directory: name the file to write, such as report.html in it")
    names = labels(runs)
    table = comparison(runs)
    columns, rows = printed(table)
    environment = Environment(
        loader=PackageLoader("wideberth.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=printable(title) if title else names[0] if len(runs) == 1 else f"{len(runs)} runs compared",
        headline=headline(runs, table),
        columns=columns,
        rows=list(zip([look(position).colour for position in range(len(runs))], rows, strict=True)),
        comparable=len(_protocols(table)) < 2,
        evaluations=listing(runs),
        grades=[(name, found) for name, run in zip(names, runs, strict=True) if (found := grade_of(run))],
        sections=[section for section in _sections(runs, names, table) if section.pictures or section.notes],
        names=names,
        attacks=_line_ups(runs, names),
        protocol=shared_and_differing([_protocol_facts(run) for run in runs]),
        differences=shared_and_differing([_config_facts(run) for run in runs])[1] if len(runs) > 1 else {},
        configurations=[
            (name, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            for name, run in zip(names, runs, strict=True)
            if (config := config_of(run))
        ],
    )

    def write(path: Path) -> None:
        path.write_text(page, encoding="utf-8")

    write_atomically(out, write)
    return out


def headline(runs: Sequence[Run], table: pd.DataFrame) -> str:
    """The page's first sentences: the finding, and what exactly was measured."""
    protocols = _protocols(table)
    evaluated = table[table["robust_accuracy"].notna()]
    if not len(evaluated):
        return "Not evaluated yet: this page shows the records of training only."
    if len(protocols) > 1:
        return (
            f"{len(evaluated)} runs, evaluated by {len(protocols)} different protocols: "
            "compare only rows with the same protocol."
        )
    best = evaluated.sort_values("robust_accuracy").iloc[-1]
    verdict = next(e for run in runs if (e := run.evaluation) is not None)
    finding = f"{best['name']} has the highest robust accuracy of {len(evaluated)} runs: " if len(evaluated) > 1 else ""
    interval = ""
    if math.isfinite(best["robust_low"]):
        level = number(verdict.get("confidence"))
        sure = f"{100 * level:.3g}% " if math.isfinite(level) else ""
        interval = f" ({sure}interval {100 * best['robust_low']:.1f} to {100 * best['robust_high']:.1f})"
    clean = "" if math.isnan(best["clean_accuracy"]) else f" Unperturbed, {100 * best['clean_accuracy']:.1f}% are."
    robust = f"{100 * best['robust_accuracy']:.1f}% of {_samples(verdict)}{interval}"
    grade = grade_of(runs[list(table["name"]).index(best["name"])])
    doubt = f" This verdict is graded {grade.verdict}." if grade and grade.verdict not in ("", "trusted") else ""
    return f"{finding}{robust} stay correctly classified under {_threat(verdict)}.{clean}{doubt}"


def _samples(verdict: dict[str, Any]) -> str:
    count = f"{n:,.0f} " if math.isfinite(n := number(verdict.get("n"))) else "the "
    split = f"{verdict['split']} " if verdict.get("split") else ""
    data = verdict.get("data")
    # The data set's name will do here: its arguments stand below, under "How it was measured".
    name = value_text({"class_path": data["class_path"]} if isinstance(data, dict) and "class_path" in data else data)
    return f"{count}{split}samples" + (f" of {name}" if data else "")


def _threat(verdict: dict[str, Any]) -> str:
    norm, eps = NORMS.get(str(verdict.get("norm")), ""), eps_of(verdict)
    size = (
        f" of size up to {size_text(eps)}"
        if math.isfinite(eps)
        else f" ({text})"
        if (text := eps_text(verdict))
        else ""
    )
    attacks = [str(attack.get("name")) for attack in verdict.get("attacks") or ()]
    suite = f"the {verdict['suite']} suite" if verdict.get("suite") else ""
    listed = ("; " if any("," in attack for attack in attacks) else ", ").join(attacks)
    line_up = f"{suite} ({listed})" if suite and attacks else suite or listed
    return (
        f"adversarial {norm} perturbations".replace("  ", " ") + size + (f", searched by {line_up}" if line_up else "")
    )


def _protocols(table: pd.DataFrame) -> set[tuple[str, ...]]:
    """The different ways in which the runs were evaluated."""
    evaluated = table[table["robust_accuracy"].notna()]
    return set(evaluated[list(PROTOCOL)].astype(str).itertuples(index=False, name=None))


def _sections(runs: Sequence[Run], names: Sequence[str], table: pd.DataFrame) -> Iterator[Section]:
    yield _result(runs, table)
    yield _verdicts(runs, names)
    yield _margins(runs, names, table)
    yield _radii(runs, names)
    yield _samples_section(runs, names)
    yield _training(runs, names)


def _result(runs: Sequence[Run], table: pd.DataFrame) -> Section:
    section = Section("trade-off", "Accuracy against robustness", "Clean accuracy that is lost for robust accuracy.")
    evaluated = table[table["robust_accuracy"].notna() & table["clean_accuracy"].notna()]
    if len(evaluated) > 1:
        listed = "; ".join(
            f"{name} {100 * clean:.1f}% clean, {100 * robust:.1f}% robust"
            for name, clean, robust in zip(
                evaluated["name"], evaluated["clean_accuracy"], evaluated["robust_accuracy"], strict=True
            )
        )
        section.add(
            partial(figures.trade_off, runs),
            alt=f"Scatter plot of clean against robust accuracy. {listed}.",
            caption="Up and to the right is better. Bars are the intervals of the table: "
            "where they overlap, the order of two runs may be chance.",
        )
    return section


def _verdicts(runs: Sequence[Run], names: Sequence[str]) -> Section:
    section = Section(
        "verdict",
        "The evaluations in detail" if len(runs) > 1 else "The evaluation in detail",
        "Robust accuracy at other radii, what each attack found, and the number of evaluations it took.",
    )
    evaluated = [(place, name, evaluation_of(run)) for place, (name, run) in enumerate(zip(names, runs, strict=True))]
    for picture in verdicts.PICTURES:
        for position, name, evaluation in evaluated:
            if evaluation is None:
                continue
            section.add(
                partial(picture.draw, evaluation, position),
                alt=partial(picture.alt, evaluation),
                caption=picture.caption(evaluation),
                title=f"{picture.title}: {name}" if len(runs) > 1 else picture.title,
            )
    return section


def _margins(runs: Sequence[Run], names: Sequence[str], table: pd.DataFrame) -> Section:
    section = Section(
        "margins",
        "Effective margin and weight norm",
        "The effective margin is the logit margin over the norm of its gradient: how far, to first order, an input is "
        "from the decision boundary. Scaling the logits leaves it alone, and shows in the effective weight norm.",
    )
    medians = "; ".join(
        f"{name} {figures_text(value)}"
        for name, value in zip(names, table["effective_margin"], strict=True)
        if math.isfinite(value)
    )
    section.add(
        partial(figures.margin_distribution, runs),
        alt=f"Share of samples by least effective margin. Medians in input units: {medians or 'not recorded'}.",
        caption="Share of evaluated samples whose margin is at least the value below. At 0 a curve has the clean "
        "accuracy; its height at the dashed radius is the robust accuracy that a linear model of the network predicts.",
        title="Margins of the evaluated samples",
    )
    for column, title, caption in (
        (
            "effective_margin",
            "Margin over training",
            "Median over a fixed set of samples. Scaling the logits does not change it: it rises with the distance to "
            "the boundary.",
        ),
        (
            "effective_weight_norm",
            "Weight norm over training",
            "Median over a fixed set of samples, on a log scale. Where it grows, the same margin in the logits is a "
            "smaller distance in the input space.",
        ),
    ):
        _add_curves(section, runs, names, column, title, caption)
    return section


def _radii(runs: Sequence[Run], names: Sequence[str]) -> Section:
    section = Section(
        "radii", "Learned radii", "The radius within which training perturbed each sample, learned for each."
    )
    for run, name in zip(runs, names, strict=True):
        middle = last(run.metrics, "radius_q50")
        end = f" The final median is {figures_text(middle)} in input units." if math.isfinite(middle) else ""
        section.add(
            partial(figures.radius_histogram, run),
            alt=f"Histogram of the radii of the training samples of {name}, over training and at its end.{end}",
            caption="Left: darker cells hold more samples, and the lines are the median and the quartiles. "
            "Right: the radii that training ended with.",
            title=name,
        )
    return section


def _samples_section(runs: Sequence[Run], names: Sequence[str]) -> Section:
    section = Section(
        "extremes",
        "Samples at both ends",
        "Samples with small radii often look like another class or have a wrong label; those with large radii are far "
        "from the decision boundary.",
    )
    for run, name in zip(runs, names, strict=True):
        section.add(
            partial(figures.extremes, run),
            alt=f"Training samples of {name} with the smallest and with the largest radii.",
            caption="Above each sample stand its label and its radius. Look for wrong labels in the upper rows.",
            title=name,
        )
    return section


def _training(runs: Sequence[Run], names: Sequence[str]) -> Section:
    section = Section("training", "Training", "Loss and accuracy over the epochs.")
    for column, title, caption in (
        (
            "loss",
            "Training loss",
            "Each run's own objective"
            + (": the values of different objectives cannot be compared." if len(runs) > 1 else "."),
        ),
        ("validation_clean", "Clean validation accuracy", "Accuracy on held-out samples as they are."),
        (
            "validation_robust",
            "Robust validation accuracy",
            "Accuracy on held-out samples under a short attack. A late fall is robust overfitting.",
        ),
    ):
        _add_curves(section, runs, names, column, title, caption)
    return section


def _add_curves(
    section: Section, runs: Sequence[Run], names: Sequence[str], column: str, title: str, caption: str
) -> None:
    ends = "; ".join(
        f"{name} {figures_text(value)}"
        for name, run in zip(names, runs, strict=True)
        if math.isfinite(value := last(run.metrics, column))
    )
    section.add(
        partial(figures.training_curves, runs, column),
        alt=f"{title} by epoch. Final values: {ends}.",
        caption=caption,
        title=title,
    )


def _line_ups(runs: Sequence[Run], names: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Names of the attacks, and per run the robust accuracy in percent after each; last, evaluations per sample."""
    left = {
        name: {
            str(attack.get("name")): percent_text(number(attack.get("robust_accuracy")))
            for attack in (run.evaluation or {}).get("attacks") or ()
        }
        for name, run in zip(names, runs, strict=True)
    }
    for found, run in zip(left.values(), runs, strict=True):
        spent = number((run.evaluation or {}).get("evaluations_per_sample"))
        if found and math.isfinite(spent):
            found["evaluations per sample"] = figures_text(spent)
    attacks = list(dict.fromkeys(attack for found in left.values() for attack in found))
    return attacks, [
        (name, [found.get(attack, NOTHING) for attack in attacks]) for name, found in left.items() if found
    ]


def _protocol_facts(run: Run) -> dict[str, str]:
    verdict = run.evaluation
    if verdict is None:
        return {}
    known = (*PROTOCOL, "rows", "box", "confidence", "seed", "device")
    facts = {key.replace("_", " "): value_text(verdict[key]) for key in known if verdict.get(key) is not None}
    if isinstance(verdict.get("eps"), dict):
        facts["eps"] = eps_text(verdict)
    if "norm" in facts:
        facts["norm"] = NORMS.get(facts["norm"], facts["norm"])
    for attack in verdict.get("attacks") or ():
        if attack.get("settings"):
            facts[str(attack.get("name"))] = value_text(attack["settings"])
    versions = verdict.get("versions")
    if isinstance(versions, dict):
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return facts


def _config_facts(run: Run) -> dict[str, str]:
    return {str(key): value_text(value) for key, value in config_of(run).items() if key not in ("name", "out")}
