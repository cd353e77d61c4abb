"""Recipes: one YAML per published setting; its first comment line says what it is and what it should reach."""

from __future__ import annotations

from pathlib import Path

from wideberth.checks import InputError

ROOT = Path(__file__).parent


def recipe_names() -> list[str]:
    """The names of all shipped recipes, e.g. "cifar10/iaat"."""
    return sorted(file.relative_to(ROOT).with_suffix("").as_posix() for file in ROOT.rglob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe.

    Raises:
        InputError: for a name that does not exist.
    """
    if name.removesuffix(".yaml") not in recipe_names():
        raise InputError(f"--config {name}: neither a file nor a shipped recipe ({', '.join(recipe_names())})")
    return ROOT / f"{name.removesuffix('.yaml')}.yaml"


def about(name: str) -> str:
    """The comment that a recipe begins with, as one paragraph."""
    lines = []
    for line in find_recipe(name).read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)
