"""What a file may name without being trusted: checked before anything is imported, let alone called.

A configuration names classes and functions by import path, and building it calls them. What a person types may be
anything. What a file holds (the config.yaml of a run, a configuration, an architecture) may come from a stranger, so it
may name only what is defined in `PACKAGES` and is of the kind that its place asks for, at any depth: a class of models
for a model, a function of `FUNCTIONS` for a loss. The kind is read off the type hints of the constructors; where these
do not say what belongs there, no class may be named at all.
"""

from __future__ import annotations

import collections.abc
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from pathlib import PurePath
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from wideberth.checks import InputError, one_line
from wideberth.configuration import parse_call

PACKAGES = (
    "wideberth",
    "torch.nn",
    "torch.optim",
    "torchvision.models",
    "torchvision.ops",
    "timm.layers",
    "timm.models",
    "timm.optim",
)
"""Both the import path of a class and the module that defines it must lie in one of these."""
FUNCTIONS = ("wideberth.losses", "torch.nn.functional")
"""Modules whose functions may be named where something is to be called: they compute and do nothing else."""
FACTORIES = ("wideberth.training.policies.sgd",)
"""Functions of other modules that may be named there too."""
LARGEST = 100_000
"""How many values a configuration may have, those behind YAML's aliases counted each time."""
HOW = "if you trust who wrote it, --trust (in Python trust=True) lets it run"

_PLAIN = (str, bytes, int, float, complex, PurePath, Enum)


class NotTrusted(InputError):
    """A file names what it may name only if it is trusted; the message says what, where, and how to trust it."""


@dataclass(frozen=True)
class Place:
    """What may stand at a place of a configuration, by its type hint.

    Attributes:
        kinds: classes; an object of one of them is wanted, or (as for an optimizer or a head) what makes one.
        callables: whether something to be called is wanted.
        plain: whether words and numbers are.
        items: type hints of what a list or a mapping there holds.
        unknown: whether the hint does not say; then nothing but `FUNCTIONS` may be named.
    """

    kinds: tuple[type, ...] = ()
    callables: bool = False
    plain: bool = False
    items: tuple[Any, ...] = ()
    unknown: bool = False

    def __or__(self, other: Place) -> Place:
        return Place(
            (*self.kinds, *other.kinds),
            self.callables or other.callables,
            self.plain or other.plain,
            (*self.items, *other.items),
            self.unknown or other.unknown,
        )

    @property
    def names(self) -> bool:
        """Whether a word may be taken for a name here."""
        return bool(self.kinds or self.callables or self.unknown)

    @property
    def inner(self) -> Place:
        """What its items may be."""
        return reduce(Place.__or__, map(place, self.items)) if self.items else UNKNOWN


UNKNOWN = Place(unknown=True)


