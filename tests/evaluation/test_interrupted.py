"""An evaluation whose process is killed goes on in another process, and ends with the verdict of one left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interrupted_script import CASES, ROWS, Interrupted, evaluated
from pandas.testing import assert_frame_equal
from safetensors import safe_open
from test_verdict import problem

from wideberth.evaluation import Evaluation
from wideberth.evaluation.search import SearchState

SCRIPT = Path(__file__).with_name("interrupted_script.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    run("begin", folder)
    return folder


@pytest.fixture(scope="module")
def resumed(folder: Path) -> Path:
    (folder / "begun").mkdir()
    for file in folder.iterdir():
        if file.suffix in (".state", ".radii"):
            (folder / "begun" / file.name).write_bytes(file.read_bytes())
    run("resume", folder)
    return folder


def run(what: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), what, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", CASES)
def test_another_process_reaches_the_verdict_of_one_left_alone(name: str, resumed: Path) -> None:
    model = problem(ROWS)[0]
    whole = evaluated(Interrupted(model, -1) if name == "SIGINT" else model, name)
    found = Evaluation.load(resumed / name)
    assert_frame_equal(found.samples, whole.samples)
    assert found.adversarial is not None
    assert whole.adversarial is not None
    assert torch.equal(found.adversarial.position, whole.adversarial.position)
    # To the last digits: a job that begins again may share its batch with other rows.
    assert torch.allclose(found.adversarial.x(), whole.adversarial.x(), rtol=1e-9)
    assert not list(resumed.glob(f"{name}.*")), "the state is gone"


@pytest.mark.parametrize("name", CASES)
def test_something_was_known_and_something_left(name: str, resumed: Path) -> None:
    """Without this, the test above would compare little."""
    suffix = "state.radii" if name == "smallest radii" else "state"
    path = resumed / "begun" / f"{name}.{suffix}"
    with safe_open(path, "pt") as file:
        fingerprint = file.metadata()["fingerprint"]
    state = SearchState.load(path, fingerprint)
    assert (state.evaluations > 1).any()
    assert int(state.stage_under_way) < len(state.seconds)
