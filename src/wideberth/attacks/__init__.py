"""Attacks: immutable hyper-parameters that craft, for every sample within its own radius, the worst point found."""

from wideberth.attacks.apgd import APGD
from wideberth.attacks.base import Adversarial, Attack
from wideberth.attacks.carlini_wagner import CarliniWagner
from wideberth.attacks.ddn_fmn import DDN, FMN
from wideberth.attacks.deepfool import DeepFool
from wideberth.attacks.early_stopped import EarlyStoppedPGD
from wideberth.attacks.fab import FAB
from wideberth.attacks.mi_fgsm import MIFGSM
from wideberth.attacks.pgd import FGSM, NFGSM, PGD, ScaledStep
from wideberth.attacks.pma import PMA
from wideberth.attacks.random_noise import RandomNoise
from wideberth.attacks.spatial import Flow, Spatial
from wideberth.attacks.square import Square
from wideberth.attacks.state import AttackInputs, AttackState
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
    "AttackInputs",
    "AttackState",
    "CarliniWagner",
    "DeepFool",
    "EarlyStoppedPGD",
    "Flow",
    "RandomNoise",
    "ScaledStep",
    "Spatial",
    "Square",
    "Stage",
    "Wasserstein",
    "suite",
]
