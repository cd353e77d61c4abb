"""Objects and their configuration: named by import path, built from arguments, described as {class_path, init_args}."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from wideberth.checks import InputError, one_line
from wideberth.schema import public_path


def parse_call(text: str) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Split "package.module:factory(8, depth=2)" into the path, the positional and the keyword arguments.

    Arguments are Python literals and nothing is evaluated; without brackets there are none.

    Raises:
        InputError: when the text is not a path, or the arguments are not literals.
    """
    path, bracket, rest = text.strip().partition("(")
    parts = path.strip().replace(":", ".", 1).split(".")
    if not all(part.isidentifier() for part in parts):
        raise InputError(f"{text!r}: must be an import path such as package.module:factory(width=8)")
    if not bracket:
        return path.strip(), (), {}
    try:
        tree = ast.parse(f"_({rest}", mode="eval").body
        # One call of the path itself: "f(1)(2)" and "f(1) + g(2)" parse too.
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
            raise ValueError("more than one call")
        args = tuple(ast.literal_eval(argument) for argument in tree.args)
        names = [keyword.arg or "**" for keyword in tree.keywords]
        if "**" in names or len(set(names)) < len(names):
            raise ValueError("each argument once, by its name")
        kwargs = {n: ast.literal_eval(k.value) for n, k in zip(names, tree.keywords, strict=True)}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(
            f"{text!r}: arguments must be Python literals such as (width=8, shape=(3, 32, 32), name='a')"
        ) from error
    return path.strip(), args, kwargs


def import_object(path: str) -> Any:
    """The object at "package.module:object" or "package.module.object".

    A module that is not installed is looked for in the current directory, which then joins the end of `sys.path`, so
    that installed packages are never shadowed.

    Raises:
        InputError: when the module cannot be imported or has no such object.
    """
    module_name, _, attributes = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not attributes:
        raise InputError(f"{path!r}: must be an import path such as package.module:factory")
    found: Any = _import_module(module_name)
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            where = getattr(found, "__file__", None) or module_name
            raise InputError(f"{path!r}: there is no {attribute!r} in {where}")
        found = getattr(found, attribute)
    return found


def construct(factory: Callable[..., Any], path: str, /, *args: Any, **kwargs: Any) -> Any:
    """What `factory` returns for these arguments, with its refusals as one line.

    Raises:
        InputError: when the arguments do not fit the signature, or the factory refuses their values.
    """
    if not callable(factory):
        raise InputError(f"{path}: is a {type(factory).__name__}, must be a class or a function")
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some compiled callables have no signature to check against
        signature = None
    if signature is not None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            accepted = ", ".join(map(str, signature.parameters.values())) or "no arguments"
            raise InputError(f"{path}: {error}; accepted are {accepted}") from error
    try:
        return factory(*args, **kwargs)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be built: {one_line(error)}") from error


def _import_module(name: str) -> Any:
    try:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            here = str(Path.cwd())
            # Only the module asked for, or a package above it: what it imports itself is its own affair.
            if not f"{name}.".startswith(f"{error.name}.") or here in sys.path:
                raise
            sys.path.append(here)
            importlib.invalidate_caches()
            return importlib.import_module(name)
    except Exception as error:  # user code may raise anything while being imported
        raise InputError(f"{name!r}: cannot be imported: {one_line(error)}") from error


class Described:
    """Keeps the arguments it was made with, so that `describe` can name them all; mixed into models and data sets."""

    given_args: tuple[Any, ...]
    given_kwargs: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make the object, and remember."""
        made = super().__new__(cls)
        object.__setattr__(made, "given_args", args)
        object.__setattr__(made, "given_kwargs", kwargs)
        return made


def describe(value: Any) -> Any:
    """A plain value (numbers, strings, lists, dicts) that says what `value` is.

    Objects become {class_path, init_args}, where an argument's value is read from the attribute of the same name;
    arguments that an object does not keep are left out. Functions become their import path.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [describe(item) for item in value]
    if inspect.isfunction(value) or inspect.isclass(value) or inspect.isbuiltin(value):
        return public_path(value)
    if isinstance(value, functools.partial):
        return {"class_path": describe(value.func), "init_args": describe(value.keywords)}
    return {"class_path": public_path(type(value)), "init_args": _arguments(value)}


def _arguments(value: Any) -> dict[str, Any]:
    if isinstance(value, Described):
        given = inspect.signature(type(value).__init__).bind(value, *value.given_args, **value.given_kwargs)
        given.apply_defaults()
        kinds = given.signature.parameters
        kept: dict[str, Any] = {}
        for name, item in list(given.arguments.items())[1:]:
            kept |= item if kinds[name].kind is inspect.Parameter.VAR_KEYWORD else {name: item}
    else:
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value) if field.init]
        else:
            names = [name for name in inspect.signature(type(value).__init__).parameters if name != "self"]
        kept = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return {name: describe(item) for name, item in kept.items() if _is_configuration(item)}


def _is_configuration(item: Any) -> bool:
    """Arrays, networks and bound methods are content, not configuration; classes of networks are not content."""
    return inspect.isclass(item) or not (
        inspect.ismethod(item) or hasattr(item, "__array__") or hasattr(item, "state_dict")
    )
