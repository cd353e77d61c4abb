"""Evaluation: clean and verified robust accuracy, sample by sample, with exact intervals, and signs of trouble."""

from wideberth.evaluation.curve import accuracy_curve
from wideberth.evaluation.diagnostics import Finding, examine, grade
from wideberth.evaluation.evaluate import evaluate
from wideberth.evaluation.evidence import AdversarialPoints
from wideberth.evaluation.recheck import Disagreement, Verification
from wideberth.evaluation.record import Evaluation
from wideberth.verification import verify

__all__ = [
    "AdversarialPoints",
    "Disagreement",
    "Evaluation",
    "Finding",
    "Verification",
    "accuracy_curve",
    "evaluate",
    "examine",
    "grade",
    "verify",
]
