"""`wideberth compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wideberth.checks import InputError
from wideberth.commands.parsing import call, print_to_terminal
from wideberth.commands.report import say_what_is_left_out
from wideberth.reports import alike, comparison, differing_protocols, render, trade_off
from wideberth.runs import Run, write_atomically


def run(runs: list[str], out: str | None = None, evaluation: str | None = None) -> None:
    """Compare evaluated runs: one table, one plot of clean against robust accuracy.

    Of runs with several evaluations, those are compared that have the same norm, eps and suite in every run.

    Args:
        runs: run directories.
        out: the plot's file, .png, .svg or .pdf (default: trade_off.png beside the first run).
        evaluation: the name of the evaluation to compare (default: the newest that all runs have).
    """
    found = [Run(path) for path in runs]
    for each in found:
        _ = each.config  # refuses a directory that is no run
        if each.evaluation is None:
            raise InputError(f"run {str(each.path)!r}: not evaluated yet; run `wideberth evaluate {each.path}` first")
    say_what_is_left_out(found)
    found = alike(found, evaluation)
    print_to_terminal(render(comparison(found)))
    if differing := differing_protocols(found):
        print(differing)
    target = Path(out) if out is not None else found[0].path.resolve().parent / "trade_off.png"
    figure = trade_off(found)
    write_atomically(target, lambda file: figure.savefig(file, dpi=160))
    print(f"saved: {target}")


def main(words: Sequence[str]) -> None:
    """Parse and compare."""
    call("compare", run, words, many="runs")
