"""Attacks: immutable hyper-parameters that craft, for every sample within its own radius, the worst point found."""

from wideberth.attacks.apgd import APGD
from wideberth.attacks.base import Adversarial, Attack
from wideberth.attacks.carlini_wagner import CarliniWagner
from wideberth.attacks.deepfool import DeepFool
from wideberth.attacks.descent import DDN, FMN
from wideberth.attacks.fab import FAB
from wideberth.attacks.friendly import EarlyStoppedPGD
from wideberth.attacks.gradient import FGSM, NFGSM, PGD, ScaledStep
from wideberth.attacks.margin import PMA
from wideberth.attacks.momentum import MIFGSM
from wideberth.attacks.noise import RandomNoise
from wideberth.attacks.spatial import Flow, Spatial
from wideberth.attacks.square import Square
from wideberth.attacks.state import Problem, State
from wideberth.attacks.suites import SUITES, Stage, suite
from wideberth.attacks.wasserstein import Wasserstein

__all__ = [
    "APGD",
    "DDN",
    "FAB",
    "FGSM",
    "FMN",
    "MIFGSM",
    "NFGSM",
    "PGD",
    "PMA",
    "SUITES",
    "Adversarial",
    "Attack",
    "CarliniWagner",
    "DeepFool",
    "EarlyStoppedPGD",
    "Flow",
    "Problem",
    "RandomNoise",
    "ScaledStep",
    "Spatial",
    "Square",
    "Stage",
    "State",
    "Wasserstein",
    "suite",
]
