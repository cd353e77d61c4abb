"""wideberth trains classifiers that give every input a wide berth, and says, sample by sample, how robust they are.

The public names; each is imported when it is first used, so that `import wideberth` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wideberth.training.catalogue import ROOMS

if TYPE_CHECKING:
    from wideberth import attacks, data, evaluation, losses, margins, models, reports
    from wideberth.checks import InputError
    from wideberth.evaluation import Evaluation
    from wideberth.evaluation.evaluate import evaluate
    from wideberth.models import load_model
    from wideberth.randomness import Noise
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
    from wideberth.training.batch import BatchContext, TrainingPoints
    from wideberth.training.module import Diverged, RobustTraining
    from wideberth.training.policies import Optimization, Policies
    from wideberth.training.sample_state import SampleState
    from wideberth.training.train import train

__all__ = [
    "BatchContext",
    "Diverged",
    "Evaluation",
    "InputError",
    "Noise",
    "Optimization",
    "Policies",
    "RobustTraining",
    "Run",
    "SampleState",
    "TrainingPoints",
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
    "BatchContext": "wideberth.training.batch",
    "Diverged": "wideberth.training.module",
    "Evaluation": "wideberth.evaluation",
    "InputError": "wideberth.checks",
    "Noise": "wideberth.randomness",
    "Optimization": "wideberth.training.policies",
    "Policies": "wideberth.training.policies",
    "RobustTraining": "wideberth.training.module",
    "Run": "wideberth.runs",
    "SampleState": "wideberth.training.sample_state",
    "TrainingPoints": "wideberth.training.batch",
    "evaluate": "wideberth.evaluation",
    "load_model": "wideberth.models",
    "train": "wideberth.training.train",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("wideberth")
    if name not in __all__:
        raise AttributeError(f"module 'wideberth' has no attribute {name!r}")
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        value = import_module(ROOMS.get(name, f"wideberth.{name}"))
    globals()[name] = value
    return value
