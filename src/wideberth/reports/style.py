"""How figures look: one palette, one grid, labels beside the data instead of legends, and no global state."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from scipy.optimize import isotonic_regression

INK = "#1f2933"
MUTED = "#5f6b76"
GRID = "#e4e8ec"
ACCENT = "#d55e00"
DENSITY = LinearSegmentedColormap.from_list("density", ["#ffffff", "#9ecae1", "#2171b5", "#08306b"])

# Okabe and Ito's palette without its yellow, which white paper swallows.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))

STYLE: Any = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.edgecolor": "#a9b2bb",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#a9b2bb",
    "ytick.color": "#a9b2bb",
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "wideberth",
}

styled = rc_context(STYLE)
"""Decorates a figure function: the style holds while it draws, and whatever the caller had holds again after."""


@dataclass(frozen=True)
class Look:
    """How one run is drawn in every figure; `ink` is its colour dark enough for text on white."""

    colour: str
    ink: str
    marker: str
    dash: Any


def look(position: int) -> Look:
    """The look of the run at this position; past seven runs, dashes and markers tell equal colours apart."""
    lap, hue = divmod(position, len(_COLOURS))
    colour = _COLOURS[hue]
    red, green, blue = (0.68 * channel for channel in to_rgb(colour))
    return Look(
        colour=colour,
        ink=to_hex((red, green, blue)),
        marker=_MARKERS[(hue + lap) % len(_MARKERS)],
        dash=_DASHES[lap % len(_DASHES)],
    )


def canvas(width: float = 5.2, height: float = 3.5) -> tuple[Figure, Axes]:
    """One empty plot, in inches, that reads at half the width of a page."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


@dataclass(frozen=True)
class Label:
    """A text that belongs to the point (x, y) in data coordinates."""

    x: float
    y: float
    text: str
    ink: str


def label_ends(axes: Axes, ends: Sequence[Label], gap: float = 12.0) -> None:
    """Name each line to the right of the plot, level with its end, at least `gap` points apart."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    box = axes.get_window_extent()
    ends = sorted(ends, key=lambda end: end.y)
    low, high = sorted(axes.get_ylim())
    heights = [min(max(end.y, low), high) for end in ends]
    wanted = np.array([axes.transData.transform((0.5, height))[1] for height in heights])
    steps = gap * figure.dpi / 72 * np.arange(len(ends))
    # Least squares under "at least a gap apart" is isotonic regression once the gaps are taken off.
    placed = isotonic_regression(wanted - steps).x
    placed = np.clip(placed, box.y0, max(box.y0, box.y1 - steps[-1])) + steps
    for end, level, height in zip(ends, heights, (placed - box.y0) / box.height, strict=True):
        axes.annotate(
            end.text,
            xy=(end.x, level),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=end.ink,
            fontsize=8,
            va="center",
            annotation_clip=False,
            parse_math=False,
            arrowprops={
                "arrowstyle": "-",
                "color": end.ink,
                "linewidth": 0.5,
                "alpha": 0.5,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )


def label_points(axes: Axes, points: Sequence[Label], obstacles: Sequence[Bbox]) -> None:
    """Name each point beside it, at the candidate place that covers least of other labels and of `obstacles`.

    Args:
        axes: with its limits set for good.
        points: what to name.
        obstacles: boxes in data coordinates that labels should keep clear of (markers are kept clear of anyway).
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    pixel = figure.dpi / 72
    taken = [Bbox(axes.transData.transform(box.get_points())).padded(pixel) for box in obstacles]
    for point in points:
        x, y = axes.transData.transform((point.x, point.y))
        taken.append(Bbox.from_extents(x, y, x, y).padded(5 * pixel))
    for point in points:
        text = axes.annotate(
            point.text, (point.x, point.y), (0, 0), textcoords="offset points",
            color=point.ink, fontsize=8, va="center", parse_math=False,
        )  # fmt: skip
        size = text.get_window_extent()
        x, y = axes.transData.transform((point.x, point.y))
        best = (np.inf, 0.0, 0.0, "left")
        for reach in (8, 14, 22, 32):
            for right, up in ((1, 0.6), (1, -0.6), (-1, 0.6), (-1, -0.6), (0, 1), (0, -1), (1, 0), (-1, 0)):
                left = x + right * reach * pixel - size.width * (1 - right) / 2
                middle = y + up * (reach + 3) * pixel
                place = Bbox.from_extents(left, middle - size.height / 2, left + size.width, middle + size.height / 2)
                outside = place.width * place.height - _overlap(place, frame)
                cost = sum(_overlap(place, box) for box in taken) + 4 * outside + 0.3 * reach * pixel
                align = {1: "left", -1: "right", 0: "center"}[right]
                if cost < best[0]:
                    best = (cost, right * float(reach), up * (reach + 3.0), align)
                    chosen = place
        text.set_position(best[1:3])
        text.set_horizontalalignment(best[3])  # type: ignore[arg-type]  # one of the three words above
        taken.append(chosen)


def _overlap(a: Bbox, b: Bbox) -> float:
    common = Bbox.intersection(a, b)
    return 0.0 if common is None else float(common.width * common.height)


# The page's own font where text is drawn by the browser; DejaVu, which set the layout, is wider than all of these.
_FONTS = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


@styled
def svg(figure: Figure) -> bytes:
    """The figure as a bare <svg> element: texts stay text, no prolog, no metadata, the same bytes every time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    return text.replace("'DejaVu Sans', sans-serif", _FONTS).encode()


@styled
def data_uri(figure: Figure, limit: int = 300_000) -> str:
    """The figure as a data: address: SVG, or a PNG at twice the screen's density where the SVG is heavy.

    Args:
        figure: what to embed.
        limit: bytes of SVG past which the smaller of the two is taken.
    """
    data, kind = svg(figure), "svg+xml"
    if len(data) > limit:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=192)
        if len(buffer.getvalue()) < len(data):
            data, kind = buffer.getvalue(), "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
