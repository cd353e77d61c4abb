"""Figures of one evaluation: accuracy after each attack, accuracy by radius, and evaluations per sample.

Each takes the record of an evaluation and the position of its run, which gives it the run's colour. Where the record
lacks what a figure needs, it raises `NoRecords`. `PICTURES` says how to read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from wideberth.evaluation.curve import accuracy_curve
from wideberth.evaluation.record import Evaluation
from wideberth.reports.figures import mark_radius
from wideberth.reports.records import (
    NoRecords,
    eps_of,
    eps_text,
    figures_text,
    largest_eps,
    number,
    percent_text,
    printable,
    shortened,
    unit,
)
from wideberth.reports.style import INK, MUTED, Label, canvas, label_ends, look, styled

MISCLASSIFIED, BROKEN, ROBUST = "misclassified from the start", "broken by ", "robust"


@styled
def survival(evaluation: Evaluation, position: int = 0) -> Figure:
    """Robust accuracy in percent after each attack, over the seconds that had passed at its end.

    Args:
        evaluation: whose protocol lists its attacks: name, robust_accuracy, seconds.
        position: of its run, for the colour.

    Raises:
        NoRecords: when the clean accuracy, or an attack's accuracy or seconds, is not recorded.
    """
    attacks = evaluation.protocol.get("attacks") or []
    left = 100 * np.array([number(attack.get("robust_accuracy")) for attack in attacks])
    spent = np.array([number(attack.get("seconds")) for attack in attacks])
    if "clean_correct" not in evaluation.samples or not len(attacks) or not np.isfinite([left, spent]).all():
        raise NoRecords("the evaluation does not record the robust_accuracy and the seconds of each attack")
    left, passed = np.append(100 * evaluation.clean_accuracy, left), np.append(0.0, np.cumsum(spent))
    scale, name = next(
        (scale, name)
        for most, scale, name in ((180, 1, "seconds"), (3 * 3600, 60, "minutes"), (np.inf, 3600, "hours"))
        if passed[-1] <= most
    )
    passed = passed / scale

    figure, axes = canvas(height=max(2.9, 0.19 * len(left) + 0.9))
    style = look(position)
    axes.step(passed, left, where="post", color=style.colour, gid="survival")
    axes.plot(
        passed, left, color=style.colour, marker="o", markersize=4, linestyle="none", clip_on=False, gid="attacks"
    )
    room = max(0.06 * np.ptp(left), 1.0)
    end = passed[-1] or 1.0
    axes.set(xlabel=f"{name} of attack", ylabel="accuracy left (%)", xlim=(-0.02 * end, 1.02 * end))
    axes.set_ylim(left.min() - room, min(left.max() + room, 100.1))
    names = ["clean", *(shortened(printable(str(attack.get("name")))) for attack in attacks)]
    labels = [
        Label(x, y, f"{name}: {percent_text(y / 100)}", style.ink if place else MUTED)
        for place, (x, y, name) in enumerate(zip(passed, left, names, strict=True))
    ]
    # Last first: of equal heights the later attack is named below.
    label_ends(axes, labels[::-1])
    return figure


@styled
def robustness_curve(evaluation: Evaluation, position: int = 0) -> Figure:
    """Robust accuracy in percent against the radius, with its exact 95 % band; the evaluation's own radius is marked.

    Where each sample had a radius of its own, a line shows the robust accuracy at these instead.

    Args:
        evaluation: whose samples hold a `radius`.
        position: of its run, for the colour.

    Raises:
        NoRecords: when no radii are recorded.
    """
    samples, protocol = evaluation.samples, evaluation.protocol
    if "radius" not in samples or not len(samples):
        raise NoRecords("the evaluation holds no radius per sample: evaluate with radii=True")
    eps, radii = eps_of(protocol), samples["radius"].to_numpy(float)
    shown = unit(protocol.get("norm"), [largest_eps(protocol)])
    some = radii[np.isfinite(radii) & (radii > 0)]
    # The largest hundredth of the radii must not compress the range that is read.
    high = max(1.5 * eps if eps > 0 else 0.0, float(np.quantile(some, 0.99)) if len(some) else 0.0) or 1.0
    steps = np.unique(radii[radii < high])
    grid = steps if len(steps) <= 300 else np.linspace(0, high, 301)
    grid = np.unique(np.concatenate([[0.0, high], grid, [eps] if 0 <= eps <= high else []]))
    curve = accuracy_curve(samples, grid)

    figure, axes = canvas(height=3.3)
    style, x = look(position), grid * shown.scale
    axes.fill_between(
        x, 100 * curve["low"], 100 * curve["high"], step="post", color=style.colour, alpha=0.2, linewidth=0, gid="band"
    )
    axes.step(x, 100 * curve["accuracy"], where="post", color=style.colour, gid="curve")
    axes.set(xlabel=f"radius ε ({shown.name})", ylabel="robust accuracy (%)", xlim=(0, x[-1]), ylim=(0, 101))
    mark_radius(axes, protocol.get("norm"), eps, shown.scale)
    if "robust" in samples and 0 <= eps <= high:
        left = 100 * evaluation.robust_accuracy
        axes.plot([eps * shown.scale], [left], marker="o", markersize=5, color=style.ink, clip_on=False, gid="verdict")
        # The curve falls, so there is room above it to the right and below it to the left.
        place, align = ((6, 5), "left") if left < 92 else ((-6, -11), "right")
        axes.annotate(
            percent_text(left / 100), (eps * shown.scale, left), place, textcoords="offset points",
            color=style.ink, fontsize=8, weight="bold", ha=align,
        )  # fmt: skip
    elif "robust" in samples and isinstance(protocol.get("eps"), dict):
        left = 100 * evaluation.robust_accuracy
        axes.set_title(eps_text(protocol), fontsize=8, color=MUTED, loc="right")
        axes.axhline(left, color=style.ink, linewidth=0.9, linestyle=(0, (4, 3)), gid="own-radii")
        axes.annotate(
            f"within each sample's own radius: {percent_text(left / 100)}", (1, left), (-4, 4),
            xycoords=axes.get_yaxis_transform(), textcoords="offset points", color=style.ink, fontsize=8, ha="right",
        )  # fmt: skip
    return figure


@styled
def costs(evaluation: Evaluation, position: int = 0) -> Figure:
    """How many evaluations samples took, one histogram for each outcome, with share and median.

    The histograms share their bins. Each is scaled to its own height, so that rare outcomes are visible.

    Args:
        evaluation: whose samples hold `evaluations` and their outcome (see `outcomes`).
        position: of its run, for the colour.

    Raises:
        NoRecords: when a column is missing.
    """
    spent = {name: table["evaluations"].to_numpy(float) for name, table in outcomes(evaluation).items()}
    everything = np.concatenate(list(spent.values()))
    low, high = float(everything.min()), float(everything.max())
    logarithmic = low > 0 and high > 20 * low
    if logarithmic:
        edges = np.geomspace(low / 1.15, high * 1.15, 49)
    else:
        width = max((high - low) / 40, 1.0)  # evaluations are whole numbers
        edges = np.arange(low - width / 2, high + width, width)

    figure, axes = canvas(height=0.34 * len(spent) + 0.85)
    colour = look(position).colour
    red, green, blue = (0.5 + 0.5 * channel for channel in to_rgb(colour))
    colours = {MISCLASSIFIED: MUTED, ROBUST: colour}
    for row, (name, values) in enumerate(spent.items()):
        counts, _ = np.histogram(values, edges)
        heights = 0.72 * counts / counts.max() - row
        fill = colours.get(name, (red, green, blue))
        axes.stairs(heights, edges, baseline=-row, fill=True, color=fill, gid=f"outcome-{row}")
        axes.axhline(-row, color="#c5ccd3", linewidth=0.6, zorder=0.5)
        share, median = percent_text(len(values) / len(everything)), figures_text(float(np.median(values)))
        _beside(axes, 0.3 - row, INK, shortened(name, 34), share, median)
    _beside(axes, 1.1, MUTED, "", "samples, %", "median")
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=8))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(NullLocator())
    axes.spines["left"].set_visible(False)
    axes.set(xlabel="evaluations (forwards and backwards)", xlim=(edges[0], edges[-1]), ylim=(0.8 - len(spent), 0.85))
    return figure


def _beside(axes: Axes, height: float, ink: str, name: str, *columns: str) -> None:
    """Texts level with a row: its name to the left of the plot, columns to the right."""
    for text, side, offset in ((name, 0, -6), *((text, 1, 50 + 42 * place) for place, text in enumerate(columns))):
        # Offsets in points: the layout settles on how wide the plot is only after it knows how wide the texts are.
        axes.annotate(
            text, (side, height), (offset, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
            color=ink, fontsize=8, ha="right", va="center", annotation_clip=False, parse_math=False,
        )  # fmt: skip


def outcomes(evaluation: Evaluation) -> dict[str, pd.DataFrame]:
    """The samples by how they ended: "misclassified from the start", "broken by " an attack, or "robust".

    In that order, attacks in the order of the protocol; outcomes of no sample are left out.

    Raises:
        NoRecords: when there are no samples, or one of the columns clean_correct, robust, attack and evaluations is
            missing.
    """
    samples = evaluation.samples
    missing = [name for name in ("clean_correct", "robust", "attack", "evaluations") if name not in samples]
    if missing or not len(samples):
        raise NoRecords(f"the evaluation holds no {' and no '.join(missing) or 'samples'}")
    correct, robust = samples["clean_correct"].astype(bool), samples["robust"].astype(bool)
    broken = samples[correct & ~robust]
    by_attack = dict(iter(broken.groupby("attack", sort=False)))
    listed = [str(attack.get("name")) for attack in evaluation.protocol.get("attacks") or ()]
    order = dict.fromkeys([name for name in listed if name in by_attack] + list(by_attack))
    found = {MISCLASSIFIED: samples[~correct], **{BROKEN + printable(str(name)): by_attack[name] for name in order}}
    return {name: table for name, table in {**found, ROBUST: samples[robust]}.items() if len(table)}


@dataclass(frozen=True)
class Picture:
    """A figure with its words.

    Attributes:
        title: what it shows.
        draw: (evaluation, position of its run) -> the figure.
        alt: evaluation -> what it shows, for those who do not see it; only where it could be drawn.
        caption: evaluation -> how to read it.
    """

    title: str
    draw: Callable[[Evaluation, int], Figure]
    alt: Callable[[Evaluation], str]
    caption: Callable[[Evaluation], str]


def _curve_in_words(evaluation: Evaluation) -> str:
    radii = evaluation.samples["radius"]
    start, median = percent_text(float((radii > 0).mean())), figures_text(float(radii.median()))
    return f"Robust accuracy by radius, falling from {start}% at radius 0. The median radius in input units: {median}."


def _how_to_read_the_curve(evaluation: Evaluation) -> str:
    own = isinstance(evaluation.protocol.get("eps"), dict)
    mark = "the dashed line is the robust accuracy at one radius per sample" if own else "the dot is the verdict"
    caption = (
        "The height above a radius is the share of samples that no attack broke within it, with its 95% interval "
        f"shaded; {mark}."
    )
    never = float((evaluation.samples["radius"] == np.inf).mean()) if "radius" in evaluation.samples else 0.0
    return caption + (
        f" {percent_text(never)}% of the samples broke at no distance at all, which is a sign of a weak search, "
        "not of a robust model."
        if never
        else ""
    )


def _survival_in_words(evaluation: Evaluation) -> str:
    left = "; ".join(
        f"{printable(str(attack.get('name')))} {percent_text(number(attack.get('robust_accuracy')))}%"
        for attack in evaluation.protocol.get("attacks") or ()
    )
    clean = percent_text(evaluation.clean_accuracy)
    return f"Robust accuracy after each attack, over the time spent. Clean {clean}%; {left}."


def _costs_in_words(evaluation: Evaluation) -> str:
    medians = "; ".join(
        f"{name} {figures_text(float(table['evaluations'].median()))}" for name, table in outcomes(evaluation).items()
    )
    return f"Histograms of the evaluations per sample, by how the sample ended. Medians: {medians}."


def _how_to_read_costs(evaluation: Evaluation) -> str:
    caption = "Each row shows how many evaluations the samples with this outcome took, scaled to its own height"
    if "radius" in evaluation.samples:
        return f"{caption}, including the search for the smallest radius, which goes on after a sample is broken."
    return (
        f"{caption}: where some broke only after as many evaluations as the robust ones took, a longer search may "
        "break more."
    )


PICTURES = (
    Picture("Robust accuracy by radius", robustness_curve, _curve_in_words, _how_to_read_the_curve),
    Picture(
        "Robust accuracy after each attack",
        survival,
        _survival_in_words,
        lambda _: (
            "Each step down is the share of samples that an attack broke and those before it did not. Where the last "
            "attacks still break some, more attacks would probably break more."
        ),
    ),
    Picture(
        "Evaluations per sample",
        costs,
        _costs_in_words,
        _how_to_read_costs,
    ),
)
