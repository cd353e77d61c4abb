"""Tables of the concept pages name what is exported; WIDEBERTH_WRITE_TABLES=1 rewrites the one that is generated."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path

import pytest

from wideberth.training.catalogue import exported

DOCS = Path(__file__).resolve().parents[2] / "docs"
GENERATED = re.compile(r"(<!-- regularizers: [^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)


def regularizer_table() -> str:
    """Name and arguments, the docstring's first sentence, and the points at which it is computed."""
    lines = ["| regularizer | | computed at |", "| --- | --- | --- |"]
    for name, kind in exported("regularizers").items():
        arguments = [each for each in inspect.signature(kind).parameters if each != "mode"]
        summary = (kind.__doc__ or "").split("\n\n")[0].strip().replace("\n", " ").replace("||", "‖")
        place = "adversarial points" if kind.where == "adversarial" else "clean inputs"
        lines.append(f"| `{name}({', '.join(arguments)})` | {' '.join(summary.split())} | {place} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_regularizers_is_the_generated_one() -> None:
    page = DOCS / "concepts/regularizer.md"
    text = page.read_text()
    found = GENERATED.search(text)
    assert found is not None
    wanted = f"{found[1]}{regularizer_table()}{found[2]}"
    if os.environ.get("WIDEBERTH_WRITE_TABLES"):
        page.write_text(text.replace(found[0], wanted))
    assert GENERATED.search(page.read_text())[0] == wanted  # type: ignore[index]


@pytest.mark.parametrize("option", ["radius", "objective", "weighting", "regularizers"])
def test_concept_pages_name_what_is_exported(option: str) -> None:
    """The first table of the page, row by row."""
    text = (DOCS / f"concepts/{option.removesuffix('ers')}{'er' if option.endswith('ers') else ''}.md").read_text()
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert table is not None
    rows = re.findall(r"^\| `(\w+)", table[0], re.MULTILINE)
    assert sorted(rows) == list(exported(option))
