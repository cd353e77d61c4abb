"""Objectives: what the model pays at the worst point found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from wideberth import checks, losses
from wideberth.losses import Loss, TrainingLoss
from wideberth.training.step import Step


@dataclass(frozen=True)
class LossTerms:
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
    """What the model pays; a new objective is one subclass with a `compute`."""

    adversarial = True
    """Whether it looks at adversarial points at all."""

    @property
    def ascends_divergence(self) -> bool:
        """Whether the attack is to ascend KL(clean || adversarial), which has no gradient at the clean input."""
        return False

    def attack_loss(self, step: Step) -> Loss | None:
        """The loss that the attack is to ascend; None: the attack's own."""
        if not self.ascends_divergence:
            return None
        clean = step.clean_logits
        return lambda logits, y: losses.kl_divergence(clean, logits)

    @abstractmethod
    def compute(self, step: Step, x_adv: Tensor) -> LossTerms:
        """The losses of a batch; `x_adv` is (B, ...), equal to the clean inputs where no attack was made."""


@dataclass(frozen=True)
class CleanCrossEntropy(Objective):
    """Cross-entropy on the clean inputs: standard training.

    Args:
        loss: what is paid in its place; (logits, y) -> (B,).
    """

    loss: TrainingLoss = losses.cross_entropy

    adversarial = False

    def compute(self, step: Step, x_adv: Tensor) -> LossTerms:
        """CE(z(x), y)."""
        logits = step.model(step.x)
        return LossTerms(self.loss(logits, step.y), clean_logits=logits)


@dataclass(frozen=True)
class AdversarialCrossEntropy(Objective):
    """Cross-entropy on the adversarial inputs alone (Madry et al. 2018); with radius zero, standard training.

    Args:
        loss: what is paid in its place; (logits, y) -> (B,). The attack goes on ascending its own.
    """

    loss: TrainingLoss = losses.cross_entropy

    def compute(self, step: Step, x_adv: Tensor) -> LossTerms:
        """CE(z(x_adv), y)."""
        logits = step.model(x_adv)
        return LossTerms(self.loss(logits, step.y), adversarial_logits=logits)


@dataclass(frozen=True)
class TRADES(Objective):
    """Clean cross-entropy plus beta * KL(clean || adversarial) (Zhang et al. 2019).

    Args:
        beta: weight of the KL term (1/lambda of the paper); 6 on CIFAR, 1 on MNIST.
        inner: what the attack ascends. "kl": the KL term, as TRADES does. "attack": the attack's own loss, as
            TRADES-EMR does (cross-entropy there).
        loss: what is paid in place of the clean cross-entropy; (logits, y) -> (B,).

    A weighting weighs the KL term alone, as in MAIL-TRADES: every sample pays for its clean prediction.

    What we do differently: one clean forward serves both terms, where the original makes two; batch-norm statistics
    see clean and adversarial batches once each. The attack's constant p(x) is computed once, not at every step.
    """

    beta: float = 6.0
    inner: Literal["kl", "attack"] = "kl"
    loss: TrainingLoss = losses.cross_entropy

    def __post_init__(self) -> None:
        """Refuse a negative weight (`InputError`)."""
        checks.at_least("beta", self.beta, 0)
        checks.choice("inner", self.inner, ("kl", "attack"))

    @property
    def ascends_divergence(self) -> bool:
        """Unless the attack is to ascend its own loss."""
        return self.inner == "kl"

    def compute(self, step: Step, x_adv: Tensor) -> LossTerms:
        """CE(z(x), y) + beta * KL(p(x) || p(x_adv)), gradients through both arguments."""
        clean, adversarial = step.model(step.x), step.model(x_adv)
        drift = self.beta * losses.kl_divergence(clean, adversarial)
        return LossTerms(drift, clean, adversarial, unweighted=self.loss(clean, step.y))


@dataclass(frozen=True)
class MART(Objective):
    """Misclassification-aware training (Wang et al. 2020): boosted cross-entropy, and KL where the clean input is hard.

    The first pushes the label's probability at the adversarial point up and the strongest rival's down; the second is
    TRADES' divergence times the probability that the clean prediction gives to the wrong classes.

    Args:
        beta: weight of the KL term; 5 for a ResNet-18, 6 for a WRN-34-10.

    A weighting weighs the first term alone, as in MAIL-MART.

    What we do differently: the guards that the original adds to its probabilities (1e-12, 1e-7) are not needed where
    1 - p is a sum of the others and log p comes from the logits; the 1e-4 beside 1 - p of the strongest rival, which
    bounds that term, is kept. In float32 at least, whatever the model computes in: half precision has no such digits.
    """

    beta: float = 5.0

    def __post_init__(self) -> None:
        """Refuse a negative weight (`InputError`)."""
        checks.at_least("beta", self.beta, 0)

    def compute(self, step: Step, x_adv: Tensor) -> LossTerms:
        """BCE(p(x_adv), y) + beta * KL(p(x) || p(x_adv)) * (1 - p_y(x)), gradients through all of it."""
        clean, adversarial = wide(step.model(step.x)), wide(step.model(x_adv))
        rival = losses.likeliest(adversarial.detach(), step.y)[:, :1]
        boosted = losses.cross_entropy(adversarial, step.y) - (1e-4 + all_but(adversarial.softmax(1), rival)).log()
        doubt = all_but(clean.softmax(1), step.y[:, None])
        drift = self.beta * losses.kl_divergence(clean, adversarial) * doubt
        return LossTerms(boosted, clean, adversarial, unweighted=drift)


