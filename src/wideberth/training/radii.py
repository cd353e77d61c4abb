"""Radius policies: how far may each of these inputs be moved?

A policy is a module, so that what it remembers per sample lies in buffers: on the model's device, in the checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.modes import lent
from wideberth.training.schedules import Schedule, not_negative, value_at
from wideberth.training.step import Step


class Radius(nn.Module, ABC):
    """How far each input may be moved; a new policy is one subclass with a `propose`."""

    radii: Tensor
    """(N,) radius per data-set index, for policies that remember one; empty for those that do not."""

    needs_adversary = False
    """Whether the policy learns from the logits at the adversarial point, which not every objective computes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("radii", torch.zeros(0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to its device, but not to half precision, in which a radius would not feel its steps."""

        def wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.is_floating_point() and moved.dtype.itemsize < 4 else moved

        super()._apply(wide, recurse)  # type: ignore[no-untyped-call]
        return self

    def allocate(self, size: int) -> None:
        """Make room for what is remembered about `size` samples; called once, before training."""

    @abstractmethod
    def propose(self, step: Step) -> Tensor:
        """The radius of each sample of the batch, (B,) >= 0."""

    def settle(self, step: Step, x_adv: Tensor) -> Tensor:
        """The points to train on, (B, ...), given those that the attack found; most policies take them as they are."""
        del step
        return x_adv

    def observe(self, step: Step, adversarial_logits: Tensor) -> None:
        """Learn from the logits (B, K) at the adversarial points, which the objective has computed anyway."""

    def eval_eps(self) -> float:
        """The radius that the run is judged at while it trains; 0: it is judged on clean inputs alone."""
        return 0.0


class Zero(Radius):
    """No perturbation: standard training."""

    def propose(self, step: Step) -> Tensor:
        """Zeros, (B,)."""
        return torch.zeros(len(step.y), device=step.x.device)


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

    def propose(self, step: Step) -> Tensor:
        """The radius of the moment, (B,)."""
        ramp = min(1.0, step.progress / self.warmup) if self.warmup else 1.0
        return torch.full((len(step.y),), ramp * value_at(self.eps, step.progress), device=step.x.device)

    def eval_eps(self) -> float:
        """The final radius."""
        return value_at(self.eps, float("inf"))


class ClassWise(Radius):
    """One radius per class, with an optional linear ramp from 0: for classes that can bear more than others.

    Xu et al. 2021 ("To be robust or to be fair") adjust such radii while they train; here they are given, and stay.

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
        """Nothing to remember; the model may be another than in an earlier run."""
        del size
        self._fits = False

    def propose(self, step: Step) -> Tensor:
        """The radius of each sample's class at the moment, (B,)."""
        if not self._fits:  # asked once: a label beyond the last radius must not stop a GPU without a word
            with lent(step.model), torch.no_grad():
                classes = step.model(step.x[:1]).shape[1]
            if classes != len(self.eps):
                raise checks.InputError(f"eps: {len(self.eps)} radii, the model has {classes} classes: one for each")
            self._fits = True
        ramp = min(1.0, step.progress / self.warmup) if self.warmup else 1.0
        return ramp * self.by_class[step.y]

    def eval_eps(self) -> float:
        """The largest: what holds there holds at the radius of its class."""
        return max(self.eps)


def simple_update(radius: Tensor, broken: Tensor, gamma: float) -> Tensor:
    """The simple rule of IAAT: radius + gamma where the attack failed, - gamma where it broke the sample, >= 0."""
    return (radius + torch.where(broken, -gamma, gamma)).clamp_min(0)


def lookahead_update(radius: Tensor, holds_now: Tensor, holds_further: Tensor, gamma: float, beta: float) -> Tensor:
    """The authors' three-way rule of IAAT, smoothed: (1 - beta) * radius + beta * the radius that held, (B,).

    What held is radius + gamma if the sample stood there, else radius if it stood there, else radius - gamma, which
    is accepted without being tried; never below 0.
    """
    target = torch.where(holds_further, radius + gamma, torch.where(holds_now, radius, radius - gamma))
    return torch.lerp(radius, target.clamp_min(0), beta)


class InstanceAdaptive(Radius):
    """Instance-adaptive radii (IAAT; Balaji, Goldstein and Hoffman 2019): each sample has its own, and it moves.

    A radius grows while attacks at it fail and shrinks when they succeed, so that samples near the boundary of their
    class are trained at small radii and clear ones at large radii.

    Args:
        eps: the radius of every sample in the first `warmup` epochs, and where it starts from afterwards.
        rule: "simple": one attack a step; +-`gamma` on whether the objective's own forward at the adversarial point
            was wrong. "lookahead": the authors' code; two more attacks, at the radius and at radius + `gamma`, and a
            step of `beta` towards the largest that held. It is to be run with their per-sample step size,
            `attack.step_size = ScaledStep(2, floor=2/255)`.
        gamma: how far a radius may move at a visit (times `beta` for lookahead), in units of the input.
        beta: the share of the new value in the moving average (lookahead; and "decay").
        warmup: epochs at the uniform radius.
        maximum: upper limit of a radius; None: the box is limit enough.
        misclassified: what becomes of a sample whose *clean* input is wrong. "clean": as Algorithm 1 of the paper
            says, it is trained on the clean input, and its radius moves as after a successful attack. "decay": as the
            authors' code does, its radius shrinks by the factor 1 - `beta` and it is attacked at that; in the
            warm-up it is 0.

    What we do differently: the paper does not say how a radius starts; with "clean" it starts at `eps`, also for
    samples misclassified in the warm-up (with "decay" those start at 0, as in the authors' code). The authors judge
    all this in train mode, which moves batch-norm statistics 34 times a step; we judge in the attack's mode.
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

    def allocate(self, size: int) -> None:
        """One radius per sample, all at `eps`."""
        self.radii = torch.full((size,), float(self.eps), device=self.radii.device)

    def eval_eps(self) -> float:
        """The radius of the warm-up."""
        return self.eps

    def propose(self, step: Step) -> Tensor:
        """The radius of each sample of the batch, (B,); with the lookahead rule, after the memory was moved."""
        correct, clean = step.correct, self.misclassified == "clean"
        if step.epoch < self.warmup:
            uniform = torch.full_like(self.radii[step.index], self.eps)
            eps = torch.where(correct, uniform, 0)
            if not clean:
                self.radii[step.index] = eps
            return eps
        radius = self.radii[step.index]
        moved = self._lookahead(step, radius) if self.rule == "lookahead" else radius
        if not clean:
            moved = torch.where(correct, moved, (1 - self.beta) * radius)
        self._remember(step, moved)
        return torch.where(correct, self.radii[step.index], 0) if clean else self.radii[step.index]

    def observe(self, step: Step, adversarial_logits: Tensor) -> None:
        """The simple rule: shrink where the objective's forward was wrong, grow where it was right."""
        if self.rule != "simple" or step.epoch < self.warmup:
            return
        radius = self.radii[step.index]
        broken = losses.misclassified(adversarial_logits.detach(), step.y) | ~step.correct
        moved = simple_update(radius, broken, self.gamma)
        if self.misclassified == "decay":  # those have moved in `propose`
            moved = torch.where(step.correct, moved, radius)
        self._remember(step, moved)

    def _lookahead(self, step: Step, radius: Tensor) -> Tensor:
        now = step.attack(radius, "lookahead now", check_success=True).success
        further = step.attack(radius + self.gamma, "lookahead further", check_success=True).success
        assert now is not None
        assert further is not None
        # What is wrong at the clean input holds nowhere, even where an attack happens to put it right.
        return lookahead_update(radius, step.correct & ~now, step.correct & ~further, self.gamma, self.beta)

    def _remember(self, step: Step, radius: Tensor) -> None:
        self.radii[step.index] = radius if self.maximum is None else radius.clamp_max(self.maximum)


class ShortestSuccessful(Radius):
    """The shortest successful perturbation (MMA; Ding et al. 2020): samples are moved to the boundary, and no further.

    The attack, at the distance where the boundary was found at the last visit, gives a direction; along that bisection
    finds where the soft margin is zero. Goes with `attack.loss=soft_margin_loss` and objective `MaxMargin`.

    Args:
        maximum: the margin that is enough: a boundary further away is not near (`step.near`), and `MaxMargin` does not
            pay there. The search ends at 1.05 times as much.
        minimum: the least radius of the attack, which the first visit uses.
        bisections: points that are tried along the direction, a forward each; the first is the one that the attack
            found.

    What is remembered is the distance found, 0 where the clean input is wrong by the soft margin; such a sample is
    trained on as it is.

    What we do differently: directions have unit length in the attack's norm, so that what is remembered is a length,
    where theirs are divided by the radius of the attack; bisection runs in the attack's mode with frozen weights,
    where theirs moves batch-norm statistics and builds a graph; the points lie in the box, where theirs are clipped
    during the search alone; misclassified rows stay in the batch at radius 0, where theirs are taken out of it.
    """

    def __init__(self, maximum: float = 12 / 255, minimum: float = 0.005, bisections: int = 10) -> None:
        super().__init__()
        checks.at_least("maximum", maximum, 0)
        checks.at_least("bisections", bisections, 1)
        if not 0 < minimum <= maximum:
            raise checks.InputError(f"minimum={minimum}: must be in (0, maximum={maximum}]; at 0 nothing is found")
        self.maximum, self.minimum, self.bisections = maximum, minimum, bisections

    def allocate(self, size: int) -> None:
        """One distance per sample, all 0: not found yet."""
        self.radii = torch.zeros(size, device=self.radii.device)

    def eval_eps(self) -> float:
        """The maximum: the radius that every sample is to hold at."""
        return self.maximum

    def propose(self, step: Step) -> Tensor:
        """The distance of the last visit, at least the minimum; 0 where the clean input is wrong, (B,)."""
        return torch.where(self._right(step), self.radii[step.index].clamp_min(self.minimum), 0)

    def settle(self, step: Step, x_adv: Tensor) -> Tensor:
        """The points of the boundary in the directions of `x_adv`, (B, ...), in the box; how far they are is kept."""
        x = step.x
        delta = x_adv.to(torch.promote_types(x.dtype, torch.float32)) - x
        distance = geometry.norm(delta, step.norm)
        unit = delta / geometry.column(torch.where(distance > 0, distance, 1), x)

        def at(distance: Tensor) -> Tensor:
            return geometry.inward(x, geometry.column(distance, x) * unit).clamp(*step.box)

        low, high = torch.zeros_like(distance), torch.full_like(distance, 1.05 * self.maximum)
        distance = torch.minimum(distance, high)
        with lent(step.model, step.attack_mode), torch.no_grad():
            for _ in range(self.bisections):
                holds = losses.soft_margin_loss(step.model(at(distance)), step.y) < 0
                low, high = torch.where(holds, distance, low), torch.where(holds, high, distance)
                distance = (low + high) / 2
        right = self._right(step)
        distance = torch.where(right, distance, 0)
        self.radii[step.index] = distance.to(self.radii.dtype)
        step.near = distance < self.maximum
        return geometry.choose(right, at(distance), x)

    def _right(self, step: Step) -> Tensor:
        return losses.soft_margin_loss(step.clean_logits, step.y) < 0
