"""Radius policies: how far may each of these inputs be moved?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from wideberth import checks, geometry, losses
from wideberth.attacks import Adversarial
from wideberth.modes import lent
from wideberth.training.batch import BatchContext, TrainingPoints
from wideberth.training.sample_state import SampleState
from wideberth.training.schedules import Schedule, not_negative, value_at


class Radius(SampleState, ABC):
    """How far each input may be moved; a new policy is one subclass with a `propose`.

    A policy that learns declares `self.add_sample_state("radii", fill=...)` in `__init__`, and reads and writes
    `self.radii[batch.index]`.
    """

    radii: Tensor
    """(N,) learned radius per data-set index; (0,) for policies that learn none."""

    needs_adversary = False
    """Whether the policy learns from the logits at the adversarial points, which not every objective computes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("radii", torch.zeros(0))

    @abstractmethod
    def propose(self, batch: BatchContext) -> Tensor:
        """The radius of each sample of the batch, (B,) >= 0."""

    def adjust(self, batch: BatchContext, found: Adversarial) -> TrainingPoints:
        """The points to train on, given the attack's result; by default the points that the attack found."""
        del batch
        return TrainingPoints(found.x, found)

    def observe(self, batch: BatchContext, adversarial_logits: Tensor) -> None:
        """Learn from the logits (B, K) at the points of training, which the objective has computed anyway."""

    def eval_eps(self) -> float:
        """The one radius at which held-out rows are attacked during training; 0: they are not attacked."""
        return 0.0


class Zero(Radius):
    """No perturbation: standard training."""

    def propose(self, batch: BatchContext) -> Tensor:
        """Zeros, (B,)."""
        return torch.zeros(len(batch.y), device=batch.x.device)


class Fixed(Radius):
    """The same radius for every sample (Madry et al. 2018), with an optional linear ramp from 0.

    Args:
        eps: the radius, in units of the input, or a `Schedule` of the epoch.
        warmup: epochs over which it rises linearly from 0 to `eps`.
    """

    def __init__(self, eps: float | Schedule = 8 / 255, warmup: float = 0) -> None:
        super().__init__()
        not_negative("eps", eps)
        checks.at_least("warmup", warmup, 0)
        self.eps, self.warmup = eps, warmup

    def propose(self, batch: BatchContext) -> Tensor:
        """The radius of the moment, (B,)."""
        ramp = min(1.0, batch.progress / self.warmup) if self.warmup else 1.0
        return torch.full((len(batch.y),), ramp * value_at(self.eps, batch.progress), device=batch.x.device)

    def eval_eps(self) -> float:
        """The final radius."""
        return value_at(self.eps, float("inf"))


class ClassWise(Radius):
    """One radius per class, with an optional linear ramp from 0.

    Xu et al. 2021 ("To be robust or to be fair") adjust such radii during training; here they are given and fixed.

    Args:
        eps: the radii of class 0, 1, ..., in units of the input.
        warmup: epochs over which they rise linearly from 0.
    """

    def __init__(self, eps: Sequence[float], warmup: float = 0) -> None:
        super().__init__()
        self.eps, self.warmup = [float(radius) for radius in eps], warmup
        if len(self.eps) < 2:
            raise checks.InputError(f"eps={self.eps}: must be one radius per class, at least 2")
        for place, radius in enumerate(self.eps):
            checks.at_least(f"eps[{place}]", radius, 0)
        checks.at_least("warmup", warmup, 0)
        self.register_buffer("by_class", torch.tensor(self.eps), persistent=False)
        self.by_class: Tensor
        self._fits = False

    def allocate(self, size: int) -> None:
        """Check the number of classes again: the model may be another than in an earlier run."""
        super().allocate(size)
        self._fits = False

    def propose(self, batch: BatchContext) -> Tensor:
        """The radius of each sample's class at the moment, (B,)."""
        if not self._fits:  # checked once: on a GPU, a label beyond the last radius would fail without a message
            with lent(batch.model), torch.no_grad():
                classes = batch.model(batch.x[:1]).shape[1]
            if classes != len(self.eps):
                raise checks.InputError(f"eps: {len(self.eps)} radii, the model has {classes} classes: one for each")
            self._fits = True
        ramp = min(1.0, batch.progress / self.warmup) if self.warmup else 1.0
        return ramp * self.by_class[batch.y]

    def eval_eps(self) -> float:
        """The largest: a sample that is robust there is robust at the radius of its class."""
        return max(self.eps)


