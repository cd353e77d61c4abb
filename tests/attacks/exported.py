"""The attacks that `wideberth.attacks` exports, each with few steps; tables of the tests are completed from them."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from wideberth import attacks
from wideberth.attacks import Attack
from wideberth.checks import InputError, Norm

FEW: dict[str, Any] = {"steps": 3, "queries": 20, "tries": 5, "search_steps": 2}


def exported(*, norm_bounded: bool) -> list[type[Attack]]:
    """The classes that are no base classes, with the radius of a norm ball or without."""
    kinds = (kind for kind in vars(attacks).values() if inspect.isclass(kind) and issubclass(kind, Attack))
    return [kind for kind in kinds if not inspect.isabstract(kind) and kind.norm_bounded is norm_bounded]


def norms_of(kind: type[Attack]) -> tuple[Norm, ...]:
    """The norms that it can be made for."""
    found: list[Norm] = []
    every: tuple[Norm, ...] = ("linf", "l2", "l1")
    for norm in every:
        try:
            kind(norm=norm)
        except InputError:
            continue
        found.append(norm)
    return tuple(found)


def small(kind: type[Attack]) -> Attack:
    """One with few steps, all else by default."""
    known = {field.name for field in fields(kind)}
    return kind(norm=norms_of(kind)[0], **{name: value for name, value in FEW.items() if name in known})
