"""From words to typed arguments: jsonargparse with one-line errors, numbers like 8/255, and recipes by name."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, invalidate_caches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader

from wideberth.checks import InputError
from wideberth.recipes import find_recipe
from wideberth.schema import upgraded_configuration
from wideberth.training.catalogue import MODULES
from wideberth.yaml_files import NUMBER, dump_yaml, load_yaml

set_loader("fractions", load_yaml, exceptions=(yaml.YAMLError,))


class Parser(ArgumentParser):
    """An argument parser whose errors are one line that says what, where and what would be right.

    Attributes:
        check: called with what a configuration file holds and its path, before anything in it is imported; may refuse.
        files: how many were read.
    """

    check: Callable[[Any, str], None] | None = None
    files = 0

    def __init__(self, *, parser_mode: str = "fractions", allow_abbrev: bool = False, **options: Any) -> None:
        super().__init__(parser_mode=parser_mode, allow_abbrev=allow_abbrev, **options)
        self._reading = ""

    def parse_path(self, path: Any, *args: Any, **options: Any) -> Namespace:
        """Read a configuration file."""
        outer, self._reading = self._reading, str(path)
        try:
            read: Namespace = super().parse_path(path, *args, **options)
            return read
        finally:
            self._reading = outer

    def parse_string(self, *args: Any, **options: Any) -> Namespace:
        """Check the text of a configuration file, and parse it: the same text, whatever the file holds by then."""
        self.files += 1
        text = args[0] if args else options.pop("content")
        where = self._reading or "--config"
        try:
            held = load_yaml(text)
        except yaml.YAMLError:
            held = None  # the parser says what is wrong with it
        if isinstance(held, dict):
            new = upgraded_configuration(held, where)
            if new != held:  # of an older version, or one that says its version
                held, text = new, dump_yaml(new)
        if self.check is not None:
            self.check(held, where)
        parsed: Namespace = super().parse_string(text, *args[1:], **options)
        return parsed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refuse, in one line (`InputError`)."""
        if not self.exit_on_error:  # an inner parser, which tries one of several types
            super().error(message, ex)
        raise InputError(shortened(message)) from None

    def instantiate(self, *args: Any, **kwargs: Any) -> Any:
        """Make the objects; a value that one of them refuses is refused like any other (`InputError`)."""
        try:
            return super().instantiate(*args, **kwargs)
        except InputError:
            raise
        except (ValueError, TypeError) as error:
            raise InputError(shortened(str(error))) from error

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help, without the names of every module that is installed."""
        text: str = super().format_help(*args, **kwargs)
        return re.sub(r",\s+known\s+subclasses:[^)]*", "", text)


_SCAFFOLD = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value|Problem with given|Parser key|Expected a <class 'NoneType'>"
)


def shortened(message: str, limit: int = 300) -> str:
    """A parser's message, which may be a tree of attempts, as one line: the option, the complaints, what was given."""
    lines = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    option = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    rest = [re.sub(r'^Parser key "[^"]+":\s*', "", line) for line in lines]
    complaints = dict.fromkeys(line for line in rest if line and not _SCAFFOLD.match(line))
    given = [line.partition(": ")[2] for line in lines if re.match(r"Given value: (?!NestedArg|Namespace)", line)]
    text = "; ".join(complaints)
    text = re.sub(r"Expected a <class '(\w+)'>", r"expected a \1", text)
    text = text.replace("Expected a dot import path string:", "there is no class")
    text = re.sub(r"Expected a (?:typing\.)?Literal\[(.*?)\]\.", r"accepted are \1.", text)
    first = f"name the class first (--{option} CLASS), then its options"
    text = re.sub(r"Expected an instantiatable class, but [\w.]+ is abstract\.?", first, text)
    got = f", got {given[0]}" if given and given[0] not in text else ""
    line = f"{f'--{option}: ' if option else ''}{text}{got}"
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


_FRACTION = re.compile(rf"^(--[\w.+]+=)?({NUMBER})/({NUMBER})$")
_CLASS = re.compile(r"^(--(\w+)\+?=)(\w+)$")
_PATH = re.compile(r"^[^\W\d]\w*(?:[.:][^\W\d]\w*)+ *(?:\(.*)?$", re.DOTALL)
_FILES = ("--config", "--out", "--title", "--weights", "--architecture", "--eps", "--evaluation")
_CLASS_PATH = re.compile(r"class_path['\"]?\s*:\s*['\"]?([^\W\d]\w*[.:]\w+)")


