"""The documentation is true: its code runs, its commands and configurations parse, its links lead somewhere."""

from __future__ import annotations

import inspect
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

import wideberth as wb
from wideberth import memory
from wideberth.commands import parsing, train
from wideberth.recipes import find_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
PAGE_NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
MODULE = re.compile(r"# (\w+)\.py\n")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language in a page, in order."""
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def modules(page: Path) -> dict[str, str]:
    """The source of the modules that a page tells the reader to write: blocks that begin with `# NAME.py`."""
    found: dict[str, str] = {}
    for code in blocks(page, "python"):
        if named := MODULE.match(code):
            found[named[1]] = found.get(named[1], "") + code
    return found


def pages_with(language: str) -> list[Any]:
    """The pages that have code of a language, as parameters of a test."""
    return [pytest.param(page, id=name) for page, name in zip(PAGES, PAGE_NAMES, strict=True) if blocks(page, language)]


def tiny(code: str) -> str:
    """The code with few epochs and few rows."""
    code = re.sub(r"epochs=\d+", "epochs=1", code)
    return re.sub(r"Digits\(\)", "Digits(train_rows=64, test_rows=32)", code)


def commands(page: Path) -> list[list[str]]:
    """The words after `wideberth` of every command in a page."""
    found: list[list[str]] = []
    for line in "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            names = (name for name in ("wideberth", "wideberth.cli") if name in words)
            found.extend(words[words.index(name) + 1 :] for name in names)
    return found


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory with the modules of all pages and the run `runs/mine` that commands speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "keep", lambda: True)  # it could not be undone, and this process has other tests to run
    monkeypatch.syspath_prepend(str(tmp_path))
    own: dict[str, str] = {}
    for page in PAGES:
        assert not own.keys() & modules(page).keys(), f"{page.name}: a module of this name is in another page"
        own |= modules(page)
    for name, source in own.items():
        Path(f"{name}.py").write_text(source)
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/config.yaml").write_text(find_recipe("digits/iaat-emr").read_text())
    yield tmp_path
    for name in own:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_of_a_page_runs(page: Path, workplace: Path) -> None:
    """All modules of the page import, and the rest of its blocks run as one script."""
    for name in modules(page):
        import_module(name)
    script = workplace / "script.py"
    script.write_text("\n".join(tiny(code) for code in blocks(page, "python") if not MODULE.match(code)))
    runpy.run_path(str(script))


def test_classes_of_the_reader_train(workplace: Path) -> None:
    """What pages show as plug-ins works in the loop."""
    run = wb.train(
        wb.models.MLP(shape=(2,), classes=2, hidden=(8,)),
        import_module("rings").Rings(rows=40),
        out="runs/own",
        attack=import_module("mine").RandomPoints(tries=2),
        radius=import_module("mine").ByConfidence(eps=0.1),
        weighting=import_module("focus").Focus(),
        regularizers=[import_module("flat").SmallLogits(0.01)],
        epochs=1,
    )
    assert run.finished


def test_attack_of_the_reader_keeps_its_promises(workplace: Path) -> None:
    """The example attack stays in ball and box, tells the truth about success, and repeats itself."""
    import torch

    attack = import_module("mine").RandomPoints(tries=4, norm="l2")
    x, y, index = wb.data.Digits(test_rows=30).test().tensors()
    model, eps = wb.models.ConvNet(shape=(1, 8, 8), classes=10, width=4), torch.linspace(0, 3, 30)
    found, again = attack(model, x, y, eps=eps, index=index), attack(model, x, y, eps=eps, index=index)
    assert bool(((found.x - x).flatten(1).norm(dim=1) <= eps * (1 + 1e-6)).all())
    assert torch.equal(found.x[0], x[0])
    assert 0 <= float(found.x.min()) <= float(found.x.max()) <= 1
    assert torch.equal(found.success, wb.losses.misclassified(model(found.x), y))
    assert torch.equal(found.x, again.x)
    assert not torch.equal(found.x, x)


@pytest.mark.parametrize("page", [page for page in pages_with("bash") if commands(page.values[0])])
def test_commands_of_a_page_parse(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command exists, takes the options it is given, by their full names, and can read their values."""
    # Parsed, not made: making objects would read data sets and weights that are not here.
    for name in ("instantiate", "instantiate_classes"):
        monkeypatch.setattr(parsing.Parser, name, lambda self, config, **_: config)
    for name, *words in commands(page):
        module = import_module(f"wideberth.commands.{name}")
        function = wb.train if name == "train" else module.run
        parameters = inspect.signature(function).parameters
        accepted = {*parameters, "config", "help", "print_config", "trust"}
        given = {re.split(r"[.=+]", word[2:])[0] for word in words if word.startswith("--")}
        assert given <= accepted, f"wideberth {name} {shlex.join(words)}: there is no {given - accepted}"
        if name == "train":
            train.parse(words)
        else:
            parsing.parse(name, function, words, many="runs" if "runs" in parameters else None)


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_configurations_of_a_page_parse(page: Path, workplace: Path) -> None:
    """Every YAML block is a configuration, on its own or on top of a recipe; one with other classes needs trust."""
    for place, block in enumerate(blocks(page, "yaml")):
        file = workplace / f"{place}.yaml"
        file.write_text(block)
        words = ["--config", str(file)] if "model:" in block else ["--config", "digits/pgd-at", "--config", str(file)]
        if re.search(r"class_path: (?!wideberth|torch)\w+\.", block) or "HuggingFace" in block:
            with pytest.raises(wb.InputError, match="--trust"):
                train.parse(words)
            words.append("--trust")
        train.parse(words)


def anchors(page: Path) -> set[str]:
    """The anchors that a code host gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    """Every link inside the repository names a file, and a heading of it."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), f"{link}: outside the repository"
        assert target.is_file(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_every_page_is_linked() -> None:
    """Whoever starts at the index finds every page."""
    index = ROOT / "docs/index.md"
    linked = {(index.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+\.md)\)", index.read_text())}
    assert set(ROOT.glob("docs/**/*.md")) - {index} <= linked


def test_readme_opens_with_the_two_commands() -> None:
    """The commands by which a reader starts, and by which the checks run the tests."""
    first = blocks(ROOT / "README.md", "bash")[0]
    assert first == "pip install uv && uv run wideberth quickstart\npip install uv && uv run pytest\n"
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_citation_is_complete() -> None:
    """The fields that readers of CITATION.cff need, and both papers."""
    told = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= told.keys()
    assert told["cff-version"] == "1.2.0"
    assert [paper["url"].rpartition("/")[2] for paper in told["references"]] == ["1910.08051", "2210.05118"]
