"""What a user gets to read during a run: the logger `wideberth`, and warnings of the user's own code."""

from __future__ import annotations

import logging
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from training_tools import fit, mlp, tensors

import wideberth as wb


def warning_from(module_name: str) -> Any:
    """A function, defined in a module of that name, that warns."""
    module = types.ModuleType(module_name)
    exec("import warnings\ndef warn():\n    warnings.warn('mind the step', UserWarning)\n", vars(module))
    return module.warn


class Warns(nn.Module):
    """Warns in every forward."""

    def __init__(self, warn: Any) -> None:
        super().__init__()
        self.inner, self.warn = mlp(), warn

    def forward(self, x: Tensor) -> Tensor:
        self.warn()
        logits: Tensor = self.inner(x)
        return logits


@pytest.mark.parametrize("module", ["my_models", "lightning_models"])
def test_warnings_of_the_users_code_are_shown(tmp_path: Path, module: str) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        fit(Warns(warning_from(module)), tensors(), tmp_path / "run", epochs=1)
    # More than the one that the check of the model before training gives.
    assert len([each for each in shown if str(each.message) == "mind the step"]) > 1
    assert not [each for each in shown if "lightning/" in each.filename]


def test_what_a_user_may_want_to_see_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    radius = wb.radii.InstanceAdaptive(0.6, gamma=0.02, warmup=0)
    fit(mlp(), tensors(), tmp_path / "run", radius=radius, epochs=1)
    assert [(each.name, each.levelno) for each in caplog.records] == [("wideberth", logging.WARNING)]
    assert caplog.messages[0].startswith("note: 100% of the learned radii")
