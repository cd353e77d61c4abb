"""The kinds of policy, listed once: the public names, the command line, the documentation and the tests derive from it.

Importing this page costs nothing: it names modules and imports none.

To add a policy of a kind, write its class, and export it from the module of its kind: where each class has a file of
its own, by one import line in the package's `__init__`. A new kind is one row here.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Kind:
    """One kind of policy.

    Attributes:
        option: the option of `wideberth train` and the keyword of `wideberth.train` that takes one.
        room: the public name of the module: `wideberth.ROOM`.
        module: the module that exports the classes.
        base: the name of their base class in that module.
    """

    option: str
    room: str
    module: str
    base: str


KINDS = (
    Kind("model", "models", "wideberth.models", "Module"),
    Kind("data", "data", "wideberth.data", "Data"),
    Kind("attack", "attacks", "wideberth.attacks", "Attack"),
    Kind("augment", "data", "wideberth.data", "Augmentation"),
    Kind("radius", "radii", "wideberth.training.radii", "Radius"),
    Kind("objective", "objectives", "wideberth.training.objectives", "Objective"),
    Kind("weighting", "weightings", "wideberth.training.weightings", "Weighting"),
    Kind("regularizers", "regularizers", "wideberth.training.regularizers", "Regularizer"),
    Kind("perturbation", "perturbation", "wideberth.training.perturbation", "AWP"),
    Kind("averaging", "averaging", "wideberth.training.averaging", "Averaging"),
    Kind("validation_attack", "attacks", "wideberth.attacks", "Attack"),
    Kind("guard", "stopping", "wideberth.training.stopping", "OverfittingGuard"),
)

ROOMS = {kind.room: kind.module for kind in KINDS} | {"schedules": "wideberth.training.schedules"}
"""The module of each public name that holds policies, or what they are made with."""

MODULES = {kind.option: kind.module for kind in KINDS}
"""The module of each option: the command line finds classes there that are named without a path."""


def kind_of(option: str) -> Kind:
    """The kind of an option."""
    return next(kind for kind in KINDS if kind.option == option)


def exported(option: str) -> dict[str, type[Any]]:
    """The classes of a kind that its module exports, by name: public, not abstract, subclasses of the base class."""
    kind = kind_of(option)
    module = import_module(kind.module)
    base = getattr(module, kind.base, None) or import_module("torch.nn").Module
    found = {name: value for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)}
    return {
        name: value
        for name, value in sorted(found.items())
        if not (name.startswith("_") or inspect.isabstract(value)) and value.__module__.startswith("wideberth.")
    }
