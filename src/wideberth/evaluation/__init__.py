"""Evaluation: clean and verified robust accuracy, sample by sample, with exact intervals, and signs of trouble."""

from wideberth.evaluation.curve import accuracy_curve
from wideberth.evaluation.diagnostics import Finding, examine, grade
from wideberth.evaluation.evaluate import evaluate
from wideberth.evaluation.record import Evaluation
from wideberth.evaluation.verify import verify

__all__ = ["Evaluation", "Finding", "accuracy_curve", "evaluate", "examine", "grade", "verify"]
