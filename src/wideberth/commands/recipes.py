"""`wideberth recipes`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from wideberth.commands.parsing import call, print_to_terminal
from wideberth.recipes import about, recipe_names


def run() -> None:
    """List the recipes that ship; train one with `wideberth train --config NAME`."""
    view = Table("recipe", "what it is, and what it should reach", show_lines=True)
    for name in recipe_names():
        view.add_row(name, about(name))
    print_to_terminal(view)


def main(words: Sequence[str]) -> None:
    """Parse and list."""
    call("recipes", run, words)
