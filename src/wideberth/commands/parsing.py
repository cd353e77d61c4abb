"""From words to typed arguments: jsonargparse with one-line errors, numbers like 8/255, and recipes by name."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader

from wideberth.checks import InputError
from wideberth.recipes import find_recipe

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


class _Loader(yaml.SafeLoader):
    """YAML in which 8/255 and 1e-3 are numbers."""


def _fraction(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | str:
    text = str(loader.construct_scalar(node))
    above, below = (float(part) for part in text.split("/"))
    return above / below if below else text  # n/0 stays a word, which no number option accepts


_Loader.add_constructor("!fraction", _fraction)
_Loader.add_implicit_resolver("!fraction", re.compile(rf"^{_NUMBER}/{_NUMBER}$"), list("-+.0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(rf"^{_NUMBER}$(?<!^\d)(?<!^\d\d)"), list("-+.0123456789")
)


def load_yaml(text: str) -> Any:
    """Parse YAML in which fractions are numbers."""
    return yaml.load(text, Loader=_Loader)


set_loader("fractions", load_yaml, exceptions=(yaml.YAMLError,))


class Parser(ArgumentParser):
    """An argument parser whose errors are one line that says what, where and what would be right."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"parser_mode": "fractions"} | options))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refuse, in one line (`InputError`)."""
        if not self.exit_on_error:  # an inner parser, which tries one of several types
            super().error(message, ex)
        line = " ".join(message.split())
        raise InputError(line if len(line) <= 400 else line[:397] + "...") from None


def recipe_paths(words: Sequence[str]) -> list[str]:
    """The words, with the name of a shipped recipe after --config replaced by its path."""
    resolved: list[str] = []
    for place, word in enumerate(words):
        if word.startswith("--config="):
            word = f"--config={config_path(word.removeprefix('--config='))}"
        elif place and words[place - 1] == "--config":
            word = str(config_path(word))
        resolved.append(word)
    return resolved


def config_path(name: str) -> Path:
    """A configuration file: a path, or the name of a shipped recipe (`InputError` if neither)."""
    return Path(name) if Path(name).is_file() else find_recipe(name)


def parse(command: str, function: Callable[..., Any], words: Sequence[str], many: str | None = None) -> Namespace:
    """Parse the words of a command whose function takes plain values; `many` names a list of positional words."""
    parser = Parser(prog=f"wideberth {command}", description=(function.__doc__ or "").strip().splitlines()[0])
    if many:
        parser.add_argument(many, nargs="+")
    parser.add_function_arguments(function, skip={many} if many else set(), as_positional=True)
    ready: Namespace = parser.instantiate_classes(parser.parse_args(list(words)))
    return ready


def call(command: str, function: Callable[..., Any], words: Sequence[str], many: str | None = None) -> None:
    """Parse and call."""
    function(**parse(command, function, words, many).as_dict())


def print_to_terminal(*values: Any) -> None:
    """Print results to standard output (tables keep their width when it is piped)."""
    from rich.console import Console

    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140).print(*values)
