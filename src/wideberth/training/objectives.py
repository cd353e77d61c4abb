"""Objectives: what the model pays at the worst point found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from wideberth import checks, losses
from wideberth.losses import Loss
from wideberth.training.step import Step


@dataclass(frozen=True)
class Payment:
    """What a batch pays, and the logits (B, K) the objective saw on the way (None: it did not look there).

    Attributes:
        losses: (B,) per sample, with graph: what a weighting weighs.
        clean_logits: at the clean inputs, in train mode.
        adversarial_logits: at the adversarial inputs, in train mode.
        unweighted: (B,) per sample, with graph: what is paid besides, whatever the sample's weight; None: nothing.
    """

    losses: Tensor
    clean_logits: Tensor | None = None
    adversarial_logits: Tensor | None = None
    unweighted: Tensor | None = None

    def total(self, weights: Tensor) -> Tensor:
        """What each sample pays, (B,), with the samples' weights (B,)."""
        weighed = weights * self.losses
        return weighed if self.unweighted is None else weighed + self.unweighted


class Objective(ABC):
    """What the model pays; a new objective is one subclass with a `pay`."""

    adversarial = True
    """Whether it looks at adversarial points at all."""

    def attack_loss(self, step: Step) -> Loss | None:
        """The loss that the attack is to ascend; None: the attack's own."""
        return None

    @abstractmethod
    def pay(self, step: Step, x_adv: Tensor) -> Payment:
        """The losses of a batch; `x_adv` is (B, ...), equal to the clean inputs where no attack was made."""


@dataclass(frozen=True)
class CleanCrossEntropy(Objective):
    """Cross-entropy on the clean inputs: standard training."""

    adversarial = False

    def pay(self, step: Step, x_adv: Tensor) -> Payment:
        """CE(z(x), y)."""
        logits = step.model(step.x)
        return Payment(losses.cross_entropy(logits, step.y), clean_logits=logits)


@dataclass(frozen=True)
class AdversarialCrossEntropy(Objective):
    """Cross-entropy on the adversarial inputs alone (Madry et al. 2018); with radius zero, standard training."""

    def pay(self, step: Step, x_adv: Tensor) -> Payment:
        """CE(z(x_adv), y)."""
        logits = step.model(x_adv)
        return Payment(losses.cross_entropy(logits, step.y), adversarial_logits=logits)


@dataclass(frozen=True)
class TRADES(Objective):
    """Clean cross-entropy plus beta * KL(clean || adversarial) (Zhang et al. 2019).

    Args:
        beta: weight of the KL term (1/lambda of the paper); 6 on CIFAR, 1 on MNIST.
        inner: what the attack ascends. "kl": the KL term, as TRADES does. "attack": the attack's own loss, as
            TRADES-EMR does (cross-entropy there).

    A weighting weighs the KL term alone, as in MAIL-TRADES: every sample pays for its clean prediction.

    What we do differently: one clean forward serves both terms, where the original makes two; batch-norm statistics
    see clean and adversarial batches once each. The attack's constant p(x) is computed once, not at every step.
    """

    beta: float = 6.0
    inner: Literal["kl", "attack"] = "kl"

    def __post_init__(self) -> None:
        """Refuse a negative weight (`InputError`)."""
        checks.at_least("beta", self.beta, 0)
        checks.choice("inner", self.inner, ("kl", "attack"))

    def attack_loss(self, step: Step) -> Loss | None:
        """KL from the clean prediction, in the attack's mode."""
        if self.inner == "attack":
            return None
        clean = step.clean_logits
        return lambda logits, y: losses.kl_divergence(clean, logits)

    def pay(self, step: Step, x_adv: Tensor) -> Payment:
        """CE(z(x), y) + beta * KL(p(x) || p(x_adv)), gradients through both arguments."""
        clean, adversarial = step.model(step.x), step.model(x_adv)
        drift = self.beta * losses.kl_divergence(clean, adversarial)
        return Payment(drift, clean, adversarial, unweighted=losses.cross_entropy(clean, step.y))
