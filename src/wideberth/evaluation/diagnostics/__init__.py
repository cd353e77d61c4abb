"""Diagnostics: is a robust accuracy high because the model is robust, or because the attacks fail on it?"""

from wideberth.evaluation.diagnostics.checks import CHECKS, Check, Finding, Grade, examine, grade
from wideberth.evaluation.diagnostics.surrogate import SurrogateGradients

__all__ = ["CHECKS", "Check", "Finding", "Grade", "SurrogateGradients", "examine", "grade"]
