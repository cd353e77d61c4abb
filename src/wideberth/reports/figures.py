"""One function per figure: records in, a matplotlib Figure out.

Runs keep their colour in every figure of one list of runs, whichever of them have the records a figure needs. Where
none has, a figure raises `NoRecords`, which says what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from wideberth.reports.records import NORMS, NoRecords, labels, norm_of, number, shortened, size_text, unit, unit_of
from wideberth.reports.style import (
    ACCENT,
    DENSITY,
    INK,
    MUTED,
    Label,
    canvas,
    label_ends,
    label_points,
    look,
    styled,
)
from wideberth.runs import Run


class NotImages(NoRecords):
    """There are samples to show, but they are not images."""


TITLES = {
    "loss": "training loss",
    "base_loss": "loss without regularizers",
    "penalty": "regularizer penalty",
    "accuracy_clean": "training accuracy, clean (%)",
    "accuracy_adversarial": "training accuracy, attacked (%)",
    "validation_clean": "validation accuracy, clean (%)",
    "validation_robust": "validation accuracy, attacked (%)",
    "radius_mean": "mean radius",
    "effective_margin": "median effective margin",
    "effective_weight_norm": "median effective weight norm",
    "learning_rate": "learning rate",
}
_PERCENT = ("accuracy_", "validation_")
_DISTANCE = ("radius_", "effective_margin")


@styled
def trade_off(runs: Sequence[Run]) -> Figure:
    """Clean against robust accuracy in percent, one named point per evaluated run, with its interval bars.

    Raises:
        NoRecords: when no run holds both accuracies.
    """
    figure, axes = canvas(height=3.8)
    points: list[Label] = []
    bars: list[Bbox] = []
    for position, (run, name) in enumerate(zip(runs, labels(runs), strict=True)):
        verdict = run.evaluation or {}
        x, y = (100 * number(verdict.get(key)) for key in ("clean_accuracy", "robust_accuracy"))
        if not np.isfinite((x, y)).all():
            continue
        (left, right), (low, high) = (
            100 * np.asarray(verdict.get(f"{kind}_interval") or (value / 100, value / 100), dtype=float)
            for kind, value in (("clean", x), ("robust", y))
        )
        style = look(position)
        axes.errorbar(
            [x], [y], xerr=[[max(x - left, 0)], [max(right - x, 0)]], yerr=[[max(y - low, 0)], [max(high - y, 0)]],
            ecolor=style.colour, elinewidth=1, alpha=0.55, linestyle="none", zorder=2,
        )  # fmt: skip
        axes.plot([x], [y], color=style.colour, marker=style.marker, markersize=7, zorder=3, gid=f"run-{position}")
        points.append(Label(x, y, shortened(name), style.ink))
        bars += [Bbox.from_extents(left, y, right, y), Bbox.from_extents(x, low, x, high)]
    if not points:
        raise NoRecords("no run holds an evaluation.json with clean and robust accuracy: evaluate one first")
    axes.set(xlabel="clean accuracy (%)", ylabel="robust accuracy (%)")
    _limit(axes, Bbox.union(bars))
    label_points(axes, points, bars)
    return figure


def _limit(axes: Axes, data: Bbox) -> None:
    """Room for names around the data, at least two points of accuracy, and nothing far outside 0 to 100 percent."""
    for low, high, setter in (
        (data.x0, data.x1, axes.set_xlim),
        (data.y0, data.y1, axes.set_ylim),
    ):
        room = max(0.18 * (high - low), 1.0)
        setter(max(low - room, -3.0), min(high + room, 103.0))


@styled
def radius_histogram(run: Run) -> Figure:
    """How the radii of the training samples spread: epoch by epoch (darker: more samples), and at the end.

    Lines are the median and the quartiles. The final histogram is drawn alone where radii.parquet holds fewer than
    two epochs.

    Raises:
        NoRecords: when the run holds no radii, or one and the same for all samples.
    """
    table = run.radii
    if table is None or table["epoch"].nunique() < 2:
        return _final_radii(run)
    last_epoch = table[table["epoch"] == table["epoch"].max()]
    shown = unit(norm_of(run), [float(table["high"].max())])

    epochs, edges, shares = _spread(table)
    if not (np.ptp(shares, axis=0).any() or np.count_nonzero(shares[-1]) > 1):
        raise _one_radius(run, float(table["high"].max()))
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    over_time, final = figure.subplots(1, 2, sharey=True, width_ratios=(2.6, 1))
    columns = np.concatenate([epochs[:1] - 0.5, (epochs[1:] + epochs[:-1]) / 2, epochs[-1:] + 0.5])
    over_time.pcolormesh(
        columns, edges * shown.scale, np.sqrt(shares.T), cmap=DENSITY, vmin=0, rasterized=True, gid="density"
    )
    # Square roots, so that bins with few samples are visible beside those with many.
    cumulative = np.pad(np.cumsum(shares, axis=1), ((0, 0), (1, 0)))
    for quantile, width in ((0.25, 0.8), (0.5, 2.0), (0.75, 0.8)):
        level = [np.interp(quantile, row / row[-1], edges * shown.scale) for row in cumulative]
        over_time.plot(epochs, level, color=ACCENT, linewidth=width, gid=f"quantile-{quantile}")
    over_time.grid(False)
    over_time.xaxis.set_major_locator(MaxNLocator(integer=True))
    over_time.set(xlabel="epoch", ylabel=f"radius ({shown.name})", title="over training")
    counts, steps = _shares(last_epoch, shown.scale)
    final.stairs(counts, steps, orientation="horizontal", fill=True, color="#2171b5", gid="final")
    final.set(xlabel="samples (%)", title="at the end", xlim=(0, None))
    return figure


def _final_radii(run: Run) -> Figure:
    samples = run.samples
    radii = np.empty(0) if samples is None or "radius" not in samples else samples["radius"].dropna().to_numpy(float)
    if not len(radii):
        raise NoRecords(f"run {run.name!r} holds no radii: neither radii.parquet nor a radius in samples.parquet")
    if radii.min() == radii.max():
        raise _one_radius(run, float(radii[0]))
    shown = unit(norm_of(run), [float(radii.max())])
    figure, axes = canvas(height=2.8)
    counts, edges = np.histogram(radii * shown.scale, bins=40)
    axes.stairs(100 * counts / len(radii), edges, fill=True, color="#2171b5", gid="final")
    axes.set(xlabel=f"radius ({shown.name})", ylabel="training samples (%)")
    return figure


def _one_radius(run: Run, radius: float) -> NoRecords:
    return NoRecords(f"run {run.name!r} trained every sample with the same radius, about {size_text(radius)}")


def _shares(histogram: pd.DataFrame, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Percent of samples per bin, (bins,), and the edges in display units, (bins + 1,), of one epoch."""
    histogram = histogram.sort_values("low")
    edges = np.append(histogram["low"].to_numpy(float), float(histogram["high"].max()))
    counts = histogram["count"].to_numpy(float)
    return 100 * counts / max(counts.sum(), 1), edges * scale


