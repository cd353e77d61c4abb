"""Pictures of a verdict show its record, and the report shows them where the record allows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from scipy.stats import binomtest

from wideberth.checks import InputError
from wideberth.evaluation import Evaluation
from wideberth.evaluation.curve import accuracy_curve
from wideberth.reports import NoRecords, costs, robustness_curve, survival, write_report
from wideberth.reports.verdicts import outcomes
from wideberth.runs import Run

EPS = 8 / 255
HOSTILE = "<script>alert('x')</script> & \"$\\frac{_"
ATTACKS = ("APGD-CE", "APGD-T", "FAB-T", "Square")


def _table(radii: Any) -> pd.DataFrame:
    return pd.DataFrame({"radius": np.asarray(radii, dtype=float)})


def _evaluation(n: int = 400, names: tuple[str, ...] = ATTACKS, seconds: float = 40.0, **protocol: Any) -> Evaluation:
    """Radii spread around eps, some of them infinite; all but the third attack break some samples."""
    rng = np.random.default_rng(0)
    correct = rng.random(n) < 0.85
    radius = np.where(correct, rng.gamma(2.2, 0.018, n), 0.0)
    radius[correct & (rng.random(n) < 0.05)] = np.inf
    broken = correct & (radius <= EPS)
    attack = np.where(correct, "", "clean").astype(object)
    attack[broken] = rng.choice(list(names), broken.sum(), p=[0.8, 0.1, 0.0, 0.1])
    work = dict(zip(names, (10, 300, 2000, 4000), strict=True)) | {"": 9000, "clean": 1}
    samples = pd.DataFrame(
        {
            "index": np.arange(n), "label": 0, "clean_correct": correct, "robust": correct & ~broken,
            "attack": attack, "evaluations": [work[name] for name in attack], "radius": radius,
        }
    )  # fmt: skip
    left, line_up = correct.mean(), []
    for place, name in enumerate(names, start=1):
        left -= (attack == name).mean()
        line_up.append({"name": name, "robust_accuracy": float(left), "seconds": place * seconds})
    told = {"data": "digits", "split": "test", "norm": "linf", "eps": EPS, "suite": "standard", "attacks": line_up}
    return Evaluation(samples, told | protocol)


def _line(figure: Figure, gid: str) -> Line2D:
    return next(line for line in figure.axes[0].lines if line.get_gid() == gid)


def _texts(figure: Figure) -> list[Text]:
    figure.draw_without_rendering()
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def _assert_legible(figure: Figure) -> None:
    """All annotations inside of the figure, none on another."""
    _texts(figure)
    notes = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = [Text.get_window_extent(note) for note in notes]
    whole = figure.bbox.padded(1)
    for place, box in enumerate(boxes):
        assert whole.contains(box.x0, box.y0), notes[place]
        assert whole.contains(box.x1, box.y1), notes[place]
        assert not any(box.overlaps(other) for other in boxes[:place]), notes[place]


# ---- the curve --------------------------------------------------------------------------------------------------


def test_curve_is_the_share_beyond_each_radius() -> None:
    curve = accuracy_curve(_table([0.2, 0.0, np.inf, 0.1]), [0.0, 5.0, 0.1, 0.15, 0.2])
    assert list(curve.columns) == ["eps", "accuracy", "low", "high"]
    assert curve["eps"].tolist() == [0.0, 5.0, 0.1, 0.15, 0.2]
    assert curve["accuracy"].tolist() == [0.75, 0.25, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_band_is_the_exact_binomial_interval(confidence: float) -> None:
    n = 12
    curve = accuracy_curve(_table(np.arange(n) / 10), np.arange(n + 1) / 10 - 0.05 * (np.arange(n + 1) > 0), confidence)
    hits = (n * curve["accuracy"]).round().astype(int)
    assert set(hits) == set(range(n))
    none = accuracy_curve(_table(np.full(n, np.inf)), [1.0], confidence)
    for k, low, high in [*zip(hits, curve["low"], curve["high"], strict=True), (n, *none.loc[0, ["low", "high"]])]:
        expected = binomtest(int(k), n).proportion_ci(confidence, method="exact")
        assert low == pytest.approx(expected.low, abs=1e-12)
        assert high == pytest.approx(expected.high, abs=1e-12)


@pytest.mark.parametrize("n", [1, 7, 500])
def test_curve_never_rises(n: int) -> None:
    rng = np.random.default_rng(n)
    radii = rng.choice([0.0, 0.1, np.inf, *rng.random(20)], n)
    curve = accuracy_curve(_table(radii), np.sort(np.concatenate([rng.random(300), radii[np.isfinite(radii)]])))
    for column in ("accuracy", "low", "high"):
        assert (np.diff(curve[column]) <= 0).all()
    assert (curve["low"] <= curve["accuracy"]).all()
    assert (curve["accuracy"] <= curve["high"]).all()


def test_curve_meets_the_verdict_within_the_slack_of_verification() -> None:
    radii = EPS * np.array([1, 1 + 5e-7, 1 + 1e-5])
    assert accuracy_curve(_table(radii), [EPS])["accuracy"].tolist() == [pytest.approx(1 / 3)]
    evaluation = _evaluation()
    curve = accuracy_curve(evaluation.samples, [0.0, EPS])
    assert curve["accuracy"].tolist() == [evaluation.clean_accuracy, evaluation.robust_accuracy]
    assert tuple(curve.loc[1, ["low", "high"]]) == pytest.approx(evaluation.interval(), abs=1e-12)


@pytest.mark.parametrize(
    ("samples", "radii", "confidence", "message"),
    [
        (pd.DataFrame({"distance": [1.0]}), [0.1], 0.95, "no column 'radius'"),
        (_table([]), [0.1], 0.95, "no rows"),
        (_table([np.nan]), [0.1], 0.95, "negative or missing"),
        (_table([-1.0]), [0.1], 0.95, "negative or missing"),
        (_table([1.0]), [-0.1], 0.95, "radii"),
        (_table([1.0]), [np.inf], 0.95, "radii"),
        (_table([1.0]), [[0.1]], 0.95, "radii"),
        (_table([1.0]), [0.1], 1.0, r"confidence=1\.0"),
    ],
)
def test_curve_refuses(samples: pd.DataFrame, radii: Any, confidence: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        accuracy_curve(samples, radii, confidence)


# ---- the figures ------------------------------------------------------------------------------------------------


def test_survival_steps_down_attack_by_attack() -> None:
    evaluation = _evaluation(seconds=10.0)
    figure = survival(evaluation)
    line = _line(figure, "survival")
    left = [evaluation.clean_accuracy, *(attack["robust_accuracy"] for attack in evaluation.protocol["attacks"])]
    np.testing.assert_allclose(line.get_xdata(), [0, 10, 30, 60, 100])
    np.testing.assert_allclose(line.get_ydata(), 100 * np.array(left))
    assert line.get_drawstyle() == "steps-post"
    assert figure.axes[0].get_xlabel() == "seconds of attack"
    assert f"APGD-T: {100 * left[2]:.1f}" in [text.get_text() for text in _texts(figure)]


@pytest.mark.parametrize(("seconds", "end", "name"), [(60.0, 10, "minutes"), (7200.0, 20, "hours")])
def test_long_evaluations_read_in_minutes_and_hours(seconds: float, end: float, name: str) -> None:
    figure = survival(_evaluation(seconds=seconds))
    assert _line(figure, "survival").get_xdata()[-1] == pytest.approx(end)
    assert figure.axes[0].get_xlabel() == f"{name} of attack"


def test_attacks_are_named_in_their_order_without_overlap() -> None:
    line_up = [{"name": f"attack {i}", "robust_accuracy": 0.5, "seconds": 1000.0**i} for i in range(4)]
    line_up += [{"name": f"attack {i}", "robust_accuracy": 0.5 - 1e-4 * i, "seconds": 0.0} for i in range(4, 12)]
    figure = survival(_evaluation(attacks=line_up))
    _assert_legible(figure)
    heights = {text.get_text().split(":")[0]: Text.get_window_extent(text).y0 for text in figure.axes[0].texts}
    named = [heights["clean"], *(heights[f"attack {i}"] for i in range(12))]
    assert named == sorted(named, reverse=True)


def test_robustness_curve_holds_every_step_of_few_samples() -> None:
    evaluation = _evaluation(60)
    figure = robustness_curve(evaluation)
    line = _line(figure, "curve")
    radii = np.asarray(line.get_xdata()) / 255
    np.testing.assert_allclose(line.get_ydata(), 100 * accuracy_curve(evaluation.samples, radii)["accuracy"])
    some = evaluation.samples["radius"]
    assert np.isin(some[some < 0.9 * radii[-1]].to_numpy().round(12), radii.round(12)).all()
    band = next(c for c in figure.axes[0].collections if c.get_gid() == "band").get_paths()[0].vertices
    low, high = 100 * np.array(evaluation.interval())
    at_eps = band[np.isclose(band[:, 0], 8), 1]
    assert np.isclose(at_eps, low).any()
    assert np.isclose(at_eps, high).any()


def test_robustness_curve_of_many_samples_stays_small() -> None:
    evaluation = _evaluation(5000)
    line = _line(robustness_curve(evaluation), "curve")
    radii = np.asarray(line.get_xdata()) / 255
    assert len(radii) < 310
    np.testing.assert_allclose(line.get_ydata(), 100 * accuracy_curve(evaluation.samples, radii)["accuracy"])


def test_robustness_curve_marks_the_verdict() -> None:
    evaluation = _evaluation()
    figure = robustness_curve(evaluation)
    verdict = _line(figure, "verdict")
    assert verdict.get_xdata() == [pytest.approx(8)]
    assert verdict.get_ydata() == [pytest.approx(100 * evaluation.robust_accuracy)]
    assert _line(figure, "eps").get_xdata()[0] == pytest.approx(8)
    assert {"\N{SCRIPT SMALL L}∞ ε = 8/255", f"{100 * evaluation.robust_accuracy:.1f}"} <= {
        text.get_text() for text in _texts(figure)
    }
    _assert_legible(figure)


@pytest.mark.parametrize(("radius", "accuracy"), [(0.0, 0.0), (np.inf, 100.0)])
def test_robustness_curve_without_any_boundary(radius: float, accuracy: float) -> None:
    found = _evaluation()
    samples = found.samples.assign(radius=radius, clean_correct=radius > 0, robust=radius > 0)
    figure = robustness_curve(Evaluation(samples, found.protocol))
    line = _line(figure, "curve")
    assert set(line.get_ydata()) == {accuracy}
    assert line.get_xdata()[-1] > 8
    _assert_legible(figure)


def test_costs_histogram_holds_all_samples_of_each_outcome() -> None:
    evaluation = _evaluation()
    parts = outcomes(evaluation)
    assert list(parts) == [
        "misclassified from the start", "broken by APGD-CE", "broken by APGD-T", "broken by Square", "robust",
    ]  # fmt: skip
    assert sum(map(len, parts.values())) == len(evaluation.samples)
    figure = costs(evaluation)
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    drawn = [patch.get_data() for patch in axes.patches]
    for row, (part, histogram) in enumerate(zip(parts.values(), drawn, strict=True)):
        (filled,) = np.flatnonzero(histogram.values + row > 1e-9)  # each outcome took one and the same number here
        assert histogram.edges[filled] <= part["evaluations"].iloc[0] <= histogram.edges[filled + 1]
    words = [text.get_text() for text in axes.texts]
    assert {f"{100 * len(parts['robust']) / 400:.1f}", "9,000", *parts} <= set(words)
    _assert_legible(figure)


def test_costs_heights_are_proportional_within_an_outcome() -> None:
    samples = pd.DataFrame({"clean_correct": True, "robust": True, "attack": "", "evaluations": [10] * 3 + [14]})
    figure = costs(Evaluation(samples, {}))
    assert figure.axes[0].get_xscale() == "linear"
    heights = figure.axes[0].patches[0].get_data().values
    np.testing.assert_allclose(sorted(heights[heights > 0]), [heights.max() / 3, heights.max()])


def test_costs_tell_an_attack_called_robust_from_robust_samples() -> None:
    evaluation = _evaluation(names=("robust", HOSTILE, "FAB-T", "a name far too long for any figure, indeed"))
    assert list(outcomes(evaluation))[1::3] == ["broken by robust", "robust"]
    for draw in (costs, survival):
        figure = draw(evaluation)
        _assert_legible(figure)
        # Long names lose their middle: they would push the data aside.
        assert figure.axes[0].get_position().width > 0.25
        assert any("…" in text.get_text() for text in figure.axes[0].texts)


@pytest.mark.parametrize(
    ("draw", "protocol", "dropped", "message"),
    [
        (survival, {"attacks": []}, [], "seconds of each attack"),
        (survival, {"attacks": [{"name": "PGD", "robust_accuracy": 0.5}]}, [], "seconds of each attack"),
        (survival, {}, ["clean_correct"], "seconds of each attack"),
        (robustness_curve, {}, ["radius"], "no radius"),
        (costs, {}, ["evaluations"], "no evaluations"),
        (costs, {}, ["attack", "robust"], "no robust and no attack"),
    ],
)
def test_verdict_figures_say_what_is_missing(
    draw: Callable[[Evaluation], Figure], protocol: dict[str, Any], dropped: list[str], message: str
) -> None:
    found = _evaluation(**protocol)
    with pytest.raises(NoRecords, match=message):
        draw(Evaluation(found.samples.drop(columns=dropped), found.protocol))


# ---- the report -------------------------------------------------------------------------------------------------

GRADE = {"verdict": "masked", "reason": "2 of 21 checks were raised."}
FINDINGS = [
    {"name": "saturated loss", "raised": True, "severity": "masked", "why": "It has no slope.", "advice": "Use DLR."},
    {"name": "no gradient", "raised": False, "severity": "masked", "why": "There is one.", "advice": "None needed."},
]


@pytest.fixture
def judged(altered: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """A run with an evaluation of its own: `judged(position, drop=columns, **protocol)`; figures are not rendered."""
    monkeypatch.setattr("wideberth.reports.html.data_uri", lambda figure: "data:image/svg+xml;base64,")

    def run(position: int, drop: tuple[str, ...] = (), **protocol: Any) -> Run:
        records_of_training = ("metrics.csv", "radii.parquet", "extremes.npz", "samples.parquet")
        found = altered(position, f"run{position}", drop=records_of_training)
        evaluation = _evaluation(**protocol)
        (found.path / "evaluation.json").write_text(json.dumps(evaluation.summary()))  # as version 0.1 kept it
        evaluation.samples.drop(columns=list(drop)).to_parquet(found.path / "evaluation.parquet")
        return found

    return run


def _report(runs: list[Run], tmp_path: Path) -> str:
    return " ".join(write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8").split())


def test_report_shows_the_verdict_with_words(judged: Callable[..., Run], tmp_path: Path) -> None:
    html = _report([judged(2)], tmp_path)
    for title in ("Robust accuracy by radius", "Robust accuracy after each attack", "Evaluations per sample"):
        assert html.count(f"<h3>{title}</h3>") == 1
    assert '<a href="#verdict">The evaluation in detail</a>' in html
    assert "The height above a radius is the share of samples" in html
    never = np.isinf(_evaluation().samples["radius"]).mean()
    assert f"{100 * never:.1f}% of the samples broke at no distance at all" in html
    assert "including the search for the smallest radius" in html
    assert "Histograms of the evaluations per sample, by how the sample ended. Medians: misclassified" in html


@pytest.mark.parametrize(
    ("drop", "left"),
    [
        (("radius",), {"Robust accuracy after each attack", "Evaluations per sample"}),
        (("radius", "evaluations"), {"Robust accuracy after each attack"}),
        (("attack",), set()),
    ],
)
def test_report_of_an_older_evaluation(
    judged: Callable[..., Run], tmp_path: Path, drop: tuple[str, ...], left: set[str]
) -> None:
    html = _report([judged(2, drop)], tmp_path)
    titles = {"Robust accuracy by radius", "Robust accuracy after each attack", "Evaluations per sample"}
    assert {title for title in titles if f"<h3>{title}</h3>" in html} == left
    assert ('id="verdict"' in html) == bool(left)
    assert "including the search for the smallest radius" not in html
    assert "stay correctly classified" in html


def test_report_of_several_runs_names_each(judged: Callable[..., Run], six: list[Run], tmp_path: Path) -> None:
    html = _report([judged(2), six[0], judged(3)], tmp_path)
    titles = [f"<h3>Evaluations per sample: {name}</h3>" for name in ("PGD-AT", "standard", "IAAT")]
    assert [html.count(title) for title in titles] == [1, 0, 1]
    assert "The evaluations in detail" in html


def test_report_shows_grade_and_raised_findings(judged: Callable[..., Run], tmp_path: Path) -> None:
    html = _report([judged(2, grade=GRADE, findings=FINDINGS)], tmp_path)
    assert '<div class="grade masked"> <p><strong>masked</strong> 2 of 21 checks were raised.</p>' in html
    assert "<b>saturated loss</b> (masked) It has no slope. <span>Use DLR.</span>" in html
    assert "There is one." not in html
    assert "This verdict is graded masked." in html


def test_report_names_the_graded_run_among_several(judged: Callable[..., Run], tmp_path: Path) -> None:
    trusted = {"verdict": "trusted", "reason": "None of 21 checks was raised."}
    html = _report([judged(2, grade=trusted), judged(3)], tmp_path)
    assert '<div class="grade trusted"> <p><strong>trusted</strong> PGD-AT: None of 21 checks was raised.</p>' in html
    assert "This verdict is graded" not in html
    assert html.count('<div class="grade') == 1


def test_grade_of_the_leading_run_stands_in_the_headline(judged: Callable[..., Run], tmp_path: Path) -> None:
    best = judged(3, grade=GRADE)
    worse = judged(2, grade={"verdict": "doubtful", "reason": "One check was raised."})
    found = Evaluation.load(worse.path)
    samples = found.samples.assign(robust=found.samples["robust"] & (found.samples.index % 2 == 0))
    Evaluation(samples, found.protocol).save(worse.path)
    html = _report([worse, best], tmp_path)
    assert "IAAT has the highest robust accuracy of 2 runs" in html
    assert "This verdict is graded masked." in html


@pytest.mark.parametrize("partial", [{"findings": FINDINGS}, {"grade": {"verdict": "doubtful"}}])
def test_report_of_half_a_grade(judged: Callable[..., Run], tmp_path: Path, partial: dict[str, Any]) -> None:
    assert "what the checks of this evaluation found." in _report([judged(2, **partial)], tmp_path)


def test_report_without_grade_says_nothing_of_it(judged: Callable[..., Run], tmp_path: Path) -> None:
    html = _report([judged(2, findings=FINDINGS[1:])], tmp_path)
    assert '<div class="grade' not in html
    assert "graded" not in html


def test_hostile_grades_and_attacks_are_only_text(judged: Callable[..., Run], tmp_path: Path) -> None:
    finding = dict.fromkeys(("name", "severity", "why", "advice"), HOSTILE) | {"raised": True}
    grade = {"verdict": HOSTILE, "reason": HOSTILE}
    html = _report([judged(2, names=(HOSTILE, *ATTACKS[1:]), grade=grade, findings=[finding])], tmp_path)
    assert "<script" not in html
    assert '<div class="grade ">' in html
