"""Objectives: the loss of each sample at the clean and the adversarial points."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from wideberth import checks, losses
from wideberth.losses import Loss, TrainingLoss
from wideberth.training.batch import BatchContext, TrainingPoints


@dataclass(frozen=True)
class LossTerms:
    """The losses of a batch, and the logits (B, K) that the objective computed for them (None: not computed).

    Attributes:
        losses: (B,) per sample, with graph: the term that a weighting weights.
        clean_logits: at the clean inputs, in train mode.
        adversarial_logits: at the adversarial inputs, in train mode.
        unweighted: (B,) per sample, with graph: a term that no weighting changes; None: there is none.
    """

    losses: Tensor
    clean_logits: Tensor | None = None
    adversarial_logits: Tensor | None = None
    unweighted: Tensor | None = None

    def total(self, weights: Tensor) -> Tensor:
        """The loss of each sample, (B,), with the samples' weights (B,)."""
        weighted = weights * self.losses
        return weighted if self.unweighted is None else weighted + self.unweighted

    def detached(self) -> LossTerms:
        """The same values without graph."""
        parts = (self.losses, self.clean_logits, self.adversarial_logits, self.unweighted)
        return LossTerms(*(None if part is None else part.detach() for part in parts))  # type: ignore[arg-type]


class Objective(ABC):
    """The losses of a batch; a new objective is one subclass with a `compute`."""

    adversarial = True
    """Whether it uses adversarial points at all."""

    @property
    def ascends_divergence(self) -> bool:
        """Whether the attack maximises KL(clean || adversarial), which has no gradient at the clean input."""
        return False

    def attack_loss(self, batch: BatchContext) -> Loss | None:
        """The loss that the attack maximises; None: the attack's own."""
        if not self.ascends_divergence:
            return None
        clean = batch.clean_logits
        return lambda logits, y: losses.kl_divergence(clean, logits)

    @abstractmethod
    def compute(self, batch: BatchContext, points: TrainingPoints) -> LossTerms:
        """The losses of a batch; `points.x` is (B, ...), the clean inputs where no attack was made."""


@dataclass(frozen=True)
class CleanCrossEntropy(Objective):
    """Cross-entropy on the clean inputs: standard training.

    Args:
        loss: used in place of cross-entropy; (logits, y) -> (B,).
    """

    loss: TrainingLoss = losses.cross_entropy

    adversarial = False

    def compute(self, batch: BatchContext, points: TrainingPoints) -> LossTerms:
        """CE(z(x), y)."""
        logits = batch.model(batch.x)
        return LossTerms(self.loss(logits, batch.y), clean_logits=logits)


@dataclass(frozen=True)
class AdversarialCrossEntropy(Objective):
    """Cross-entropy on the adversarial inputs alone (Madry et al. 2018); with radius zero, standard training.

    Args:
        loss: used in place of cross-entropy; (logits, y) -> (B,). The attack still maximises its own loss.
    """

    loss: TrainingLoss = losses.cross_entropy

    def compute(self, batch: BatchContext, points: TrainingPoints) -> LossTerms:
        """CE(z(x_adv), y)."""
        logits = batch.model(points.x)
        return LossTerms(self.loss(logits, batch.y), adversarial_logits=logits)


