"""The policies of a training run as one value, what is optimised with, and the combinations that are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from wideberth import losses
from wideberth.attacks import PGD, Attack
from wideberth.checks import InputError
from wideberth.data.augment import Augmentation
from wideberth.modes import Mode
from wideberth.training.objectives import AdversarialCrossEntropy, Objective
from wideberth.training.perturbation import AWP
from wideberth.training.radii import Radius, Zero
from wideberth.training.regularizers import Regularizer
from wideberth.training.weightings import Uniform, Weighting

MakeOptimizer: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler: TypeAlias = Callable[[Optimizer], LRScheduler]


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Make the field's default optimizer: SGD with learning rate 0.1, momentum 0.9 and weight decay 5e-4."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


@dataclass(frozen=True, eq=False)
class Policies:
    """What is trained on, and what is minimised there; the defaults are standard training.

    Attributes:
        attack: perturbs the training points; its norm is that of the radii.
        radius: how far each input may be moved.
        objective: the losses of a batch.
        weighting: how much each sample counts.
        regularizers: the penalties that are added to the loss.
        augment: augments the whole batch on its device, or None.
        perturbation: of the weights, at which the gradient of each step is taken, or None.
        validation_attack: attacks held-out rows, at `Radius.eval_eps`. None: 10-step PGD on the margin, in the norm of
            the training attack, so that a weak training attack cannot hide what it misses. (A training attack whose
            points are in no norm ball is used itself.)
        attack_mode: the mode of the model during the attack. "eval" leaves batch-norm statistics alone.

    Raises:
        InputError: for policies that cannot be combined.
    """

    attack: Attack = field(default_factory=PGD)
    radius: Radius = field(default_factory=Zero)
    objective: Objective = field(default_factory=AdversarialCrossEntropy)
    weighting: Weighting = field(default_factory=Uniform)
    regularizers: Sequence[Regularizer] = ()
    augment: Augmentation | None = None
    perturbation: AWP | None = None
    validation_attack: Attack | None = None
    attack_mode: Mode = "eval"

    def __post_init__(self) -> None:
        """Refuse what cannot be combined (`InputError`); choose the validation attack where none is given."""
        check_combination(self.attack, self.radius, self.objective, self.weighting)
        if self.validation_attack is None:
            object.__setattr__(self, "validation_attack", default_validation_attack(self.attack))
        else:
            check_validation_attack(self.validation_attack, self.attack)


@dataclass(frozen=True)
class Optimization:
    """How the weights are updated.

    Attributes:
        optimizer: makes the optimizer from the parameters.
        scheduler: makes the learning-rate schedule from the optimizer, or None.
        scheduler_interval: whether the schedule steps every "epoch" or every "step".
    """

    optimizer: MakeOptimizer = sgd
    scheduler: MakeScheduler | None = None
    scheduler_interval: Literal["epoch", "step"] = "epoch"


def check_combination(attack: Attack, radius: Radius, objective: Objective, weighting: Weighting) -> None:
    """Refuse policies that cannot work together (`InputError`, with the reason)."""
    name = type(objective).__name__
    if radius.needs_adversary and not objective.adversarial:
        raise InputError(
            f"radius={type(radius).__name__} with objective={name}: the radii are learned at adversarial points, "
            "which this objective never looks at; use AdversarialCrossEntropy or TRADES"
        )
    if not objective.adversarial and not isinstance(radius, Zero):
        raise InputError(
            f"radius={type(radius).__name__} with objective={name}: this objective trains on clean inputs alone; "
            "use radius Zero, or AdversarialCrossEntropy"
        )
    kind = type(weighting).__name__
    if (weighting.needs_adversary or weighting.needs_attack) and not objective.adversarial:
        raise InputError(
            f"weighting={kind} with objective={name}: the weights depend on adversarial points, which this "
            "objective never looks at; use weighting Uniform, or AdversarialCrossEntropy"
        )
    if weighting.needs_attack and isinstance(radius, Zero):
        raise InputError(
            f"weighting={kind} with radius=Zero: the weights depend on the steps of an attack, and none is made; use "
            "weighting Uniform, or another radius"
        )
    starts_clean = getattr(attack, "start", "uniform") == "none"
    if objective.ascends_divergence and starts_clean and not isinstance(radius, Zero):
        raise InputError(
            f'attack.start="none" with objective={name}: the gradient of the KL term is zero at the clean input, so '
            'the attack would never move; use start="gaussian" or "uniform"'
        )


def within_norm(attack: Attack) -> bool:
    """Whether eps is the radius of a norm ball; N-FGSM's is, though its points leave it."""
    return attack.norm_bounded or isinstance(attack, PGD)


def default_validation_attack(attack: Attack) -> Attack:
    """The attack on held-out rows where none is given: see `Policies`."""
    if not within_norm(attack):
        return attack
    return PGD(norm=attack.norm, box=attack.box, loss=losses.margin_loss, keep="first_flip")


def check_validation_attack(validation_attack: Attack, attack: Attack) -> None:
    """Refuse a validation attack whose radius means something else than the training attack's (`InputError`)."""
    for name in ("norm", "box"):
        its, theirs = getattr(validation_attack, name), getattr(attack, name)
        if its != theirs:
            raise InputError(f"validation_attack.{name}={its!r} with attack.{name}={theirs!r}: must be the same")
    if validation_attack.norm_bounded != within_norm(attack):
        kinds = type(validation_attack).__name__, type(attack).__name__
        raise InputError(
            f"validation_attack={kinds[0]} with attack={kinds[1]}: must keep to the same radius, both a norm's or "
            "neither"
        )