def simple_update(radius: Tensor, adversarial: Tensor, gamma: float) -> Tensor:
    """The simple rule of IAAT, (B,) >= 0: radius - gamma where the attack succeeded, radius + gamma where it failed."""
    return (radius + torch.where(adversarial, -gamma, gamma)).clamp_min(0)


def lookahead_update(radius: Tensor, robust_now: Tensor, robust_further: Tensor, gamma: float, beta: float) -> Tensor:
    """The authors' three-way rule of IAAT: (1 - beta) * radius + beta * target, (B,).

    The target is radius + gamma if the attack failed there, else radius if the attack failed there, else
    radius - gamma, at which no attack is made; never below 0.
    """
    target = torch.where(robust_further, radius + gamma, torch.where(robust_now, radius, radius - gamma))
    return torch.lerp(radius, target.clamp_min(0), beta)


class InstanceAdaptive(Radius):
    """Instance-adaptive radii (IAAT; Balaji, Goldstein and Hoffman 2019): each sample learns its own radius.

    A radius grows while attacks at it fail and shrinks when they succeed. Samples near the decision boundary are
    therefore trained at small radii, samples far from it at large radii.

    Args:
        eps: the radius of every sample in the first `warmup` epochs, and the initial radius afterwards.
        rule: "simple": one attack a step; the radius changes by +-`gamma`, depending on whether the objective's own
            forward at the adversarial point was wrong. "lookahead": the authors' code; two more attacks, at the radius
            and at radius + `gamma`, and a step of `beta` towards the larger one that failed. Use it with their
            per-sample step size, `attack.step_size = ScaledStep(2, floor=2/255)`.
        gamma: the change of a radius at a visit (times `beta` for lookahead), in units of the input.
        beta: the share of the new value in the moving average (lookahead; and "decay").
        warmup: epochs at the uniform radius.
        maximum: upper limit of a radius; None: no limit.
        misclassified: the treatment of a sample whose *clean* input is misclassified. "clean": as in Algorithm 1 of
            the paper, it is trained on the clean input, and its radius changes as after a successful attack. "decay":
            as in the authors' code, its radius shrinks by the factor 1 - `beta` and it is attacked at that; in the
            warm-up its radius is 0.

    What we do differently: the paper does not give the initial radius; with "clean" it is `eps`, also for samples
    misclassified in the warm-up (with "decay" those start at 0, as in the authors' code). The authors evaluate all
    this in train mode, which updates batch-norm statistics 34 times a step; we use the attack's mode.
    """

    needs_adversary = True

    def __init__(
        self,
        eps: float = 8 / 255,
        rule: Literal["simple", "lookahead"] = "simple",
        gamma: float = 1.9 / 255,
        beta: float = 0.1,
        warmup: int = 10,
        maximum: float | None = None,
        misclassified: Literal["clean", "decay"] = "clean",
    ) -> None:
        super().__init__()
        checks.choice("rule", rule, ("simple", "lookahead"))
        checks.choice("misclassified", misclassified, ("clean", "decay"))
        for name, value in (("eps", eps), ("gamma", gamma), ("warmup", warmup), ("maximum", maximum)):
            if value is not None:
                checks.at_least(name, value, 0)
        checks.share("beta", beta)
        if maximum is not None and maximum < eps:
            raise checks.InputError(f"maximum={maximum}: below eps={eps}, where every radius starts")
        self.eps, self.rule, self.gamma, self.beta = eps, rule, gamma, beta
        self.warmup, self.maximum, self.misclassified = warmup, maximum, misclassified
        self.add_sample_state("radii", fill=float(eps))

    def eval_eps(self) -> float:
        """The radius of the warm-up."""
        return self.eps

    def propose(self, batch: BatchContext) -> Tensor:
        """The radius of each sample of the batch, (B,); the lookahead rule updates the radii first."""
        correct, clean = batch.correct, self.misclassified == "clean"
        if batch.epoch < self.warmup:
            uniform = torch.full_like(self.radii[batch.index], self.eps)
            eps = torch.where(correct, uniform, 0)
            if not clean:
                self.radii[batch.index] = eps
            return eps
        radius = self.radii[batch.index]
        moved = self._lookahead(batch, radius) if self.rule == "lookahead" else radius
        if not clean:
            moved = torch.where(correct, moved, (1 - self.beta) * radius)
        self._remember(batch, moved)
        return torch.where(correct, self.radii[batch.index], 0) if clean else self.radii[batch.index]

    def observe(self, batch: BatchContext, adversarial_logits: Tensor) -> None:
        """The simple rule: the radius shrinks where the objective's forward was wrong, and grows where it was right."""
        if self.rule != "simple" or batch.epoch < self.warmup:
            return
        radius = self.radii[batch.index]
        adversarial = losses.misclassified(adversarial_logits.detach(), batch.y) | ~batch.correct
        moved = simple_update(radius, adversarial, self.gamma)
        if self.misclassified == "decay":  # `propose` has changed those already
            moved = torch.where(batch.correct, moved, radius)
        self._remember(batch, moved)

    def _lookahead(self, batch: BatchContext, radius: Tensor) -> Tensor:
        now = batch.attack(radius, "lookahead now", check_success=True).success
        further = batch.attack(radius + self.gamma, "lookahead further", check_success=True).success
        assert now is not None
        assert further is not None
        # A misclassified clean input is robust nowhere, even where an attack happens to make it right.
        return lookahead_update(radius, batch.correct & ~now, batch.correct & ~further, self.gamma, self.beta)

    def _remember(self, batch: BatchContext, radius: Tensor) -> None:
        self.radii[batch.index] = radius if self.maximum is None else radius.clamp_max(self.maximum)


