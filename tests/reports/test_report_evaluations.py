"""Runs with several evaluations: all are listed, those that go together are compared; one radius per sample."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from wideberth.cli import main
from wideberth.commands.evaluate import table as terminal_table
from wideberth.evaluation import Evaluation
from wideberth.reports import alike, all_evaluations, comparison, differing_protocols, robustness_curve, write_report
from wideberth.reports.evaluations import printed_evaluations
from wideberth.reports.records import NOTHING
from wideberth.reports.tables import printed
from wideberth.runs import Run

EACH = {"per_sample": True, "min": 0.05, "mean": 0.1, "max": 0.2}


def evaluation(robust: float = 0.5, **protocol: Any) -> Evaluation:
    n, eps = 40, protocol.get("eps", 0.1)
    radius = np.linspace(0, 0.4, n)
    samples = pd.DataFrame(
        {
            "index": np.arange(n), "clean_correct": radius > 0, "robust": np.arange(n) >= n * (1 - robust),
            "attack": "PGD", "evaluations": 5, "radius": radius,
        }
    )  # fmt: skip
    samples["eps"] = np.linspace(0.05, 0.2, n) if isinstance(eps, dict) else eps
    attacks = [{"name": "PGD", "robust_accuracy": robust, "seconds": 1.0}]
    told = {"data": "digits", "split": "test", "rows": "all 40", "norm": "linf", "eps": 0.1, "suite": "pgd", "seed": 0}
    return Evaluation(samples, told | {"attacks": attacks} | protocol)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """`bare(name, *evaluations)`: a run with these evaluations, oldest first; figures are not rendered to files."""
    monkeypatch.setattr("wideberth.reports.html.data_uri", lambda figure: "data:image/svg+xml;base64,")

    def make(name: str, *evaluations: Evaluation) -> Run:
        path = tmp_path / name
        path.mkdir()
        (path / "config.yaml").write_text("epochs: 3\n")
        for each in evaluations:
            each.save(path)
        return Run(path)

    return make


def page(runs: list[Run], tmp_path: Path) -> str:
    html = write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\s+", " ", html.partition("</style>")[2])


def test_all_evaluations_are_listed(bare: Callable[..., Run]) -> None:
    graded = evaluation(0.25, eps=0.2, grade={"verdict": "doubtful", "reason": "r"}, findings=[])
    run = bare("a", evaluation(), graded)
    table = all_evaluations([run])
    assert table["evaluation"].tolist() == [record.name for record in run.evaluations]
    assert table["eps"].tolist() == ["0.1", "0.2"]
    assert table["robust_accuracy"].tolist() == [0.5, 0.25]
    assert table["grade"].tolist() == ["", "doubtful"]
    assert table["shown"].tolist() == [False, True]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", day) for day in table["saved"])
    titles, rows = printed_evaluations(table)
    assert titles[0] == "evaluation"
    assert [row[titles.index("robust, at most, %")] for row in rows] == ["50.0", "25.0"]


def test_a_page_lists_what_it_is_not_about(bare: Callable[..., Run], tmp_path: Path) -> None:
    first, second = evaluation(0.5), evaluation(0.25, eps=0.2)
    run = bare("a", first, second)
    html = page([run], tmp_path)
    assert "25.0% of 40 test samples" in html
    assert f'<tr class="shown"><th scope="row">{second.name}</th>' in html
    assert f'<tr><th scope="row">{first.name}</th>' in html
    chosen = page([Run(run.path, first.name)], tmp_path)
    assert "50.0% of 40 test samples" in chosen
    assert f'<tr class="shown"><th scope="row">{first.name}</th>' in chosen


def test_a_page_about_the_only_evaluation_lists_none(bare: Callable[..., Run], tmp_path: Path) -> None:
    for runs in ([bare("a", evaluation())], [bare("b")]):
        html = page(runs, tmp_path)
        assert "All evaluations" not in html
        assert not re.search(rf">\s*(nan|None|{NOTHING})\s*<", html)


def test_runs_are_compared_by_the_newest_protocol_that_all_have(bare: Callable[..., Run]) -> None:
    at = {eps: evaluation(eps=eps) for eps in (0.1, 0.2, 0.3)}
    a, b = bare("a", at[0.1], at[0.2], at[0.3]), bare("b", at[0.2], at[0.1])
    plain = bare("c")
    found = alike([a, plain, b])
    assert [run.evaluation and run.evaluation["eps"] for run in found] == [0.2, None, 0.2]
    assert differing_protocols(found) == ""
    assert [run.path for run in found] == [a.path, plain.path, b.path]
    assert [(run.evaluation or {})["eps"] for run in alike([a, b], at[0.1].name)] == [0.1, 0.1]


def test_another_seed_or_number_of_rows_can_be_compared_where_nothing_closer_is_there(bare: Callable[..., Run]) -> None:
    a = bare("a", evaluation(seed=1), evaluation(eps=0.3))
    b = bare("b", evaluation(seed=2), evaluation(eps=0.4))
    assert [(run.evaluation or {})["eps"] for run in alike([a, b])] == [0.1, 0.1]


def test_where_protocols_differ_one_line_says_in_what(bare: Callable[..., Run]) -> None:
    runs = alike([bare("a", evaluation()), bare("b", evaluation(eps=8 / 255, norm="l2"))])
    line = differing_protocols(runs)
    assert line == "not comparable as they stand: the evaluations differ in norm (linf, l2); eps (0.1, 8/255)"


def test_compare_and_report_choose_and_say_so(bare: Callable[..., Run], tmp_path: Path, capsys) -> None:
    first, second = evaluation(0.5), evaluation(0.25, eps=0.2)
    a, b = bare("a", first, second), bare("b", evaluation(0.75))
    words = [str(a.path), str(b.path), "--out", str(tmp_path / "plot.png")]
    assert main(["compare", *words]) == 0
    out = capsys.readouterr().out
    assert "50.0" in out
    assert "75.0" in out
    assert "not comparable" not in out
    c = bare("c", evaluation(0.9, eps=0.3))
    assert main(["compare", str(b.path), str(c.path), "--out", str(tmp_path / "plot.png")]) == 0
    assert "the evaluations differ in eps (0.1, 0.3)" in capsys.readouterr().out
    assert main(["report", str(a.path), "--evaluation", first.name]) == 0
    assert "50.0% of 40" in (a.path / "report.html").read_text(encoding="utf-8")
    assert main(["report", str(a.path), "--evaluation", "nope"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- one radius per sample --------------------------------------------------------------------------------------


def test_radii_per_sample_are_in_every_title(bare: Callable[..., Run], tmp_path: Path) -> None:
    text = "one radius per sample, mean 0.1 (0.05 to 0.2)"
    each = evaluation(eps=EACH)
    run, other = bare("a", each), bare("b", evaluation())
    assert text in page([run], tmp_path)
    assert text in str(terminal_table(each).title)
    titles, rows = printed(comparison([run, other]))
    assert [row[titles.index("eps")].text for row in rows] == [text, "0.1"]
    assert all_evaluations([run]).loc[0, "eps"] == text
    assert "one radius per sample" in differing_protocols([run, other])
    small = bare("c", evaluation(eps={"per_sample": True, "min": 0.01, "mean": 0.02, "max": 0.03}))
    assert comparison([small]).loc[0, "largest_eps"] == 0.03  # by which table and figures choose the same unit


def test_the_curve_of_radii_per_sample_has_a_line_in_place_of_a_dot() -> None:
    figure = robustness_curve(evaluation(eps=EACH))
    axes = figure.axes[0]
    lines = {line.get_gid(): line for line in axes.lines}
    assert "verdict" not in lines
    assert "eps" not in lines
    assert list(lines["own-radii"].get_ydata()) == [50.0, 50.0]
    figure.draw_without_rendering()
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert "one radius per sample, mean 0.1 (0.05 to 0.2)" in texts
    assert "within each sample's own radius: 50.0" in texts