def _spread(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epochs (E,), common bin edges (N + 1,), and shares (E, N): each epoch's counts, spread over common bins."""
    low, high = float(table["low"].min()), float(table["high"].max())
    bins = int(table.groupby("epoch").size().max())
    edges = np.linspace(low, high if high > low else low + 1e-6, bins + 1)
    epochs, shares = [], []
    for epoch, histogram in table.groupby("epoch"):
        percent, own = _shares(histogram, 1.0)
        if not percent.any():
            continue
        cumulative = np.append(0.0, np.cumsum(percent))
        epochs.append(float(str(epoch)))
        shares.append(np.diff(np.interp(edges, own, cumulative, left=0.0)))
    return np.array(epochs), edges, np.array(shares)


@styled
def training_curves(runs: Sequence[Run], column: str) -> Figure:
    """One column of metrics.csv over the epochs, one line per run, each named at its end.

    Accuracies are in percent, distances in the unit of the evaluations, effective weight norms on a log scale.

    Args:
        runs: runs without the column are left out.
        column: a column of metrics.csv; `TITLES` knows how to call the usual ones.

    Raises:
        NoRecords: when no run holds a finite value of the column.
    """
    drawn: list[tuple[int, str, np.ndarray, np.ndarray]] = []
    distance = unit_of(runs)
    scale = 100.0 if column.startswith(_PERCENT) else distance.scale if column.startswith(_DISTANCE) else 1.0
    for position, (run, name) in enumerate(zip(runs, labels(runs), strict=True)):
        metrics = run.metrics
        if metrics is None or column not in metrics:
            continue
        values = scale * pd.to_numeric(metrics[column], errors="coerce").to_numpy(float)
        epochs = metrics["epoch"].to_numpy(float) if "epoch" in metrics else np.arange(len(values), dtype=float)
        kept = np.isfinite(values)
        if kept.any():
            drawn.append((position, shortened(name), epochs[kept], values[kept]))
    if not drawn:
        raise NoRecords(f"no run holds {column!r} in its metrics.csv")

    figure, axes = canvas(height=max(3.3, 0.17 * len(drawn) + 0.8))
    for position, _, epochs, values in drawn:
        style = look(position)
        marker = style.marker if len(values) < 2 else ""
        axes.plot(epochs, values, color=style.colour, linestyle=style.dash, marker=marker, gid=f"run-{position}")
    title = TITLES.get(column, column.replace("_", " "))
    axes.set(xlabel="epoch", ylabel=f"{title} ({distance.name})" if column.startswith(_DISTANCE) else title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if column == "effective_weight_norm" and all((values > 0).all() for *_, values in drawn):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.grid(which="minor", linewidth=0.4)
    axes.margins(x=0.02)
    if column == "effective_margin":
        # One collapsed run must not flatten all others.
        high = max(float(values.max()) for *_, values in drawn)
        if high > 0 and axes.get_ylim()[0] < -high / 2:
            axes.set_ylim(-high / 2, 1.08 * high)
    label_ends(
        axes, [Label(epochs[-1], values[-1], name, look(position).ink) for position, name, epochs, values in drawn]
    )
    return figure


@styled
def margin_distribution(runs: Sequence[Run]) -> Figure:
    """Per run, the share of evaluated samples whose effective margin is at least the value on the horizontal axis.

    The complement of the distribution function: at zero it is the clean accuracy, and further right is better.

    Raises:
        NoRecords: when no run holds effective margins in its evaluation.parquet.
    """
    shown = unit_of(runs)
    drawn: list[tuple[int, str, np.ndarray]] = []
    for position, (run, name) in enumerate(zip(runs, labels(runs), strict=True)):
        samples = run.evaluation_samples
        if samples is None or "effective_margin" not in samples:
            continue
        margins = samples["effective_margin"].dropna().to_numpy(float) * shown.scale
        if len(margins):
            drawn.append((position, shortened(name), np.sort(margins)))
    if not drawn:
        raise NoRecords("no run holds effective margins in its evaluation.parquet")

    figure, axes = canvas(height=3.6)
    pooled = np.concatenate([margins for *_, margins in drawn])
    pooled = pooled[np.isfinite(pooled)]
    low, high = np.quantile(pooled, (0.01, 0.99)) if len(pooled) else (0.0, 1.0)
    high = high if high > low else low + 1.0
    # Samples far below zero are misclassified by much: they must not compress the range that is read.
    low = max(low, -high / 2) if high > 0 else low
    # A grid instead of every sample: the file stays small, and the heights on the grid are exact.
    grid = np.linspace(low - 0.02 * (high - low), high + 0.02 * (high - low), 401)
    drawn.sort(key=lambda entry: -float(np.median(entry[2])))
    for position, _, margins in drawn:
        style = look(position)
        share = 100 * (1 - np.searchsorted(margins, grid, side="left") / len(margins))
        axes.plot(grid, share, color=style.colour, linestyle=style.dash, gid=f"run-{position}")
    axes.set(xlabel=f"effective margin ({shown.name})", ylabel="samples with at least this margin (%)", ylim=(0, 101))
    axes.set_xlim(grid[0], grid[-1])
    axes.axvline(0, color=INK, linewidth=0.8)
    _mark_radius(axes, runs, shown.scale)
    legend = axes.legend(axes.lines[: len(drawn)], ["-"] * len(drawn), frameon=False, loc="upper right", fontsize=8)
    # Names go in afterwards: a legend would read "$" as mathematics and drop a leading "_".
    for text, (position, name, _) in zip(legend.get_texts(), drawn, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
        text.set_color(look(position).ink)
    return figure


def _mark_radius(axes: Axes, runs: Sequence[Run], scale: float) -> None:
    """A line at the radius of the evaluations, where all share one."""
    sizes = {(e.get("norm"), number(e.get("eps"))) for run in runs if (e := run.evaluation) is not None}
    if len(sizes) == 1:
        mark_radius(axes, *sizes.pop(), scale)


def mark_radius(axes: Axes, norm: object, eps: float, scale: float) -> None:
    """A named line at a radius, where that lies within the plot; `scale` takes it to the axis' unit."""
    if 0 < eps * scale < axes.get_xlim()[1]:
        axes.axvline(eps * scale, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), gid="eps")
        axes.text(
            eps * scale, 1.01, f"{NORMS.get(str(norm), '')} ε = {size_text(eps)}", transform=axes.get_xaxis_transform(),
            color=MUTED, fontsize=8, ha="center", va="bottom",
        )  # fmt: skip


@styled
def extremes(run: Run, most: int = 12) -> Figure:
    """The training samples with the smallest and the largest radii, with label and radius.

    Args:
        run: whose extremes.npz to draw.
        most: samples shown of either kind, six per row.

    Raises:
        NoRecords: when the run holds no extremes, or all radii are equal.
        NotImages: when its samples are not images.
    """
    records = run.extremes
    if records is None or not (len(records["small_x"]) and len(records["large_x"])):
        raise NoRecords(f"run {run.name!r} holds no extremes.npz")
    if records["small_radius"].min() == records["large_radius"].max():
        raise _one_radius(run, float(records["large_radius"].max()))
    shape = records["small_x"].shape[1:]
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] not in (1, 3)):
        raise NotImages(f"run {run.name!r}: samples of shape {shape} are not images, so they are not drawn")

    shown = unit(norm_of(run), [float(records["large_radius"].max())])
    low, high = (f([f(records[f"{kind}_x"]) for kind in ("small", "large")]) for f in (np.min, np.max))
    low, high = min(float(low), 0.0), max(float(high), 1.0)
    counts = {kind: min(most, len(records[f"{kind}_x"])) for kind in ("small", "large")}
    columns = min(6, max(counts.values()))
    rows = {kind: -(-count // columns) for kind, count in counts.items()}
    figure = Figure(figsize=(5.2, 1.02 * sum(rows.values()) + 0.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[rows[kind] for kind in ("small", "large")])
    for part, kind, title in zip(parts, rows, ("Smallest radii", "Largest radii"), strict=True):
        part.suptitle(f"{title}: label and radius ({shown.name})", x=0.01, ha="left", fontsize=9, weight="bold")
        cells = part.subplots(rows[kind], columns, squeeze=False).ravel()
        for cell in cells:
            cell.set_axis_off()
        for cell, image, label, radius in zip(
            cells, *(records[f"{kind}_{field}"][: counts[kind]] for field in ("x", "label", "radius")), strict=False
        ):
            picture = (image - low) / (high - low)
            picture = picture.transpose(1, 2, 0) if picture.ndim == 3 else picture
            cell.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            cell.set_title(
                f"{label}  at {round(float(radius) * shown.scale, 3):g}", fontsize=7.5, color=MUTED, loc="center", pad=3
            )
    return figure
