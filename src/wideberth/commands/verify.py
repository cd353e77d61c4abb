"""`wideberth verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wideberth.checks import InputError
from wideberth.commands.evaluate import subject
from wideberth.commands.parsing import parse
from wideberth.data import Data
from wideberth.evaluation import Evaluation
from wideberth.runs import EVALUATIONS, Run


def run(
    record: str,
    data: Data | None = None,
    model: str | None = None,
    weights: str | None = None,
    architecture: str | None = None,
    batch_size: int = 256,
    evaluation: str | None = None,
    trust: bool = False,
) -> int:
    """Check every adversarial point of an evaluation again, in seconds and without a search.

    Each must lie in the ball and in the box and be misclassified by the model. Those that do not are named.

    Args:
        record: a run directory that was evaluated, or a directory that an evaluation was saved in.
        data: the data set that was evaluated (default: what the run was trained on).
        model: what was evaluated, where RECORD is not the run itself: as MODEL of `wideberth evaluate`.
        weights: a file of weights for a model named by its architecture.
        architecture: a YAML file (or YAML) with class_path and init_args, for a .safetensors file on its own.
        batch_size: points at a time.
        evaluation: the name of the evaluation to check (default: the newest).
        trust: let the run's config.yaml, and the architecture, name any class and run its code.
    """
    found = Evaluation.load(record if evaluation is None else Path(record) / EVALUATIONS / evaluation)
    if model is None and not (Path(record).is_dir() and Run(record).finished):
        # What a record names as its model is not looked up: it may be code.
        raise InputError(f"--model: needed, since {record!r} is not a run that holds its weights")
    network, source = subject(model or record, data, weights, architecture, trust)
    verification = found.verify(network, source, batch_size)
    print(verification)
    return 1 if verification.disagreements else 0


def main(words: Sequence[str]) -> int:
    """Parse and verify; the exit code is 1 where a point does not agree with the record."""
    return run(**parse("verify", run, words).as_dict())
