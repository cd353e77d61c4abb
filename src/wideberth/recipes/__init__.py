"""Recipes: one YAML per published setting, grouped by data set.

The first comment line says what a recipe is; the lines after it that begin with `reported:` say what was reported for
it, as accuracies in per cent and where they were read ("none known" where none is at hand); the rest of the comment
says what it should be known by, and what differs from the released code. `about` reads all that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from wideberth.checks import InputError

__all__ = ["ROOT", "About", "Reported", "about", "find_recipe", "recipe_names"]

ROOT = Path(__file__).parent

_REPORTED = "# reported: "
_FIGURE = r"(clean|PGD(?:-\d+)?|AutoAttack) (\d+(?:\.\d+)?)"
_LINE = re.compile(rf"({_FIGURE}(?:, {_FIGURE})*) \((.+)\)")


@dataclass(frozen=True)
class Reported:
    """Accuracies of one model, in per cent, and where they were read.

    Attributes:
        clean: on clean inputs; None where not reported, as the others.
        pgd: under PGD, or whatever the authors judged by.
        attack: the name of that: "PGD-20", or "PGD" where the number of steps is not known.
        autoattack: under AutoAttack.
        source: where the figures are from, and at which radius if not the recipe's.
    """

    clean: float | None
    pgd: float | None
    attack: str | None
    autoattack: float | None
    source: str


@dataclass(frozen=True)
class About:
    """What a recipe is.

    Attributes:
        name: such as "cifar10/iaat".
        title: method, paper and setting.
        reported: what was reported for it; empty where no number is at hand.
        comment: the rest of what the file begins with, as one paragraph.
        network: such as "WideResNet-34-10".
        eps: norm and radius as the file has them, such as "linf 8/255"; "none" for standard training.
        epochs: how many.
    """

    name: str
    title: str
    reported: tuple[Reported, ...]
    comment: str
    network: str
    eps: str
    epochs: int


def recipe_names() -> list[str]:
    """The names of all shipped recipes, e.g. "cifar10/iaat"."""
    return sorted(file.relative_to(ROOT).with_suffix("").as_posix() for file in ROOT.rglob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe.

    Raises:
        InputError: for a name that does not exist.
    """
    name, names = name.removesuffix(".yaml"), recipe_names()
    if name not in names:
        near = ", ".join(get_close_matches(name, names, n=3, cutoff=0.5)) or "digits/standard"
        raise InputError(
            f"{name}: no such file, and no recipe of that name but such as {near}; `wideberth recipes` lists all"
        )
    return ROOT / f"{name}.yaml"


def about(name: str) -> About:
    """What a shipped recipe is, and what was reported for it.

    Raises:
        InputError: for a name that does not exist.
    """
    text = find_recipe(name).read_text()
    lines = text.splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    figures = [line.removeprefix(_REPORTED) for line in comment if line.startswith(_REPORTED)]
    rest = [line.removeprefix("#").strip() for line in comment[1:] if not line.startswith(_REPORTED)]
    settings = yaml.load(text, yaml.BaseLoader)  # all words as they stand: 8/255 remains 8/255
    return About(
        name=name.removesuffix(".yaml"),
        title=comment[0].removeprefix("# "),
        reported=tuple(read_reported(line) for line in figures if line != "none known"),
        comment=" ".join(rest),
        network=_network(settings["model"]),
        eps=_eps(settings),
        epochs=int(settings["epochs"]),
    )


def read_reported(line: str) -> Reported:
    """The figures of one line, such as "clean 84.92, PGD-20 56.61, AutoAttack 53.08 (TRADES README)".

    Raises:
        InputError: for a line that is not of this form.
    """
    found = _LINE.fullmatch(line)
    if found is None:
        raise InputError(f"reported: {line}: must be such as `clean 84.92, PGD-20 56.61, AutoAttack 53.08 (SOURCE)`")
    figures = {name: float(value) for name, value in re.findall(_FIGURE, found[1])}
    attack = next((name for name in figures if name.startswith("PGD")), None)
    pgd = None if attack is None else figures[attack]
    return Reported(figures.get("clean"), pgd, attack, figures.get("AutoAttack"), found[found.lastindex or 0])


def _network(model: Mapping[str, Any]) -> str:
    """A network's name, with its size where that is part of the name."""
    kind = model["class_path"].rpartition(".")[2]
    given = model.get("init_args", {})
    if kind in ("Torchvision", "Timm"):
        return f"{kind.lower()}/{given['name']}"
    sizes = [given[size] for size in ("depth", "factor") if size in given] if kind.endswith("WideResNet") else []
    return "-".join([kind, *sizes])


def _eps(settings: Mapping[str, Any]) -> str:
    """Norm and radius: where it stays, or where it starts or ends for each sample."""
    given = settings.get("radius", {}).get("init_args", {})
    radius = given.get("eps", given.get("maximum"))
    if radius is None:
        return "none"
    norm = settings.get("attack", {}).get("init_args", {}).get("norm", "linf")
    return f"{norm} {'to ' if 'maximum' in given else ''}{radius}"
