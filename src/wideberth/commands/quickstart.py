"""`wideberth quickstart`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from wideberth.commands.evaluate import subject
from wideberth.commands.parsing import call, print_to_terminal
from wideberth.commands.train import train_from
from wideberth.evaluation import evaluate
from wideberth.reports import comparison, render, write_report
from wideberth.runs import Run

RECIPES = {
    "standard": "standard",
    "standard + EMR": "standard-emr",
    "PGD-AT": "pgd-at",
    "IAAT": "iaat",
    "AT + EMR": "at-emr",
    "IAAT + EMR": "iaat-emr",
}
EPS = 0.15


def run(out: str = "runs/quickstart", epochs: int | None = None, overwrite: bool = True) -> None:
    """Train six ways on the built-in digits, evaluate each, and write one table and one report.html.

    Args:
        out: where the six run directories and report.html go.
        epochs: instead of the recipes' own number.
        overwrite: replace the runs of an earlier quickstart; false: keep those that are finished.
    """
    console, runs = Console(stderr=True), []
    for place, (name, recipe) in enumerate(RECIPES.items()):
        folder = Path(out) / name
        if folder.is_dir() and Run(folder).finished and not overwrite:
            runs.append(Run(folder))
            continue
        console.print(f"[bold]{place + 1}/{len(RECIPES)} {name}[/bold]: training (recipe digits/{recipe})")
        words = ["--config", f"digits/{recipe}", "--out", str(folder), "--overwrite"]
        shorter = [f"--epochs={epochs}", f"--scheduler.init_args.T_max={epochs}"] if epochs else []
        trained = train_from([*words, *shorter])
        model, data = subject(str(folder), None, None, None)
        console.print(f"{place + 1}/{len(RECIPES)} {name}: evaluating at linf {EPS}")
        found = evaluate(model, data, norm="linf", eps=EPS, examined=False, progress=console.is_terminal)
        found.save(folder)
        runs.append(trained)
    print_to_terminal(render(comparison(runs)))
    print(f"report: {write_report(runs, Path(out) / 'report.html', title='wideberth quickstart: handwritten digits')}")


def main(words: Sequence[str]) -> None:
    """Parse and run."""
    call("quickstart", run, words)