@dataclass(frozen=True)
class TRADES(Objective):
    """Clean cross-entropy plus beta * KL(clean || adversarial) (Zhang et al. 2019).

    Args:
        beta: weight of the KL term (1/lambda of the paper); 6 on CIFAR, 1 on MNIST.
        inner: the loss that the attack maximises. "kl": the KL term, as TRADES does. "attack": the attack's own loss,
            as TRADES-EMR does (cross-entropy there).
        loss: used in place of the clean cross-entropy; (logits, y) -> (B,).

    A weighting applies to the KL term alone, as in MAIL-TRADES; the clean term has weight 1.

    What we do differently: one clean forward serves both terms, where the original makes two; batch-norm statistics
    are updated by one clean and one adversarial forward. The constant p(x) of the attack's loss is computed once a
    batch.
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
        """True unless the attack maximises its own loss."""
        return self.inner == "kl"

    def compute(self, batch: BatchContext, points: TrainingPoints) -> LossTerms:
        """CE(z(x), y) + beta * KL(p(x) || p(x_adv)), gradients through both arguments."""
        clean, adversarial = batch.model(batch.x), batch.model(points.x)
        drift = self.beta * losses.kl_divergence(clean, adversarial)
        return LossTerms(drift, clean, adversarial, unweighted=self.loss(clean, batch.y))


@dataclass(frozen=True)
class MART(Objective):
    """Misclassification-aware training (Wang et al. 2020): boosted cross-entropy, and KL where the clean input is hard.

    The first term raises the label's probability at the adversarial point and lowers that of the likeliest wrong
    class; the second is TRADES' divergence times the probability that the clean prediction gives to the wrong classes.

    Args:
        beta: weight of the KL term; 5 for a ResNet-18, 6 for a WRN-34-10.

    A weighting applies to the first term alone, as in MAIL-MART.

    What we do differently: the small constants that the original adds to its probabilities (1e-12, 1e-7) are not needed
    where 1 - p is a sum of the other probabilities and log p comes from the logits; the 1e-4 added to 1 - p of the
    likeliest wrong class, which bounds that term, is kept. Computed in float32 at least, since half precision cannot
    hold these values.
    """

    beta: float = 5.0

    def __post_init__(self) -> None:
        """Refuse a negative weight (`InputError`)."""
        checks.at_least("beta", self.beta, 0)

    def compute(self, batch: BatchContext, points: TrainingPoints) -> LossTerms:
        """BCE(p(x_adv), y) + beta * KL(p(x) || p(x_adv)) * (1 - p_y(x)), gradients through all of it."""
        clean, adversarial = wide(batch.model(batch.x)), wide(batch.model(points.x))
        rival = losses.likeliest(adversarial.detach(), batch.y)[:, :1]
        boosted = losses.cross_entropy(adversarial, batch.y) - (1e-4 + all_but(adversarial.softmax(1), rival)).log()
        doubt = all_but(clean.softmax(1), batch.y[:, None])
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
    """Adversarial logit pairing (Kannan, Kurakin and Goodfellow 2018): clean and adversarial logits should agree.

    Args:
        beta: weight of the squared difference of the logits, a mean over the classes; 0.5 in Pang et al. 2020.
        loss: used in place of cross-entropy, in equal parts at both inputs; (logits, y) -> (B,). The attack still
            maximises its own loss.

    A weighting applies to the terms with the adversarial point; the clean term has weight 1.

    What we do differently: every sample of the batch is paired with its own adversarial point and the losses are means
    over samples, as in the code of Pang et al. 2020 (ALP-HE).
    """

    beta: float = 0.5
    loss: TrainingLoss = losses.cross_entropy

    def __post_init__(self) -> None:
        """Refuse a negative weight (`InputError`)."""
        checks.at_least("beta", self.beta, 0)

    def compute(self, batch: BatchContext, points: TrainingPoints) -> LossTerms:
        """CE(z(x), y) / 2 + CE(z(x_adv), y) / 2 + beta * mean((z(x) - z(x_adv))^2), gradients through both logits."""
        clean, adversarial = batch.model(batch.x), batch.model(points.x)
        there = self.loss(adversarial, batch.y) / 2 + self.beta * (clean - adversarial).square().mean(1)
        return LossTerms(there, clean, adversarial, unweighted=self.loss(clean, batch.y) / 2)


class LBGAT(nn.Module, Objective):
    """Learnable boundary guided training (Cui et al. 2021): a naturally trained teacher, trained at the same time.

    The model's logits at the adversarial point should equal the teacher's at the clean input. The attack maximises the
    model's own divergence as in `TRADES`, also with beta 0.

    Args:
        teacher: maps inputs to logits (B, K) of as many classes, on the model's device. It learns from the labels and,
            through the pairing, from the model. A run exports the model alone; the teacher is in its checkpoints.
        beta: weight of TRADES' divergence; 0 or 6 in the paper. With 0 the model learns the labels through the teacher
            alone.

    A weighting applies to the model's terms; the teacher's loss has weight 1.

    What we do differently: the model is attacked in the mode that training chooses. With beta 0 it has no clean forward
    in train mode, so that only adversarial batches update its batch-norm statistics.
    """

    def __init__(self, teacher: nn.Module, beta: float = 0.0) -> None:
        super().__init__()
        checks.at_least("beta", beta, 0)
        self.teacher, self.beta = teacher, beta

    @property
    def ascends_divergence(self) -> bool:
        """Always."""
        return True

    def compute(self, batch: BatchContext, points: TrainingPoints) -> LossTerms:
        """mean((z(x_adv) - t(x))^2) + CE(t(x), y) + beta * KL(p(x) || p(x_adv)), gradients into both networks."""
        target, adversarial = self.teacher(batch.x), batch.model(points.x)
        if target.shape != adversarial.shape:
            came, wanted = tuple(target.shape), tuple(adversarial.shape)
            raise checks.InputError(f"teacher: returned shape {came}: must be the model's, {wanted}")
        paired, clean = (adversarial - target).square().mean(1), None
        if self.beta:
            clean = batch.model(batch.x)
            paired = paired + self.beta * losses.kl_divergence(clean, adversarial)
        return LossTerms(paired, clean, adversarial, unweighted=losses.cross_entropy(target, batch.y))


@dataclass(frozen=True)
class MaxMargin(Objective):
    """Max-margin training (MMA; Ding et al. 2020): cross-entropy at the decision boundary, where that is near.

    Use it with radius `ShortestSuccessful`, which finds the boundary, and `attack.loss=soft_margin_loss`. With another
    radius every adversarial point counts as near.

    Args:
        share: of the clean cross-entropy, added for every sample, in [0, 1]; 1/3 in the paper, 0 is its OMMA.

    A sample that is correct at the clean input (by the soft margin: its probability is above one half) has its loss at
    its boundary point, and none where the boundary lies beyond the radius' maximum; a misclassified one has its loss at
    the clean input. A weighting applies to these, and not to the clean share.

    What we do differently: whether a sample is correct is read from the clean forward of the loss, in train mode; where
    the radius policy, in the attack's mode, decides otherwise, its point is the clean input.
    """

    share: float = 1 / 3

    def __post_init__(self) -> None:
        """Refuse a number outside [0, 1] (`InputError`)."""
        checks.share("share", self.share)

    def compute(self, batch: BatchContext, points: TrainingPoints) -> LossTerms:
        """(1 - share) * (CE(z(x_adv), y) if correct and near, CE(z(x), y) if wrong, else 0) + share * CE(z(x), y)."""
        clean, adversarial = batch.model(batch.x), batch.model(points.x)
        correct = losses.soft_margin_loss(clean, batch.y) < 0
        here, there = losses.cross_entropy(clean, batch.y), losses.cross_entropy(adversarial, batch.y)
        if points.near_boundary is not None:
            there = torch.where(points.near_boundary, there, 0)
        margin = torch.where(correct, there, here)
        return LossTerms((1 - self.share) * margin, clean, adversarial, unweighted=self.share * here)
