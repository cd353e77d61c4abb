"""wideberth trains classifiers that give every input a wide berth, and says, sample by sample, how robust they are.

The public names; each is imported when it is first used, so that `import wideberth` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wideberth import attacks, data, evaluation, losses, margins, models, reports
    from wideberth.checks import InputError
    from wideberth.evaluation import Evaluation
    from wideberth.evaluation.evaluate import evaluate
    from wideberth.models import load_model
    from wideberth.runs import Run
    from wideberth.training import (
        averaging,
        objectives,
        perturbation,
        radii,
        regularizers,
        schedules,
        stopping,
        weightings,
    )
    from wideberth.training.module import Diverged, RobustTraining
    from wideberth.training.train import train

__all__ = [
    "Diverged",
    "Evaluation",
    "InputError",
    "RobustTraining",
    "Run",
    "attacks",
    "averaging",
    "data",
    "evaluate",
    "evaluation",
    "load_model",
    "losses",
    "margins",
    "models",
    "objectives",
    "perturbation",
    "radii",
    "regularizers",
    "reports",
    "schedules",
    "stopping",
    "train",
    "weightings",
]

_HOMES = {
    "Diverged": "wideberth.training.module",
    "Evaluation": "wideberth.evaluation",
    "InputError": "wideberth.checks",
    "RobustTraining": "wideberth.training.module",
    "Run": "wideberth.runs",
    "evaluate": "wideberth.evaluation",
    "load_model": "wideberth.models",
    "train": "wideberth.training.train",
}
_TRAINING = {
    "averaging",
    "objectives",
    "perturbation",
    "radii",
    "regularizers",
    "schedules",
    "stopping",
    "weightings",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'wideberth' has no attribute {name!r}")
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        value = import_module(f"wideberth.training.{name}" if name in _TRAINING else f"wideberth.{name}")
    globals()[name] = value
    return value
