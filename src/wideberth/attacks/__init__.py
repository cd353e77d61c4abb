"""Attacks: immutable hyper-parameters that craft, for every sample within its own radius, the worst point found."""

from wideberth.attacks.base import Adversarial, Attack, Problem
from wideberth.attacks.gradient import FGSM, PGD, ScaledStep
from wideberth.attacks.margin import PMA
from wideberth.attacks.suites import SUITES, Stage, suite

__all__ = ["FGSM", "PGD", "PMA", "SUITES", "Adversarial", "Attack", "Problem", "ScaledStep", "Stage", "suite"]
