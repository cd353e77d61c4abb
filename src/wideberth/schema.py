"""The version of what is written to disk, and how what older versions wrote is read.

Configurations, evaluations and checkpoints say which version wrote them. Version 0.1 of wideberth wrote none, which
counts as 1. A newer one is refused, since nobody knows yet what it means.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from wideberth.checks import InputError

VERSION = 2
"""Of what is written today."""
KEY = "schema_version"
"""The name it is written under."""

RENAMED_OPTIONS = {"judge": "validation_attack"}
"""Entries of config.yaml in version 1, and their names today."""
RENAMED_ARGUMENTS = {"wideberth.attacks.Square": {"ahead": "parallel_queries"}}
"""Arguments of classes in version 1, and their names today."""
MOVED = {
    "wideberth.training.linearity": "wideberth.training.regularizers",
    "wideberth.training.module.sgd": "wideberth.training.policies.sgd",
}
"""Modules and functions of version 1, and where they are today."""

_PATH = re.compile(r"wideberth(\.\w+)+")


class NewerVersion(InputError):
    """A newer version of wideberth wrote what was read; the message is one line."""


def check_version(found: Mapping[str, Any], where: str) -> int:
    """The version that wrote `found`, which was read from `where`.

    Raises:
        NewerVersion: where it is newer than `VERSION`, or no version at all.
    """
    version = found.get(KEY, 1)
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= VERSION:
        raise NewerVersion(
            f"{where}: has schema version {version!r}, and this version of wideberth reads those up to {VERSION}; "
            "read it with a newer one"
        )
    return version


def upgraded_configuration(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A configuration by today's names, whichever version wrote it; without its version.

    Raises:
        NewerVersion: where a newer version wrote it.
    """
    version = check_version(found, where)
    entries = {name: value for name, value in found.items() if name != KEY}
    if version < VERSION:
        entries = {RENAMED_OPTIONS.get(str(name), name): value for name, value in entries.items()}
    return {name: _upgraded(value) for name, value in entries.items()}


def _upgraded(value: Any) -> Any:
    if isinstance(value, str):
        return public_name(value) if _PATH.fullmatch(value) else value
    if isinstance(value, list):
        return [_upgraded(item) for item in value]
    if not isinstance(value, dict):
        return value
    new = {name: _upgraded(item) for name, item in value.items()}
    renamed = RENAMED_ARGUMENTS.get(str(new.get("class_path")), {})
    if renamed and isinstance(new.get("init_args"), dict):
        new["init_args"] = {renamed.get(name, name): item for name, item in new["init_args"].items()}
    return new


def public_name(path: str) -> str:
    """The public import path of something of wideberth, given any that it has or had; unknown ones stay as they are."""
    path = MOVED.get(path, path)
    module, _, name = path.rpartition(".")
    module = MOVED.get(module, module)
    parts = module.split(".")
    for end in range(2, len(parts) + 1):
        package = ".".join(parts[:end])
        try:
            if hasattr(import_module(package), name):
                return f"{package}.{name}"
        except ImportError:
            break
    return f"{module}.{name}"


def public_path(value: Any) -> str:
    """The import path of a class or function: by the outermost package that exports it under its own name."""
    module, name = value.__module__, value.__qualname__
    parts = module.split(".")
    if "." not in name and not any(part.startswith("_") for part in parts):
        for end in range(1, len(parts)):
            package = sys.modules.get(".".join(parts[:end]))
            if inspect.getattr_static(package, name, None) is value:
                return f"{package.__name__}.{name}" if package is not None else f"{module}.{name}"
    return f"{module}.{name}"