def wide(logits: Tensor) -> Tensor:
    """The logits in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def all_but(probabilities: Tensor, which: Tensor) -> Tensor:
    """The probability (B,) of all classes but one, (B, 1): 1 - p without its rounding."""
    return probabilities.scatter(1, which, 0).sum(1)


@dataclass(frozen=True)
class ALP(Objective):
    """Adversarial logit pairing (Kannan, Kurakin and Goodfellow 2018): clean and adversarial logits are to agree.

    Args:
        beta: weight of the squared difference of the logits, a mean over the classes; 0.5 in Pang et al. 2020.
        loss: what is paid, in equal parts, at both inputs; (logits, y) -> (B,). The attack goes on ascending its own.

    A weighting weighs what is paid for the adversarial point: every sample pays for its clean prediction.

    What we do differently: every sample of the batch is paired with its own adversarial point and the losses are means
    over samples, as in the code of Pang et al. 2020 (ALP-HE).
    """

    beta: float = 0.5
    loss: TrainingLoss = losses.cross_entropy

    def __post_init__(self) -> None:
        """Refuse a negative weight (`InputError`)."""
        checks.at_least("beta", self.beta, 0)

    def compute(self, step: Step, x_adv: Tensor) -> LossTerms:
        """CE(z(x), y) / 2 + CE(z(x_adv), y) / 2 + beta * mean((z(x) - z(x_adv))^2), gradients through both logits."""
        clean, adversarial = step.model(step.x), step.model(x_adv)
        there = self.loss(adversarial, step.y) / 2 + self.beta * (clean - adversarial).square().mean(1)
        return LossTerms(there, clean, adversarial, unweighted=self.loss(clean, step.y) / 2)


class LBGAT(nn.Module, Objective):
    """Learnable boundary guided training (Cui et al. 2021): a naturally trained teacher, trained at the same time.

    The model's logits at the adversarial point are to be the teacher's at the clean input. The attack ascends the
    model's own divergence as in `TRADES`, also with beta 0.

    Args:
        teacher: maps inputs to logits (B, K) of as many classes, on the model's device. It learns from the labels and,
            through the pairing, from the model; the model alone is what a run leaves behind, the teacher lies in its
            checkpoints.
        beta: weight of TRADES' divergence; 0 or 6 in the paper. With 0 the model learns of the labels through the
            teacher alone.

    A weighting weighs what the model pays: every sample teaches the teacher.

    What we do differently: the model is attacked in the mode that training chooses. With beta 0 it has no clean forward
    in train mode, so that its batch-norm statistics see adversarial batches alone.
    """

    def __init__(self, teacher: nn.Module, beta: float = 0.0) -> None:
        super().__init__()
        checks.at_least("beta", beta, 0)
        self.teacher, self.beta = teacher, beta

    @property
    def ascends_divergence(self) -> bool:
        """Always."""
        return True

    def compute(self, step: Step, x_adv: Tensor) -> LossTerms:
        """mean((z(x_adv) - t(x))^2) + CE(t(x), y) + beta * KL(p(x) || p(x_adv)), gradients into both networks."""
        taught, adversarial = self.teacher(step.x), step.model(x_adv)
        if taught.shape != adversarial.shape:
            came, wanted = tuple(taught.shape), tuple(adversarial.shape)
            raise checks.InputError(f"teacher: returned shape {came}: must be the model's, {wanted}")
        paid, clean = (adversarial - taught).square().mean(1), None
        if self.beta:
            clean = step.model(step.x)
            paid = paid + self.beta * losses.kl_divergence(clean, adversarial)
        return LossTerms(paid, clean, adversarial, unweighted=losses.cross_entropy(taught, step.y))


@dataclass(frozen=True)
class MaxMargin(Objective):
    """Max-margin training (MMA; Ding et al. 2020): cross-entropy where the boundary is, if it is near.

    Goes with radius `ShortestSuccessful`, which finds the boundary, and `attack.loss=soft_margin_loss`. With another
    radius every adversarial point counts as near.

    Args:
        share: of the clean cross-entropy, paid for every sample besides, in [0, 1]; 1/3 in the paper, 0 is its OMMA.

    A sample that is right at the clean input (by the soft margin, which asks for more than half of the probability)
    pays at its boundary, and nothing where that lies beyond the radius' maximum; one that is wrong pays at the clean
    input. A weighting weighs these, and not the clean share.

    What we do differently: which samples are right is read from the clean forward that is paid for, in train mode;
    where the radius policy, in the attack's mode, thinks otherwise, its point is the clean input.
    """

    share: float = 1 / 3

    def __post_init__(self) -> None:
        """Refuse what is no share (`InputError`)."""
        checks.share("share", self.share)

    def compute(self, step: Step, x_adv: Tensor) -> LossTerms:
        """(1 - share) * (CE(z(x_adv), y) if right and near, CE(z(x), y) if wrong, else 0) + share * CE(z(x), y)."""
        clean, adversarial = step.model(step.x), step.model(x_adv)
        right = losses.soft_margin_loss(clean, step.y) < 0
        here, there = losses.cross_entropy(clean, step.y), losses.cross_entropy(adversarial, step.y)
        if step.near is not None:
            there = torch.where(step.near, there, 0)
        margin = torch.where(right, there, here)
        return LossTerms((1 - self.share) * margin, clean, adversarial, unweighted=self.share * here)