class ShortestSuccessful(Radius):
    """The shortest successful perturbation (MMA; Ding et al. 2020): samples are moved to the boundary, and no further.

    The attack, at the distance where the boundary was found at the last visit, gives a direction; along that direction
    bisection finds the point at which the soft margin is zero. Use it with `attack.loss=soft_margin_loss` and objective
    `MaxMargin`.

    Args:
        maximum: the margin that is enough: `MaxMargin` has no loss at a boundary further away
            (`TrainingPoints.near_boundary` is False). The search ends at 1.05 times as much.
        minimum: the least radius of the attack, which the first visit uses.
        bisections: points that are tried along the direction, a forward each; the first is the one that the attack
            found.

    The learned radius is the distance found, 0 where the clean input is misclassified by the soft margin; such a
    sample is trained on as it is.

    What we do differently: directions have unit length in the attack's norm, so that the learned value is a length,
    where theirs are divided by the radius of the attack; bisection runs in the attack's mode with frozen weights,
    where theirs updates batch-norm statistics and builds a graph; the points lie in the box, where theirs are clipped
    during the search alone; misclassified rows stay in the batch at radius 0, where theirs are taken out of it.
    """

    def __init__(self, maximum: float = 12 / 255, minimum: float = 0.005, bisections: int = 10) -> None:
        super().__init__()
        checks.at_least("maximum", maximum, 0)
        checks.at_least("bisections", bisections, 1)
        if not 0 < minimum <= maximum:
            raise checks.InputError(f"minimum={minimum}: must be in (0, maximum={maximum}]; at 0 nothing is found")
        self.maximum, self.minimum, self.bisections = maximum, minimum, bisections
        self.add_sample_state("radii", fill=0.0)  # not found yet

    def eval_eps(self) -> float:
        """The maximum, at which every sample is to be robust."""
        return self.maximum

    def propose(self, batch: BatchContext) -> Tensor:
        """The distance of the last visit, at least the minimum; 0 where the clean input is misclassified, (B,)."""
        return torch.where(self._correct(batch), self.radii[batch.index].clamp_min(self.minimum), 0)

    def adjust(self, batch: BatchContext, found: Adversarial) -> TrainingPoints:
        """The boundary points in the directions of the attack's points, in the box; their distances are learned."""
        x = batch.x
        delta = found.x.to(torch.promote_types(x.dtype, torch.float32)) - x
        distance = geometry.norm(delta, batch.norm)
        unit = delta / geometry.column(torch.where(distance > 0, distance, 1), x)

        def at(distance: Tensor) -> Tensor:
            return geometry.inward(x, geometry.column(distance, x) * unit).clamp(*batch.box)

        low, high = torch.zeros_like(distance), torch.full_like(distance, 1.05 * self.maximum)
        distance = torch.minimum(distance, high)
        with lent(batch.model, batch.attack_mode), torch.no_grad():
            for _ in range(self.bisections):
                robust = losses.soft_margin_loss(batch.model(at(distance)), batch.y) < 0
                low, high = torch.where(robust, distance, low), torch.where(robust, high, distance)
                distance = (low + high) / 2
        correct = self._correct(batch)
        distance = torch.where(correct, distance, 0)
        self.radii[batch.index] = distance.to(self.radii.dtype)
        points = geometry.choose(correct, at(distance), x)
        return TrainingPoints(points, found, near_boundary=distance < self.maximum)

    def _correct(self, batch: BatchContext) -> Tensor:
        return losses.soft_margin_loss(batch.clean_logits, batch.y) < 0
