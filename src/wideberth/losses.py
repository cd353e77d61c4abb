"""Per-sample losses on logits: each maps logits (B, K) and labels (B,) int64 to (B,), higher = more wrong.

The same functions train, attack and measure. They are plain callables, so an attack's `loss` is any of them or the
user's own. Nothing here reduces over the batch: the one `mean` stands at the end of the training loop. Inside an
attack the losses are summed, so that row i of the gradient belongs to sample i alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from wideberth import checks
from wideberth.checks import InputError

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, K), labels (B,)) -> (B,), to be increased by an attack."""

TargetedLoss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (B, K), labels (B,), targets (B,)) -> (B,), higher = closer to being taken for the target."""


class ParametricLoss(ABC):
    """A loss with hyper-parameters; a new one is one subclass with a `__call__`."""

    @abstractmethod
    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss of logits (B, K) with labels (B,), (B,)."""


TrainingLoss: TypeAlias = Loss | ParametricLoss
"""What an objective may pay. Every parametric loss is a `Loss`; named apart, it can be configured in YAML."""

SATURATED = 10.0
"""A logit margin beyond which the softmax is so near its corner that float32 keeps few digits of the way down."""
_TINY = 1e-12


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy to the label, (B,) >= 0."""
    return F.cross_entropy(logits, y, reduction="none")


@dataclass(frozen=True)
class LabelSmoothing(ParametricLoss):
    """Cross-entropy to a target that leaves part of its mass to the wrong classes (Szegedy et al. 2016).

    Args:
        share: of the mass that the wrong classes have together, equal parts for each, in [0, 1]. In adversarial
            training about 0.2 helps and more than 0.3 may hurt (Pang et al. 2021, "Bag of tricks").

    What we do differently: as in "Bag of tricks" the wrong classes have share / (K - 1) each and the label the rest;
    torch's own `label_smoothing` gives share / K to all K classes, so that its 0.2 with ten classes is 0.18 here. It is
    for training; the attack goes on ascending the loss it is given.
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        """Refuse what is no share (`InputError`)."""
        checks.share("share", self.share)

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss of logits (B, K) with labels (B,), (B,) >= 0."""
        surprise = -F.log_softmax(logits, dim=1)
        label = _at(surprise, y)
        wrong = (surprise.sum(1) - label) / (logits.shape[1] - 1)
        return (1 - self.share) * label + self.share * wrong


@dataclass(frozen=True)
class AdditiveMargin(ParametricLoss):
    """Cross-entropy with the label's cosine made smaller by a margin (AM-softmax; Wang et al. 2018).

    With a `CosineHead` it is the loss of hypersphere embedding (Pang et al. 2020), in any objective.

    Args:
        margin: taken from the label's cosine, >= 0.
        scale: of the logits, >= 0: those of the head that it goes with, which are scale * cosine.

    What we do differently: the head returns scaled cosines, so that an attack with another loss sees the logits that
    the model is used with; in the original, whose models return bare cosines, it would see a flat softmax.
    """

    margin: float = 0.2
    scale: float = 15.0

    def __post_init__(self) -> None:
        """Refuse negative numbers (`InputError`)."""
        checks.at_least("margin", self.margin, 0)
        checks.at_least("scale", self.scale, 0)

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss of logits (B, K) with labels (B,), (B,) >= 0."""
        label = F.one_hot(y, logits.shape[1]).to(logits.dtype)
        return cross_entropy(logits - self.scale * self.margin * label, y)


def center_distance(logits: Tensor, y: Tensor) -> Tensor:
    """Minus the label's logit, (B,): the Max-Mahalanobis center loss (Pang et al. 2020).

    Of a `MahalanobisHead` it is scale * ||h - mu_y||^2, >= 0. Alone it says nothing of the other classes: without a
    head whose centres stand still, it can fall without end.
    """
    return -_at(logits, y)


def kl_divergence(clean_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(logits)), (B,) >= 0, differentiable in both arguments (TRADES, MART).

    Written on log-probabilities, so that an exact zero in either distribution gives no NaN.
    """
    clean = F.log_softmax(clean_logits, dim=1)
    return (clean.exp() * (clean - F.log_softmax(logits, dim=1))).sum(1)


def _others(logits: Tensor, y: Tensor) -> Tensor:
    """The logits with the label's own at minus infinity, (B, K)."""
    return logits.scatter(1, y[:, None], float("-inf"))


