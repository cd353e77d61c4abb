"""`wideberth recipes`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from wideberth.commands.parsing import call, print_to_terminal
from wideberth.recipes import About, about, find_recipe, recipe_names

_WIDE = 100
"""Columns of a terminal that the figures need to stand in columns."""
_COLUMNS = (("network", 20), ("eps", 14), ("epochs", 6), ("clean", 5), ("PGD", 5), ("steps", 5), ("AA", 5))
"""Their names and widths; the source has the rest."""
_INDENT = (0, 0, 0, 4)


class Listing:
    """Recipes and what was reported for them: figures in columns, or in words where there is no room for columns."""

    def __init__(self, recipes: Sequence[About]) -> None:
        self.recipes = recipes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """A line of headings, then each recipe."""
        columns = options.max_width >= _WIDE
        if columns:
            headings = _grid()
            headings.add_row(*(name for name, _ in _COLUMNS), "reported by", style="underline")
            yield Padding(headings, _INDENT)
        for recipe in self.recipes:
            yield Text.assemble((f"{recipe.name}  ", "bold"), recipe.title)
            yield in_columns(recipe) if columns else in_words(recipe)


def in_columns(recipe: About) -> RenderableType:
    """One row, and one more for each further source of figures."""
    grid = _grid()
    what = [recipe.network, recipe.eps, str(recipe.epochs)]
    for reported in recipe.reported:
        steps = (reported.attack or "").removeprefix("PGD").removeprefix("-")
        clean, pgd, autoattack = (_figure(value) for value in (reported.clean, reported.pgd, reported.autoattack))
        grid.add_row(*what, clean, pgd, steps, autoattack, reported.source)
        what = [""] * len(what)
    if not recipe.reported:
        grid.add_row(*what, "-", "-", "", "-", "none known")
    return Padding(grid, _INDENT)


def in_words(recipe: About) -> RenderableType:
    """The same, one line of text for each source."""
    lines = [f"{recipe.network}, eps {recipe.eps}, epochs {recipe.epochs}"]
    for reported in recipe.reported:
        pairs = ("clean", reported.clean), (reported.attack, reported.pgd), ("AutoAttack", reported.autoattack)
        lines.append(", ".join(f"{name} {value:g}" for name, value in pairs if value is not None))
        lines[-1] += f" ({reported.source})"
    if not recipe.reported:
        lines.append("no number known")
    return Padding(Text("\n".join(lines)), _INDENT)


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for name, width in _COLUMNS:
        grid.add_column(width=width, justify="left" if name in ("network", "eps") else "right")
    grid.add_column(ratio=1)
    return grid


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def run() -> None:
    """List the recipes that ship; with a NAME, print that one. Train one with `wideberth train --config NAME`."""
    recipes = [about(name) for name in recipe_names()]
    for _, group in groupby(recipes, key=lambda recipe: recipe.name.partition("/")[0]):
        print_to_terminal(Listing(list(group)))
        print()
    print("`wideberth recipes NAME` prints one, `wideberth train --config NAME` trains it. Accuracies are in per cent.")


def main(words: Sequence[str]) -> None:
    """Parse; list all, or print one."""
    if len(words) == 1 and not words[0].startswith("-"):
        print(find_recipe(words[0]).read_text(), end="")
        return
    call("recipes", run, words)
