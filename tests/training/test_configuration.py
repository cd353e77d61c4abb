"""Objects from words and words from objects; runs as files that are there whole or not at all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import wideberth as wb
from wideberth.configuration import Described, construct, describe, import_object, parse_call
from wideberth.runs import Run, write_atomically


def factory(width: int, *, depth: int = 2) -> tuple[int, int]:
    if width < 0:
        raise ValueError("a width\nbelow zero")
    return width, depth


@dataclass
class Plain:
    number: int = 1
    hidden: int = field(default=2, init=False)


class Keeper:
    def __init__(self, kept: int, lost: int = 0) -> None:
        self.kept = kept


class Named(Described):
    def __init__(self, first: Any, second: Any = None, **rest: Any) -> None:
        """Keeps nothing itself."""


HERE = __name__


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (0.25, 0.25),
        ("word", "word"),
        (Path("a/b"), "a/b"),
        ((1, [2, None]), [1, [2, None]]),
        ({"a": (1,), 2: Path("c")}, {"a": [1], "2": "c"}),
        (factory, f"{HERE}.factory"),
        (nn.ReLU, "torch.nn.ReLU"),
        (wb.losses.cross_entropy, "wideberth.losses.cross_entropy"),
        (Plain(3), {"class_path": f"{HERE}.Plain", "init_args": {"number": 3}}),
        (Keeper(4, 5), {"class_path": f"{HERE}.Keeper", "init_args": {"kept": 4}}),
        (Named(1), {"class_path": f"{HERE}.Named", "init_args": {"first": 1, "second": None}}),
        (Named(1, Plain(), extra=(2,)), {
            "class_path": f"{HERE}.Named",
            "init_args": {
                "first": 1,
                "second": {"class_path": f"{HERE}.Plain", "init_args": {"number": 1}},
                "extra": [2],
            },
        }),
        (Named(torch.zeros(2), nn.ReLU()), {"class_path": f"{HERE}.Named", "init_args": {}}),
        (functools.partial(factory, depth=3), {"class_path": f"{HERE}.factory", "init_args": {"depth": 3}}),
        (wb.radii.Zero(), {"class_path": "wideberth.training.radii.Zero", "init_args": {}}),
    ],
)  # fmt: skip
def test_describe(value: Any, expected: Any) -> None:
    assert describe(value) == expected
    assert yaml.safe_load(yaml.safe_dump(describe(value))) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b:c", ("a.b:c", (), {})),
        (" a.b.c() ", ("a.b.c", (), {})),
        ("c(8, depth=2)", ("c", (8,), {"depth": 2})),
        ("a.c(shape=(3, 32), name='(x', none=None)", ("a.c", (), {"shape": (3, 32), "name": "(x", "none": None})),
    ],
)
def test_parse_call(text: str, expected: Any) -> None:
    assert parse_call(text) == expected


@pytest.mark.parametrize(
    "text", ["a b", "a.", "", "c(8", "c(8))", "c(f(1))", "c(1)(2)", "c(1) + c(2)", "c(**{})", "c(a=1, a=2)", "c(x)"]
)
def test_what_is_not_a_call(text: str) -> None:
    with pytest.raises(wb.InputError, match="must be") as refusal:
        parse_call(text)
    assert "\n" not in str(refusal.value)


def test_nothing_is_evaluated() -> None:
    with pytest.raises(wb.InputError, match="must be Python literals"):
        parse_call("a.b(__import__('os').getcwd())")


@pytest.mark.parametrize("path", ["torch.nn.ReLU", "torch.nn:ReLU"])
def test_import_object(path: str) -> None:
    assert import_object(path) is nn.ReLU
    assert import_object("torch:nn.ReLU") is nn.ReLU


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("ReLU", "must be an import path"),
        ("torch.nn.Relu", "there is no 'Relu'"),
        ("torhc.nn.ReLU", "'torhc.nn': cannot be imported: ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_imported(path: str, message: str) -> None:
    with pytest.raises(wb.InputError, match=message):
        import_object(path)


def test_modules_of_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_bright_idea.py").write_text("answer = 42")
    (tmp_path / "my_broken_idea.py").write_text("import my_missing_idea")
    monkeypatch.syspath_prepend("")  # restores sys.path afterwards
    monkeypatch.chdir(tmp_path)
    assert import_object("my_bright_idea.answer") == 42
    with pytest.raises(wb.InputError, match="my_missing_idea"):
        import_object("my_broken_idea.answer")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: construct(factory, "f"), "f: missing a required argument: 'width'; accepted are width: 'int'"),
        (lambda: construct(factory, "f", 1, height=2), "f: got an unexpected keyword argument 'height'"),
        (lambda: construct(factory, "f", -1), "f: cannot be built: ValueError: a width below zero"),
        (lambda: construct(3, "f"), "f: is a int, must be a class or a function"),  # type: ignore[arg-type]
        (lambda: construct(wb.models.MLP, "m", classes=1), "classes"),
    ],
)
def test_what_cannot_be_constructed(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(wb.InputError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)


def test_construct() -> None:
    assert construct(factory, "f", 3, depth=1) == (3, 1)
    assert construct(lambda path, factory: (path, factory), "f", path=1, factory=2) == (1, 2)


# ---- run directories ------------------------------------------------------------------------------------------------


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "er" / "table.csv"
    write_atomically(file, lambda temporary: temporary.write_text("old"))

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        assert file.read_text() == "old"
        assert temporary.suffix == ".csv"  # some writers choose the format by it
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, half)
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]
    write_atomically(file, lambda temporary: temporary.write_text("new"))
    assert file.read_text() == "new"


def test_an_empty_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert not run.finished
    records = (run.checkpoint, run.metrics, run.samples, run.radii, run.extremes, run.evaluation)
    assert records == (None,) * 6
    assert run.evaluation_samples is None
    assert repr(run) == f"Run({str(tmp_path)!r})"
    with pytest.raises(wb.InputError, match=r"holds no config.yaml, so it is not a run directory"):
        _ = run.config


def test_no_run(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(wb.InputError, match="no such directory"):
            Run(path)


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "word"])
def test_a_configuration_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(
        wb.InputError, match=r"config.yaml': cannot be read \(TypeError: must hold names and their values"
    ):
        _ = Run(tmp_path).config
