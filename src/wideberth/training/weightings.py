"""Weightings: how much each sample counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from wideberth import checks, losses
from wideberth.training.batch import BatchContext, TrainingPoints
from wideberth.training.objectives import LossTerms


class Weighting(ABC):
    """How much each sample counts; a new weighting is one subclass with a `compute`."""

    needs_adversary = False
    """Whether the weights depend on the logits at the adversarial points, which not every objective computes."""

    needs_attack = False
    """Whether the weights depend on the attack's result, so that an attack must be made."""

    @abstractmethod
    def compute(self, batch: BatchContext, points: TrainingPoints, terms: LossTerms) -> Tensor:
        """The weight of each sample's loss, (B,), without graph.

        Args:
            batch: the batch before the attack.
            points: the points that it is trained on, with the attack's result.
            terms: the objective's losses and logits there.
        """


@dataclass(frozen=True)
class Uniform(Weighting):
    """Every sample counts the same."""

    def compute(self, batch: BatchContext, points: TrainingPoints, terms: LossTerms) -> Tensor:
        """Ones, (B,)."""
        return torch.ones_like(terms.losses)


def of_mean_one(log_weights: Tensor) -> Tensor:
    """exp(log_weights) over their mean, (B,); never 0/0, however small the weights are."""
    return len(log_weights) * log_weights.softmax(0)


@dataclass(frozen=True)
class MAIL(Weighting):
    """Margin-aware instance reweighting (MAIL; Wang, Liu et al. 2021): samples near the boundary count more.

    The weight is a sigmoid of slope * (PM + bias), where PM is the largest wrong probability minus the label's at the
    adversarial point, in [-1, 1], positive where misclassified.

    Args:
        slope: of the sigmoid, >= 0; 10 for MAIL-AT, 2 for MAIL-TRADES.
        bias: -0.5 for MAIL-AT, 0 for MAIL-TRADES.
        start: the first epoch (0-based) with weights; before it every sample counts 1. In the authors' runs it is one
            after the first drop of the learning rate.
        form: "released": three times the sigmoid, as the authors' code does; the mean weight is not 1, and with it the
            effective learning rate changes at `start` (see `weight_mean` of metrics.csv). "paper": the sigmoid over
            its mean in the batch.

    What we do differently: nothing in the released form, except that any number of classes is accepted.
    """

    slope: float = 10.0
    bias: float = -0.5
    start: int = 76
    form: Literal["released", "paper"] = "released"

    needs_adversary = True

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        checks.at_least("slope", self.slope, 0)
        checks.at_least("start", self.start, 0)
        checks.choice("form", self.form, ("released", "paper"))

    def compute(self, batch: BatchContext, points: TrainingPoints, terms: LossTerms) -> Tensor:
        """The weights, (B,): in (0, 3), or of mean 1."""
        logits = terms.adversarial_logits
        if logits is None:
            raise checks.InputError(
                "weighting=MAIL: the objective returned no adversarial logits, on which the weights depend"
            )
        if batch.epoch < self.start:
            return torch.ones_like(terms.losses)
        scores = self.slope * (losses.probability_margin_loss(logits.detach(), batch.y) + self.bias)
        return 3 * scores.sigmoid() if self.form == "released" else of_mean_one(F.logsigmoid(scores))


@dataclass(frozen=True)
class GAIRAT(Weighting):
    """Geometry-aware instance reweighting (GAIRAT; Zhang et al. 2021): samples that an attack flips sooner count more.

    The weight is (1 + tanh(shift + 5 (1 - 2 k / S))) / 2 over its mean in the batch, where k of the attack's S iterates
    were right before the first that was wrong. The S iterates are those that the attack steps from: the start is one
    of them, the last point is not.

    Args:
        shift: lambda of the paper: the larger, the more alike the weights; infinite: all 1.
        start: the first epoch (0-based) with weights; before it every sample counts 1.

    What we do differently: iterates are counted up to the first wrong one, as in the paper; the authors' code goes on
    counting where a later iterate is right again.
    """

    shift: float = -1.0
    start: int = 60

    needs_attack = True

    def __post_init__(self) -> None:
        """Refuse a negative epoch (`InputError`)."""
        checks.at_least("start", self.start, 0)

    def compute(self, batch: BatchContext, points: TrainingPoints, terms: LossTerms) -> Tensor:
        """The weights, (B,), of mean 1."""
        if points.found is None:
            raise checks.InputError("weighting=GAIRAT: no attack was made, so there are no steps to count")
        if batch.epoch < self.start:
            return torch.ones_like(terms.losses)
        survived = points.found.steps_survived.to(terms.losses.dtype) / points.found.num_iterates
        # (1 + tanh(a)) / 2 is sigmoid(2 a), without the digits that the sum loses.
        return of_mean_one(F.logsigmoid(2 * (self.shift + 5 * (1 - 2 * survived))))
