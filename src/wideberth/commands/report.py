"""`wideberth report`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from wideberth.commands.parsing import call
from wideberth.reports import alike, write_report
from wideberth.runs import Run


def run(runs: list[str], out: str | None = None, title: str | None = None, evaluation: str | None = None) -> None:
    """Write the report of one or several runs as one HTML file that opens offline.

    It lists all evaluations. Its figures are about the newest one; of several runs, about the newest that all have.

    Args:
        runs: run directories.
        out: the file (default: report.html in the run, or beside the first of several).
        title: its heading.
        evaluation: the name of the evaluation that the figures are about.
    """
    found = [Run(path) for path in runs]
    for each in found:
        _ = each.config  # refuses a directory that is no run
    say_what_is_left_out(found)
    found = alike(found, evaluation)
    home = found[0].path if len(found) == 1 else found[0].path.resolve().parent
    print(f"report: {write_report(found, Path(out) if out else home / 'report.html', title=title)}")


def say_what_is_left_out(runs: Sequence[Run]) -> None:
    """Name the damaged records of the runs on standard error, a line each; reports go on without them."""
    for run in runs:
        for line in run.leave_out_damaged():
            print(f"left out: {line}", file=sys.stderr)


def main(words: Sequence[str]) -> None:
    """Parse and report."""
    call("report", run, words, many="runs")
