"""Evaluation: clean and verified robust accuracy, sample by sample, with exact intervals."""

from wideberth.evaluation.evaluate import evaluate
from wideberth.evaluation.record import Evaluation
from wideberth.evaluation.verify import verify

__all__ = ["Evaluation", "evaluate", "verify"]
