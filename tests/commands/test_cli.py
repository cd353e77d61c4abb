"""The command line as a person meets it."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pandas as pd
import pytest
import yaml

from wideberth import cli, memory
from wideberth.commands.parsing import own_modules, prepared, shortened
from wideberth.recipes import recipe_names
from wideberth.runs import Run
from wideberth.yaml_files import dump_yaml, load_yaml


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; from wideberth.cli import main; main(['--help'])\n"
        "heavy = {'torch', 'lightning', 'jsonargparse', 'matplotlib', 'pandas', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in cli.COMMANDS)


@pytest.mark.filterwarnings("ignore:'wideberth.cli' found in sys.modules")
@pytest.mark.parametrize("way", ["script", "module"])
def test_the_program_keeps_its_memory_and_the_function_leaves_it_alone(
    way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(memory, "keep", lambda: kept.append(True))
    monkeypatch.setattr(sys, "argv", ["wideberth", "--version"])
    assert cli.main(["--version"]) == 0
    assert not kept
    if way == "script":
        (script,) = entry_points(group="console_scripts", name="wideberth")
        assert script.load()() == 0
    else:
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module("wideberth.cli", run_name="__main__")
        assert stopped.value.code == 0
    assert kept == [True]
    assert capsys.readouterr().out.count("wideberth ") == 2


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"wideberth {command}" in text
    assert len(text.splitlines()) < 200, "nobody reads that much"


def test_fractions_are_numbers_and_division_by_zero_is_not() -> None:
    assert load_yaml("[8/255, 1e-3, 3, .5, a/b, 8/0]") == [8 / 255, 1e-3, 3, 0.5, "a/b", "8/0"]
    assert float(prepared(["--eps", "8/255"])[1]) == 8 / 255
    assert prepared(["--eps=8/0", "timm/resnet18"]) == ["--eps=8/0", "timm/resnet18"]


def test_bare_names_are_classes_of_ours() -> None:
    words = prepared(["--model", "MLP", "--radius=Fixed", "--objective=mine.Own", "--optimizer", "Adam"])
    assert words == [
        "--model",
        "wideberth.models.MLP",
        "--radius=wideberth.training.radii.Fixed",
        "--objective=mine.Own",
        "--optimizer",
        "Adam",
    ]


def test_recipes_are_listed_with_what_they_say(wideberth) -> None:
    code, out, _ = wideberth("recipes")
    assert code == 0
    assert all(name in out for name in recipe_names())
    assert "3 / 128" not in out.split("digits/")[0] or "AutoAttack" in out


def test_a_run_holds_its_records(digits_run: Path) -> None:
    run = Run(digits_run)
    assert run.finished
    assert run.config["radius"]["init_args"]["warmup"] == 0
    assert len(run.metrics) == 2
    assert {"radius_mean", "effective_margin", "effective_weight_norm"} <= set(run.metrics.columns)
    assert run.samples["radius"].between(0, 1).all()
    assert len(run.samples) == run.radii[run.radii.epoch == 1]["count"].sum()


def test_evaluate_margins_compare_and_report_follow_from_a_run(digits_run: Path, wideberth) -> None:
    code, out, _ = wideberth("evaluate", digits_run, "--eps", "8/255", "--rows", 60, "--progress=false")
    assert (code, "robust" in out) == (0, True)
    (folder,) = (digits_run / "evaluations").iterdir()
    verdict = json.loads((folder / "evaluation.json").read_text())
    assert verdict["eps"] == 8 / 255
    assert verdict["n"] == len(pd.read_parquet(folder / "evaluation.parquet")) == 60
    code, out, _ = wideberth("margins", digits_run, "--norm", "linf", "--rows", 40, "--out", "m.csv")
    assert code == 0
    assert len(pd.read_csv("m.csv")) == 40
    code, out, _ = wideberth("compare", digits_run, "--out", "plot.png")
    assert (code, Path("plot.png").stat().st_size > 1000) == (0, True)
    code, out, _ = wideberth("report", digits_run, "--out", "report.html")
    assert (code, "<html" in Path("report.html").read_text()) == (0, True)


def test_a_recorded_configuration_trains_the_same_run_again(digits_run: Path, wideberth) -> None:
    code, _, err = wideberth("train", "--config", digits_run / "config.yaml", "--out", "again", "--progress=false")
    assert code == 0, err
    first, again = Run(digits_run), Run("again")
    same = first.metrics.drop(columns="seconds")
    pd.testing.assert_frame_equal(same, again.metrics.drop(columns="seconds"))
    pd.testing.assert_frame_equal(first.samples, again.samples)
    recorded = {name: value for name, value in again.config.items() if name != "out"}
    assert recorded == {name: value for name, value in first.config.items() if name != "out"}


def test_classes_of_the_users_own_may_live_in_the_current_directory(wideberth, monkeypatch) -> None:
    Path("mine_own.py").write_text(
        "from wideberth.training.objectives import AdversarialCrossEntropy\n\n\nclass Own(AdversarialCrossEntropy):\n"
        '    """The same under another name."""\n'
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ["train", "--config", "digits/standard", "--objective", "mine_own.Own", "--epochs=1", "--progress=false"]
    code, _, err = wideberth(*words, "--out", "own")
    assert code == 0, err
    assert yaml.safe_load(Path("own/config.yaml").read_text())["objective"]["class_path"] == "mine_own.Own"


@pytest.mark.parametrize(
    ("words", "searched"),
    [
        (["--objective", "mine.Own"], True),
        (["--objective=mine.Own"], True),
        (["--regularizers+=mine.sub.Own"], True),
        (["--attack.loss", "mine.loss"], True),
        (["mine:net(8)"], True),
        (["--model", "{class_path: 'mine.Net', init_args: {width: 3}}"], True),
        (["--model", '{"class_path": "mine.Net"}'], True),
        (["run", "--trust"], True),
        ([], False),
        (["run"], False),
        (["mine.yaml"], False),
        (["--objective", "torch.Own", "--radius", "Fixed", "--data", "yaml.Own"], False),
        (["--out", "mine.csv"], False),
        (["--config=mine.csv"], False),
        (["--eps", "8/255", "--rows", "8"], False),
    ],
)
def test_the_current_directory_is_searched_for_modules_that_words_name(
    words: list[str], searched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("mine.py", "mine.yaml", "torch.py", "yaml.py"):
        Path(name).touch()
    Path("run").mkdir()
    own_modules(words)
    assert (str(tmp_path) in sys.path) == searched


def test_quickstart_ends_in_a_table_and_a_report(wideberth) -> None:
    code, out, err = wideberth("quickstart", "--out", "quick", "--epochs", 1)
    assert code == 0, err
    assert "IAAT + EMR" in out
    assert "<html" in Path("quick/report.html").read_text()


def test_yaml_that_is_written_reads_back_as_it_was() -> None:
    value = {"out": "2024/05", "name": "1e-3", "eps": 8 / 255, "lr": 1e-8, "word": "12.", "list": [1, "2", None, True]}
    assert load_yaml(dump_yaml(value)) == value


def test_a_parsers_scaffold_is_left_out_of_its_message() -> None:
    message = "Parser key \"attack\":\n  Problem with given class_path 'a.B':\n    expected a float"
    assert "Problem with given" not in shortened(message)