def prepared(words: Sequence[str]) -> list[str]:
    """The words with what people may write made what the parser reads.

    `--eps 8/255` is a number, `--config digits/iaat` the file of a shipped recipe, and `--model MLP` a class of ours
    (there may be others of that name among all that is installed).
    """
    before = ["", *words][: len(words)]
    options = [f"{word}=" if word.startswith("--") and "=" not in word else "" for word in before]
    return [_prepared(option, word) for option, word in zip(options, words, strict=True)]


def _prepared(option: str, word: str) -> str:
    """One word; `option` is the option it follows as a word of its own, with an equals sign, or empty."""
    whole = f"{option}{word}"
    if not whole.startswith(("--out=", "--title=")) and (fraction := _FRACTION.match(whole)):
        above, below = float(fraction[2]), float(fraction[3])
        return f"{'' if option else fraction[1] or ''}{above / below!r}" if below else word
    if whole.startswith("--config="):
        path = str(config_path(whole.removeprefix("--config=")))
        return path if option else f"--config={path}"
    if (named := _CLASS.match(whole)) and named[2] in MODULES:
        room = MODULES[named[2]]
        path = f"{room}.{named[3]}" if hasattr(import_module(room), named[3]) else named[3]
        return path if option else f"{named[1]}{path}"
    return word


def config_path(name: str) -> Path:
    """A configuration file: a path, or the name of a shipped recipe (`InputError` if neither)."""
    return Path(name) if Path(name).is_file() else find_recipe(name)


def own_modules(words: Sequence[str]) -> None:
    """Let the current directory join `sys.path` (at its end) if the words name a module that is found only there.

    Or if they say `--trust`, since files may then name one. Otherwise it stays out: it may be the folder of a
    stranger's run, whose files libraries would find when they look for what they can do without.
    """
    here = Path.cwd()
    if str(here) in sys.path:
        return
    pairs = zip(["", *words], words, strict=False)
    tops = {name.partition(".")[0].partition(":")[0] for pair in pairs for name in _named(*pair)}
    found = {top for top in tops if (here / top).is_dir() or (here / f"{top}.py").is_file()}
    if trusted(words) or any(top not in sys.modules and not find_spec(top) for top in found):
        sys.path.append(str(here))
        invalidate_caches()


def trusted(words: Sequence[str]) -> bool:
    """Whether the words say that files may name anything."""
    return "--trust" in words or "--trust=true" in words


def _named(before: str, word: str) -> list[str]:
    """The import paths that a word names: as it stands, behind an equals sign, or under class_path in YAML."""
    option, value = word.partition("=")[::2] if word.startswith("--") else (before, word)
    if option in _FILES:
        return []
    return [value] if _PATH.match(value) and not Path(value).exists() else _CLASS_PATH.findall(value)


def parse(command: str, function: Callable[..., Any], words: Sequence[str], many: str | None = None) -> Namespace:
    """Parse the words of a command whose function takes plain values; `many` names a list of positional words."""
    parser = Parser(prog=f"wideberth {command}", description=(function.__doc__ or "").strip().splitlines()[0])
    if many:
        parser.add_argument(many, nargs="+")
    parser.add_function_arguments(function, skip={many} if many else set(), as_positional=True)
    own_modules(words)
    ready: Namespace = parser.instantiate(parser.parse_args(prepared(with_flags(words, function))))
    return ready


def with_flags(words: Sequence[str], function: Callable[..., Any]) -> list[str]:
    """The words, where a yes-or-no option of the function that has no value becomes one: `--radii`, `--radii=true`."""
    annotated = inspect.signature(function).parameters.items()
    flags = {f"--{name}" for name, parameter in annotated if parameter.annotation in (bool, "bool")}
    after = [*words[1:], "--"]
    bare = [
        word in flags and following.lower() not in ("true", "false")
        for word, following in zip(words, after, strict=False)
    ]
    return [f"{word}=true" if flag else word for word, flag in zip(words, bare, strict=True)]


def call(command: str, function: Callable[..., Any], words: Sequence[str], many: str | None = None) -> None:
    """Parse and call."""
    function(**parse(command, function, words, many).as_dict())


def print_to_terminal(*values: Any) -> None:
    """Print results to standard output (tables keep their width when it is piped)."""
    from rich.console import Console

    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140).print(*values)
