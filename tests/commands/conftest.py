"""Running commands in-process: importing torch and lightning once is slow enough."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from wideberth.cli import main

Wideberth = Callable[..., tuple[int, str, str]]


@pytest.fixture
def wideberth(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Wideberth:
    """Run a command in an empty directory: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the digits with learned radii, two epochs long."""
    out = tmp_path_factory.mktemp("runs") / "iaat"
    words = [
        "train",
        "--config",
        "digits/iaat",
        "--epochs=2",
        "--radius.warmup=0",
        "--attack.steps=2",
        "--progress=false",
    ]
    assert main([*words, "--out", str(out)]) == 0
    return out