def place(hint: Any) -> Place:
    """What a type hint allows."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return reduce(Place.__or__, map(place, inner))
    if origin is Annotated:
        return place(inner[0])
    if origin is Literal:
        return Place(plain=True)
    if hint in (None, type(None)):
        return Place()
    kind = origin or hint
    if kind is Callable:
        return Place(place(inner[-1]).kinds if inner else (), callables=True)
    if kind is type and inner:
        return Place(place(inner[0]).kinds)
    if not isinstance(kind, type) or kind in (type, object, Any):
        return UNKNOWN
    if issubclass(kind, _PLAIN):
        return Place(plain=True)
    if kind.__module__ in ("builtins", "collections", "collections.abc") and issubclass(kind, Iterable):
        held = inner[-1:] if issubclass(kind, Mapping) else tuple(item for item in inner if item is not ...)
        return Place(items=held or (Any,))
    return Place((kind,))


def arguments(made: type) -> dict[str, Any]:
    """The type hints of what a class is constructed from, by name; those that cannot be told are left out."""
    hints: dict[str, Any] = {}
    for each in made.__mro__:
        if "__init__" not in vars(each):
            continue
        function = inspect.unwrap(each.__init__)  # type: ignore[misc]
        if "__dataclass_fields__" in vars(each):
            # The constructor that `dataclass` writes has hints in the words of modules that need not know them.
            with suppress(Exception):  # whatever evaluating them raises
                hints = get_type_hints(each) | hints
        hints = _told(function) | hints
        passes_on = getattr(function, "__code__", None) and function.__code__.co_flags & inspect.CO_VARKEYWORDS
        if not passes_on:  # what the classes above take does not come from outside
            break
    return hints


def _told(function: Any) -> dict[str, Any]:
    """The type hints of a function that can be told."""
    # What modules import only for type checkers is mostly from here.
    known = vars(collections.abc) | getattr(function, "__globals__", {})
    told: dict[str, Any] = {}
    for name, hint in getattr(function, "__annotations__", {}).items():
        with suppress(Exception):  # whatever evaluating it raises
            told |= get_type_hints(type("_", (), {"__annotations__": {name: hint}}), known)
    told.pop("return", None)
    return told


def check(value: Any, hint: Any, where: str, name: str = "") -> None:
    """Refuse what a file holds if it names what it may not.

    Args:
        value: numbers, words, lists and mappings; {"class_path": import path, "init_args": {...}} is an object.
        hint: the type of what it configures.
        where: the file, for the message.
        name: the entry of the file, for the message.

    Raises:
        NotTrusted: for the first such name. Nothing of it was imported.
        InputError: something is named in `PACKAGES` that is not there; more than `LARGEST` values.
    """
    _checked(lambda checker: checker.value(value, place(hint), name), where)


def check_configuration(value: Any, hints: Mapping[str, Any], where: str) -> None:
    """Refuse a whole file of entries, whose type hints these are, as `check` does."""
    _checked(lambda checker: checker.entries(value, hints, "") if isinstance(value, Mapping) else None, where)


def _checked(run: Callable[[_Check], None], where: str) -> None:
    try:
        run(_Check(where))
    except RecursionError:
        raise InputError(f"{where}: is nested too deeply for a configuration") from None


class _Check:
    """One file on its way through."""

    def __init__(self, where: str) -> None:
        self.where, self.seen = where, 0

    def value(self, value: Any, there: Place, name: str) -> None:
        """Check one value, whatever it is."""
        self.seen += 1
        if self.seen > LARGEST:
            raise InputError(f"{self.where}: holds more than {LARGEST} values, too many for a configuration")
        if isinstance(value, list | tuple | set):
            for position, item in enumerate(value):
                self.value(item, there.inner, f"{name}[{position}]")
            return
        one = there | there.inner if there.items else there  # one of a list need not be in a list
        if isinstance(value, Mapping) and "class_path" in value:
            self.built(value, one, name)
        elif isinstance(value, Mapping):
            only_items = there.items and not there.names
            self.entries(value, {}, name, there.inner if only_items else UNKNOWN)
        elif isinstance(value, str):
            self.word(value, one, name)

    def entries(self, given: Mapping[Any, Any], hints: Mapping[str, Any], name: str, other: Place = UNKNOWN) -> None:
        """Check the values of a mapping, each by its own type hint; those without one by `other`."""
        for key, value in given.items():
            plain = str(key).removesuffix("+")  # "a+" is for one more of a list
            shown = plain if plain.isidentifier() else repr(plain)
            inside = f"{name}.{shown}" if name else shown
            if "." in plain or plain.startswith("__"):  # which a parser takes for nested entries, and for its own
                raise NotTrusted(f"{self.where}: {inside}: is no key that can be checked, nest it instead; {HOW}")
            self.value(value, place(hints[plain]) if plain in hints else other, inside)

    def built(self, value: Mapping[Any, Any], there: Place, name: str) -> None:
        """Check an object and what it is to be made from."""
        path = value["class_path"]
        found = self.named(path, there, name) if isinstance(path, str) else []
        if not all(isinstance(each, type) for each in found):
            self.refuse(path, name)
        for part, given in value.items():
            if part in ("init_args", "dict_kwargs") and isinstance(given, Mapping):
                for hints in [arguments(each) for each in found] or [{}]:
                    self.entries(given, hints, f"{name}.{part}")
            elif part != "class_path":
                self.entries({part: given}, {}, name)

    def word(self, text: str, there: Place, name: str) -> None:
        """Check a word, which may be a name with arguments, or YAML that a parser takes for what that says."""
        try:
            inside = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            inside = text
        if isinstance(inside, list | Mapping):
            self.value(inside, there, name)
            return
        if not there.names or inside is None or isinstance(inside, int | float):
            return
        try:
            path, args, kwargs = parse_call(text)
        except InputError:
            # Where only a class will do, a parser may take it for a file to read.
            if not (there.plain or there.unknown):
                self.refuse(text, name)
            return
        found = self.named(path, there, name)
        self.value(args, UNKNOWN, name)
        for hints in [arguments(each) for each in found if isinstance(each, type)] or [{}]:
            self.entries(kwargs, hints, name)

    def named(self, path: str, there: Place, name: str) -> list[Any]:
        """What a name leads to, if it may stand there; nothing if it leads nowhere."""
        if "." in path or ":" in path:
            found = [self.imported(path, name)] if _is_allowed(path) else []
            known = True
        else:  # a class of this name among those that are imported
            candidates = [kind for kind in _subclasses(there.kinds) if kind.__name__ == path]
            found, known = [kind for kind in candidates if _is_ours(kind)], bool(candidates)
        found = [each for each in found if _is_ours(each) and _fits(each, there)]
        if known and not found:
            self.refuse(path, name)
        for each in found:
            if reason := getattr(each, "needs_trust", None):
                raise NotTrusted(f"{self.where}: {name} names {path!r}: {reason}; {HOW}")
        return found

    def imported(self, path: str, name: str) -> Any:
        """The object at a path in `PACKAGES`, which is never looked for in the current directory."""
        parts = path.replace(":", ".", 1).split(".")
        for cut in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:cut])
            try:
                found: Any = importlib.import_module(module)
                for part in parts[cut:]:
                    found = getattr(found, part)
                return found
            except AttributeError as error:
                raise InputError(f"{self.where}: {name}: {path!r}: there is no {part!r} in {module}") from error
            except Exception as error:  # importing what is installed may fail in any way
                if cut == 1 or not isinstance(error, ModuleNotFoundError):
                    raise InputError(f"{self.where}: {name}: {path!r} cannot be imported: {one_line(error)}") from error
        raise AssertionError(path)

    def refuse(self, given: object, name: str) -> NoReturn:
        """Say what was named, and where."""
        shown = repr(given) if len(repr(given)) <= 80 else f"{repr(given)[:77]}..."
        raise NotTrusted(
            f"{self.where}: {name} names {shown}, which is nothing of wideberth, torch, torchvision or timm that "
            f"belongs there; {HOW}"
        )


def _is_allowed(path: str) -> bool:
    """Whether a path, before anything is imported, lies in `PACKAGES` and names nothing private."""
    dotted = path.replace(":", ".", 1)
    return _within(dotted) and not any(part.startswith("_") for part in dotted.split("."))


def _within(path: str) -> bool:
    return any(path.startswith(f"{package}.") for package in PACKAGES)


def _is_ours(found: Any) -> bool:
    """Whether a class or function is defined in `PACKAGES`, under its own name; what these import is not."""
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        return False
    module = sys.modules.get(found.__module__)
    try:
        return _within(f"{found.__module__}.") and reduce(getattr, found.__qualname__.split("."), module) is found
    except AttributeError:  # defined within a function, or renamed
        return False


def _fits(found: Any, there: Place) -> bool:
    """Whether a class or function of ours is of the kind that a place asks for."""
    if not isinstance(found, type):
        single = f"{found.__module__}.{found.__qualname__}" in FACTORIES
        return (there.callables or there.unknown) and (single or found.__module__ in FUNCTIONS)
    if there.callables and any("__call__" in vars(each) for each in found.__mro__):
        return True
    with suppress(TypeError):  # protocols cannot be asked
        return issubclass(found, there.kinds)
    return False


def _subclasses(kinds: Collection[type]) -> Iterator[type]:
    """These classes and all that derive from them, as far as they are imported."""
    seen: set[type] = set()
    left = list(kinds)
    while left:
        kind = left.pop()
        if kind not in seen:
            seen.add(kind)
            left.extend(type.__subclasses__(kind))
            yield kind
