"""The comparison: values, printed cells, and names that are never read as markup."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from wideberth.reports import comparison, render
from wideberth.reports.records import duration_text, labels, shortened, size_text, value_text
from wideberth.reports.tables import printed
from wideberth.runs import Run


def _text(runs: list[Run]) -> str:
    with (console := Console(width=200)).capture() as captured:
        console.print(render(comparison(runs)))
    return captured.get()


def test_comparison_values(six: list[Run]) -> None:
    table = comparison(six)
    assert list(table["name"]) == ["standard", "standard + EMR", "PGD-AT", "IAAT", "AT + EMR", "IAAT + EMR"]
    row = table.iloc[2]
    verdict, metrics = six[2].evaluation, six[2].metrics
    assert verdict is not None
    assert metrics is not None
    assert (row["clean_accuracy"], row["robust_accuracy"]) == (0.956, 0.722)
    assert [row["robust_low"], row["robust_high"]] == verdict["robust_interval"]
    assert (row["effective_margin"], row["effective_weight_norm"]) == (0.141, 58.0)
    assert (row["epochs"], row["norm"], row["eps"], row["n"]) == (30, "linf", 0.1, 360)
    assert row["seconds"] == pytest.approx(metrics["seconds"].sum())


def test_medians_fall_back_to_the_evaluated_samples(altered: Callable[..., Run]) -> None:
    run = altered(2, evaluation={"effective_margin": None, "effective_weight_norm": None})
    samples = run.evaluation_samples
    assert samples is not None
    samples.assign(effective_weight_norm=7.0).to_parquet(run.path / "evaluation.parquet")
    row = comparison([run]).iloc[0]
    assert row["effective_margin"] == pytest.approx(samples["effective_margin"].median())
    assert row["effective_weight_norm"] == 7.0


def test_epochs_fall_back_to_the_configuration(altered: Callable[..., Run]) -> None:
    assert comparison([altered(2, drop=("metrics.csv",))]).loc[0, "epochs"] == 30


def test_empty_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    table = comparison([run])
    assert table.loc[0, "name"] == run.name
    assert math.isnan(table.loc[0, "robust_accuracy"])
    assert printed(table)[0] == ["run"]
    assert run.name in _text([run])


def test_best_values_are_marked(six: list[Run]) -> None:
    titles, rows = printed(comparison(six))
    robust = titles.index("robust accuracy, %")
    assert [row[robust].best for row in rows] == [False] * 5 + [True]
    assert rows[5][robust].text == "77.2"
    assert rows[5][robust].interval == "[72.9, 81.5]"


def test_one_run_is_not_called_best(six: list[Run]) -> None:
    assert not any(cell.best for cell in printed(comparison(six[:1]))[1][0])


def test_different_protocols_are_shown_and_do_not_compete(six: list[Run], altered: Callable[..., Run]) -> None:
    titles, rows = printed(comparison([six[2], altered(4, evaluation={"eps": 8 / 255, "norm": "l2"})]))
    assert titles[-2:] == ["norm", "eps"]
    assert [[cell.text for cell in row[-2:]] for row in rows] == [
        ["\N{SCRIPT SMALL L}∞", "0.1"],
        ["\N{SCRIPT SMALL L}2", "8/255"],
    ]
    assert not any(cell.best for row in rows for cell in row)


def test_margins_of_small_radii_are_in_pixel_steps(altered: Callable[..., Run]) -> None:
    titles, rows = printed(comparison([altered(2, evaluation={"eps": 8 / 255, "effective_margin": {"median": 0.04}})]))
    assert rows[0][titles.index("effective margin, 1/255")].text == "10.2"


def test_terminal_table_prints_names_literally(altered: Callable[..., Run]) -> None:
    text = _text([altered(2, config={"name": "[red]a[/red] [/] \x1b[31m"})])
    assert "[red]a[/red] [/]" in text
    assert "\x1b[31m" not in text
    assert "72.2 [67.6, 76.8]" in text


def test_labels_tell_equal_names_apart(six: list[Run], altered: Callable[..., Run]) -> None:
    twins = [altered(2, "a"), altered(2, "b")]
    assert labels(twins) == ["a", "b"]
    nested = [altered(2, "x/run"), altered(2, "y/run")]
    assert labels(nested) == ["x/run", "y/run"]
    assert labels([six[0], six[0]]) == ["standard (1)", "standard (2)"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(8 / 255, "8/255"), (0.031372550874948502, "8/255"), (0.1, "0.1"), (0.2, "0.2"), (0.0, "0"), (0.5, "0.5")],
)
def test_sizes_read_as_in_papers(value: float, text: str) -> None:
    assert size_text(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.26, "4.3 s"), (42, "42 s"), (200, "3 min 20 s"), (18720, "5 h 12 min"), (59.7, "1 min 00 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_components_read_as_calls() -> None:
    margin = {"class_path": "a.b.Margin", "init_args": {"weight": 0.02, "box": [0, 1], "more": {"k": None}}}
    assert (
        value_text([margin, {"class_path": "a.Plain"}])
        == "Margin(weight=0.02, box=[0, 1], more={k=\N{EN DASH}}), Plain"
    )
    assert value_text({"steps": 3, "inner": margin["init_args"]["box"]}) == "steps=3, inner=[0, 1]"


def test_long_names_keep_both_ends() -> None:
    assert shortened("resnet18-cifar10-trades-instance-adaptive-seed-7") == "resnet18-cifar10-tr…ive-seed-7"
