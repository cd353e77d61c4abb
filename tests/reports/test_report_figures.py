"""Figures show the records: the artists are inspected, not only that drawing succeeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from wideberth.reports import NoRecords, extremes, margin_distribution, radius_histogram, trade_off, training_curves
from wideberth.reports.style import data_uri, look, svg
from wideberth.runs import Run

NAMES = ["standard", "standard + EMR", "PGD-AT", "IAAT", "AT + EMR", "IAAT + EMR"]


def _line(axes: Axes, gid: str) -> Line2D:
    return next(line for line in axes.lines if line.get_gid() == gid)


def _texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def _boxes(figure: Figure, names: list[str]) -> list:
    figure.draw_without_rendering()
    found = [text for text in figure.findobj(Text) if text.get_text() in names]
    assert len(found) == len(names)
    # An annotation's own extent would include its leader line.
    return [Text.get_window_extent(text) for text in found]


def _overlapping(boxes: list) -> bool:
    return any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_trade_off_points_bars_and_names(six: list[Run]) -> None:
    figure = trade_off(six)
    axes = figure.axes[0]
    for position, run in enumerate(six):
        line = _line(axes, f"run-{position}")
        verdict = run.evaluation
        assert verdict is not None
        assert line.get_xdata()[0] == pytest.approx(100 * verdict["clean_accuracy"])
        assert line.get_ydata()[0] == pytest.approx(100 * verdict["robust_accuracy"])
        assert line.get_color() == look(position).colour
    ends = np.concatenate([segment for bar in axes.collections for segment in bar.get_segments()])
    verdict = six[2].evaluation
    assert verdict is not None
    for bound in verdict["robust_interval"]:
        assert np.isclose(ends[:, 1], 100 * bound).any()
    assert set(NAMES) <= set(_texts(figure))


def test_trade_off_names_do_not_overlap_and_stay_inside(six: list[Run]) -> None:
    figure = trade_off(six)
    boxes = _boxes(figure, NAMES)
    assert not _overlapping(boxes)
    frame = figure.bbox
    assert all(frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) for box in boxes)


def test_trade_off_separates_names_of_close_points(altered: Callable[..., Run]) -> None:
    runs = [
        altered(2, f"run{i}", config={"name": f"seed {i}"}, evaluation={"robust_accuracy": 0.722 + 0.001 * i})
        for i in range(5)
    ]
    assert not _overlapping(_boxes(trade_off(runs), [f"seed {i}" for i in range(5)]))


def test_trade_off_without_intervals(altered: Callable[..., Run]) -> None:
    run = altered(2, evaluation={"clean_interval": None, "robust_interval": None})
    assert len(_line(trade_off([run]).axes[0], "run-0").get_xdata()) == 1


def test_colours_do_not_depend_on_who_else_has_records(six: list[Run], altered: Callable[..., Run]) -> None:
    runs = [altered(0, drop=("metrics.csv",)), six[3]]
    axes = training_curves(runs, "loss").axes[0]
    assert [line.get_color() for line in axes.lines] == [look(1).colour]


def test_looks_stay_distinct() -> None:
    assert len({(style.colour, style.dash, style.marker) for style in map(look, range(21))}) == 21


@pytest.mark.parametrize(("column", "scale"), [("effective_margin", 1.0), ("loss", 1.0), ("validation_robust", 100.0)])
def test_training_curves_hold_the_column(six: list[Run], column: str, scale: float) -> None:
    figure = training_curves(six, column)
    axes = figure.axes[0]
    for position, run in enumerate(six):
        line = _line(axes, f"run-{position}")
        assert run.metrics is not None
        np.testing.assert_allclose(line.get_ydata(), scale * run.metrics[column])
        np.testing.assert_array_equal(line.get_xdata(), run.metrics["epoch"])
    assert axes.get_yscale() == "linear"
    assert not _overlapping(_boxes(figure, NAMES))


def test_weight_norm_is_logarithmic(six: list[Run]) -> None:
    assert training_curves(six, "effective_weight_norm").axes[0].get_yscale() == "log"


def test_names_at_ends_of_equal_curves_keep_apart(altered: Callable[..., Run]) -> None:
    names = [f"copy {i}" for i in range(12)]
    runs = [altered(0, f"run{i}", config={"name": name}) for i, name in enumerate(names)]
    assert not _overlapping(_boxes(training_curves(runs, "loss"), names))


def test_curves_skip_gaps(altered: Callable[..., Run]) -> None:
    run = altered(0)
    table = run.metrics
    assert table is not None
    table.loc[3:, "loss"] = np.nan
    table.to_csv(run.path / "metrics.csv", index=False)
    assert list(training_curves([run], "loss").axes[0].lines[0].get_xdata()) == [0, 1, 2]


def test_small_linf_distances_read_in_pixel_steps(altered: Callable[..., Run]) -> None:
    run = altered(3, evaluation={"eps": 8 / 255})
    axes = training_curves([run], "effective_margin").axes[0]
    assert "1/255" in axes.get_ylabel()
    assert run.metrics is not None
    np.testing.assert_allclose(axes.lines[0].get_ydata(), 255 * run.metrics["effective_margin"])
    assert "\N{SCRIPT SMALL L}∞ ε = 8/255" in _texts(margin_distribution([run]))


def test_radius_histogram_shares_and_median(iaat: Run) -> None:
    figure = radius_histogram(iaat)
    over_time, final = figure.axes
    table, samples = iaat.radii, iaat.samples
    assert table is not None
    assert samples is not None
    mesh = next(c for c in over_time.collections if c.get_gid() == "density")
    shares = np.asarray(mesh.get_array()) ** 2
    expected = table.pivot_table(index="low", columns="epoch", values="count").to_numpy() / 10
    np.testing.assert_allclose(shares, expected, atol=1e-9)
    median = _line(over_time, "quantile-0.5").get_ydata()[-1]
    assert median == pytest.approx(samples["radius"].median(), abs=0.005)
    last = final.patches[0].get_data()
    np.testing.assert_allclose(last.values, expected[:, -1])
    assert last.values.sum() == pytest.approx(100)


def test_radius_histogram_pours_changing_bins_into_common_ones(altered: Callable[..., Run]) -> None:
    run = altered(3)
    pd.DataFrame(
        {"epoch": [0, 0, 4, 4], "low": [0, 0.1, 0, 0.2], "high": [0.1, 0.2, 0.2, 0.4], "count": [2, 2, 2, 2]}
    ).to_parquet(run.path / "radii.parquet")
    over_time = radius_histogram(run).axes[0]
    mesh = next(c for c in over_time.collections if c.get_gid() == "density")
    np.testing.assert_allclose(np.asarray(mesh.get_array()) ** 2, [[100, 50], [0, 50]], atol=1e-9)
    np.testing.assert_allclose(_line(over_time, "quantile-0.5").get_ydata(), [0.1, 0.2])


def test_radius_histogram_from_samples_alone(altered: Callable[..., Run]) -> None:
    run = altered(3, drop=("radii.parquet",))
    (axes,) = radius_histogram(run).axes
    assert axes.patches[0].get_data().values.sum() == pytest.approx(100)


def test_margin_distribution_is_the_share_at_least(six: list[Run]) -> None:
    axes = margin_distribution(six).axes[0]
    for position, run in enumerate(six):
        line = _line(axes, f"run-{position}")
        x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        samples = run.evaluation_samples
        assert samples is not None
        margins = samples["effective_margin"].to_numpy(float)
        np.testing.assert_allclose(y, [100 * (margins >= at).mean() for at in x])
        assert (np.diff(y) <= 0).all()
    assert _line(axes, "eps").get_xdata()[0] == pytest.approx(0.1)
    legend = axes.get_legend()
    assert legend is not None
    assert sorted(text.get_text() for text in legend.get_texts()) == sorted(NAMES)


def test_margin_distribution_of_infinite_and_equal_margins(altered: Callable[..., Run]) -> None:
    run = altered(0)
    for margins in ([np.inf, np.inf], [0.1, 0.1], [np.nan, 0.2]):
        pd.DataFrame({"effective_margin": margins}).to_parquet(run.path / "evaluation.parquet")
        assert np.isfinite(margin_distribution([run]).axes[0].get_xlim()).all()


def test_extremes_show_images_labels_and_radii(iaat: Run) -> None:
    figure = extremes(iaat, most=5)
    records = iaat.extremes
    assert records is not None
    images = [image for axes in figure.findobj(Axes) for image in axes.images]
    assert len(images) == 10
    np.testing.assert_allclose(images[0].get_array(), records["small_x"][0, 0])
    np.testing.assert_allclose(images[5].get_array(), records["large_x"][0, 0])
    assert f"{records['small_label'][0]}  at {round(float(records['small_radius'][0]), 3):g}" in _texts(figure)


@pytest.mark.parametrize(("shape", "drawn"), [((3, 4, 4), (4, 4, 3)), ((4, 4), (4, 4)), ((1, 4, 4), (4, 4))])
def test_extremes_accept_every_image_layout(altered: Callable[..., Run], shape: tuple, drawn: tuple) -> None:
    run = altered(3)
    records = run.extremes
    assert records is not None
    for kind in ("small", "large"):
        records[f"{kind}_x"] = np.random.default_rng(0).random((16, *shape), dtype=np.float32)
    np.savez(run.path / "extremes.npz", **records)
    images = [image for axes in extremes(run).findobj(Axes) for image in axes.images]
    assert np.shape(images[0].get_array()) == drawn


def test_extremes_refuse_what_is_no_image(altered: Callable[..., Run]) -> None:
    run = altered(3)
    records = run.extremes
    assert records is not None
    for kind in ("small", "large"):
        records[f"{kind}_x"] = records[f"{kind}_x"].reshape(16, 64)
    np.savez(run.path / "extremes.npz", **records)
    with pytest.raises(NoRecords, match=r"\(64,\) are not images"):
        extremes(run)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda run: trade_off([run]), "evaluation.json"),
        (lambda run: margin_distribution([run]), "evaluation.parquet"),
        (lambda run: training_curves([run], "loss"), "'loss'"),
        (radius_histogram, "no radii"),
        (extremes, "extremes.npz"),
    ],
)
def test_figures_say_which_record_is_missing(draw: Callable[[Run], Figure], message: str, tmp_path: Path) -> None:
    with pytest.raises(NoRecords, match=message):
        draw(Run(tmp_path))


def test_one_radius_for_all_is_not_drawn(six: list[Run]) -> None:
    with pytest.raises(NoRecords, match=r"same radius, about 0\.1"):
        radius_histogram(six[2])


def test_radii_still_in_warm_up_are_not_drawn(altered: Callable[..., Run]) -> None:
    run = altered(3)
    table, records = run.radii, run.extremes
    assert table is not None
    assert records is not None
    table.assign(count=np.where(table["low"] == table["low"].min(), 1000, 0)).to_parquet(run.path / "radii.parquet")
    records["small_radius"][:] = records["large_radius"][:] = 0.1
    np.savez(run.path / "extremes.npz", **records)
    for draw in (radius_histogram, extremes):
        with pytest.raises(NoRecords, match="same radius"):
            draw(run)


def test_a_collapsed_run_does_not_flatten_the_others(six: list[Run], altered: Callable[..., Run]) -> None:
    run = altered(0)
    table, samples = run.metrics, run.evaluation_samples
    assert table is not None
    assert samples is not None
    table.assign(effective_margin=-20.0).to_csv(run.path / "metrics.csv", index=False)
    samples.assign(effective_margin=-20.0).to_parquet(run.path / "evaluation.parquet")
    low, high = training_curves([run, six[3]], "effective_margin").axes[0].get_ylim()
    assert low >= -high
    low, high = margin_distribution([run, six[3]]).axes[0].get_xlim()
    assert low >= -high


def test_no_global_state(six: list[Run]) -> None:
    before = dict(mpl.rcParams)
    data_uri(trade_off(six))
    assert dict(mpl.rcParams) == before


def test_svg_is_small_bare_and_repeatable(six: list[Run]) -> None:
    first, again = svg(trade_off(six)), svg(trade_off(six))
    assert first == again
    assert first.startswith(b"<svg")
    assert len(first) < 60_000


def test_heavy_figures_become_png(six: list[Run]) -> None:
    figure = trade_off(six)
    assert data_uri(figure).startswith("data:image/svg+xml;base64,")
    figure.axes[0].plot(*(20 + 70 * np.random.default_rng(0).random((2, 6_000))))
    figure.axes[0].set(xlim=(0, 100), ylim=(0, 100))
    assert data_uri(figure, limit=50_000).startswith("data:image/png;base64,")