def _at(values: Tensor, y: Tensor) -> Tensor:
    return values.gather(1, y[:, None]).squeeze(1)


def logit_margin(logits: Tensor, y: Tensor) -> Tensor:
    """Logit of the label minus the largest other, (B,): positive exactly where the label is predicted."""
    return _at(logits, y) - _others(logits, y).amax(1)


def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Minus the logit margin, (B,): positive exactly where misclassified (Carlini and Wagner's loss)."""
    return -logit_margin(logits, y)


def soft_margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Log-sum-exp of the other logits minus the label's, (B,): the smooth margin of MMA training, >= `margin_loss`."""
    return _others(logits, y).logsumexp(1) - _at(logits, y)


def probability_margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Largest other probability minus the label's, (B,) in [-1, 1] (the probability margin attack; MAIL's PM)."""
    return margin_loss(logits.softmax(1), y)


def unsaturated_margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """The probability margin, and the logit margin where the former is flat, (B,) <= 1, rising throughout.

    Where the label leads by more than `SATURATED`, its probability is 1 to within a few roundings of float32, and of
    its slope little or nothing is left; an attack that follows it there stands still.
    """
    margin = margin_loss(logits, y)
    return torch.where(margin < -SATURATED, margin + SATURATED - 1, probability_margin_loss(logits, y))


def dlr_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein 2020), (B,): scale-free margin over the spread of the top three.

    Raises:
        InputError: with fewer than 3 classes, where the ratio is not defined.
    """
    if logits.shape[1] < 3:
        raise InputError(f"dlr_loss: needs at least 3 classes, the model has {logits.shape[1]}; use margin_loss")
    top = logits.topk(3, dim=1).values
    return margin_loss(logits, y) / (top[:, 0] - top[:, 2] + _TINY)


def targeted_cross_entropy(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Log-probability of the target, (B,) <= 0."""
    del y  # the target alone matters; the signature is that of every targeted loss
    return -cross_entropy(logits, target)


def targeted_margin_loss(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Logit of the target minus the label's, (B,)."""
    return _at(logits, target) - _at(logits, y)


def targeted_probability_margin_loss(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Probability of the target minus the label's, (B,) in [-1, 1]."""
    return targeted_margin_loss(logits.softmax(1), y, target)


def targeted_dlr_loss(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted difference of logits ratio (Croce and Hein 2020), (B,).

    Raises:
        InputError: with fewer than 4 classes, where the ratio is not defined.
    """
    if logits.shape[1] < 4:
        raise InputError(f"targeted dlr_loss: needs at least 4 classes, the model has {logits.shape[1]}")
    top = logits.topk(4, dim=1).values
    spread = top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _TINY
    return targeted_margin_loss(logits, y, target) / spread


_TARGETED: dict[Loss, TargetedLoss] = {
    cross_entropy: targeted_cross_entropy,
    margin_loss: targeted_margin_loss,
    probability_margin_loss: targeted_probability_margin_loss,
    dlr_loss: targeted_dlr_loss,
}


def towards(loss: Loss) -> TargetedLoss:
    """The form of a loss that steers from the label to a target; of a loss of the user's own, minus it there."""
    known = _TARGETED.get(loss)
    return (lambda logits, y, target: -loss(logits, target)) if known is None else known


def likeliest(logits: Tensor, y: Tensor) -> Tensor:
    """The classes other than the label, by falling logit, (B, K - 1) int64; ties in the order of the classes."""
    return _others(logits, y).argsort(dim=1, descending=True, stable=True)[:, :-1]


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Whether the label is not the predicted class, (B,) bool; a tie for first place counts as misclassified.

    `argmax` would give a tie to the lower index, so that a model with constant logits looked fully robust on
    class 0; a verdict must not hang on that.
    """
    return ~(logit_margin(logits, y) > 0)


def predictions(logits: Tensor) -> Tensor:
    """The predicted class, (B,) int64."""
    return torch.argmax(logits, dim=1)
