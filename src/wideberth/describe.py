"""Objects as configuration: {class_path, init_args}, so that config.yaml of a run says what it was made of."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any


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
        return f"{value.__module__}.{value.__qualname__}"
    kind = type(value)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": _arguments(value)}


def _arguments(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.init]
    else:
        names = [name for name in inspect.signature(type(value).__init__).parameters if name != "self"]
    kept = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return {name: describe(item) for name, item in kept.items() if _plain(item)}


def _plain(item: Any) -> bool:
    """Tensors and sub-networks are content, not configuration."""
    from torch import Tensor, nn

    return not isinstance(item, Tensor | nn.ModuleList | nn.Sequential)
