"""Evaluations that are killed, and another process that goes on with them; run by test_interrupted.py.

python interrupted_script.py begin FOLDER    every case begins and is killed, each in a process of its own
python interrupted_script.py resume FOLDER   one new process finishes them all, and saves the records
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from test_verdict import problem
from torch import nn

from wideberth.attacks import PGD, SUITES, Attack
from wideberth.evaluation import Evaluation, evaluate, search
from wideberth.evaluation.state_file import StateFile

EPS, ROWS = 0.3, 12


def own_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A user's loss, which a line-up names by its import path."""
    return -logits.gather(1, y[:, None]).squeeze(1)


OWN: dict[str, Attack] = {
    "PGD": PGD(steps=3, step_size=0.02, keep="worst", loss=own_loss),
    "PGD again": PGD(steps=30, step_size=0.01, restarts=4, keep="worst", loss=own_loss),
}
LONG = {"eps": 0.4}
"""A radius at which the first attack leaves nothing for the long ones."""
CASES: dict[str, dict[str, Any]] = {name: {"suite": name} for name in SUITES} | {
    "standard": {"suite": "standard", **LONG},
    "plus": {"suite": "plus", **LONG},
    "own": {"suite": OWN},
    "smallest radii": {"suite": "pgd", "radii": True},
    "SIGINT": {"suite": "fast"},
}
SAVES = {"standard": 2, "plus": 2, "smallest radii": 250}
"""After how many saved states a case is killed, where not after 25: the last in the search for the smallest radii."""


def evaluated(model: nn.Module, name: str, state: Path | None = None) -> Evaluation:
    """A case, from what its state holds if there is one."""
    _, x, y = problem(ROWS)
    options = {"eps": EPS, "margin": False, "examined": False, "batch_size": 4, "state": state}
    return evaluate(model, (x, y), **options | CASES[name])


def kill_after(saves: int) -> None:
    """Have this process killed once so many states were saved."""
    search.SAVE_EVERY = -1.0
    left, save = [saves], StateFile.save

    def counted(self: StateFile, *known: Any) -> None:
        save(self, *known)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    StateFile.save = counted  # type: ignore[method-assign]


class Interrupted(nn.Module):
    """A model at which the user presses Ctrl-C after so many forwards."""

    def __init__(self, model: nn.Module, forwards: int) -> None:
        super().__init__()
        self.model, self.left = model, forwards

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        logits: torch.Tensor = self.model(x)
        return logits


def begin(folder: Path) -> None:
    """Every case in a child of its own, which does not come to its end."""
    for name in CASES:
        if (child := os.fork()) == 0:
            model = problem(ROWS)[0]
            if name == "SIGINT":
                signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
                model = Interrupted(model, 40)
            else:
                kill_after(SAVES.get(name, 25))
            try:
                evaluated(model, name, folder / f"{name}.state")
            except KeyboardInterrupt:
                os._exit(130)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        expected = 130 if name == "SIGINT" else -signal.SIGKILL
        assert status == expected, f"{name}: ended with {status}"


def resume(folder: Path) -> None:
    """All cases, from where they were."""
    for name in CASES:
        model = problem(ROWS)[0]
        if name == "SIGINT":
            model = Interrupted(model, -1)
        assert (folder / f"{name}.state").exists(), name
        evaluated(model, name, folder / f"{name}.state").save(folder / name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"begin": begin, "resume": resume}[sys.argv[1]](Path(sys.argv[2]))
