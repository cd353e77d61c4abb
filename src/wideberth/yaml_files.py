"""YAML in which 8/255 and 1e-3 are numbers, read and written."""

from __future__ import annotations

import re
from typing import Any

import yaml

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
"""The pattern of a number that people write; two of them with a slash between are a fraction."""


class _Loader(yaml.SafeLoader):
    """Reads fractions and numbers without a point as floats."""


class _Dumper(yaml.SafeDumper):
    """Puts words in quotes that `_Loader` would take for numbers."""


def _fraction(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | str:
    text = str(loader.construct_scalar(node))
    above, below = (float(part) for part in text.split("/"))
    return above / below if below else text  # n/0 stays a word, which no number option accepts


_Loader.add_constructor("!fraction", _fraction)
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("!fraction", re.compile(rf"^{NUMBER}/{NUMBER}$"), list("-+.0123456789"))
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(rf"^{NUMBER}$(?<!^\d)(?<!^\d\d)"), list("-+.0123456789")
    )


def load_yaml(text: str) -> Any:
    """Parse YAML in which fractions are numbers."""
    return yaml.load(text, Loader=_Loader)


def dump_yaml(value: Any) -> str:
    """YAML that `load_yaml` reads as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
