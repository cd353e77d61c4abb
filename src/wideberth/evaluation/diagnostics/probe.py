"""The model under examination: some samples that it classifies correctly, and how far attacks get on them.

Attacks are compared by their *margin reduction*: the share of a sample's clean logit margin that is removed at the
point found, 1 where that point is adversarial. Unlike a count of adversarial samples it tells attacks apart at radii
where none of them, or all, succeed; unlike a loss it does not change when the logits are rescaled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import pandas as pd
import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.acceleration import optimised_copy
from wideberth.attacks import FGSM, PGD, Attack
from wideberth.checks import Box, InputError, Norm
from wideberth.evaluation.diagnostics.surrogate import SurrogateGradients
from wideberth.gradients import NO_GRADIENT, NoInputGradient, raw_input_gradient
from wideberth.losses import Loss
from wideberth.randomness import Noise, fold, permutation

PGD_STEPS = 20
"""Steps of PGD, unless a check says otherwise."""

RANDOM_OUTPUT = 0.01
"""Outputs that vary by a larger share of the logits' size from call to call are random, not just inexact."""

Stages: TypeAlias = Sequence[Mapping[str, Any]] | Mapping[str, bool]
"""A record's attacks in order: a list of {name, settings}, or a mapping from names to whether they need gradients."""


class Inputs(Protocol):
    """Inputs that are read when they are indexed by rows (B,) int64, so that a few of many can be examined."""

    @property
    def device(self) -> torch.device:
        """The device that rows are read to."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor: ...


class NotExamined(Exception):
    """A check cannot be made; the message says why."""


class NoGradient(NotExamined):
    """The model's output gives no gradient to its input."""


@dataclass(frozen=True)
class Reach:
    """How far an attack gets.

    Attributes:
        adversarial: (B,) bool, whether its point is misclassified.
        margin_reduction: (B,) in [0, 1], the share of the clean logit margin that is removed; 1 where adversarial.
    """

    adversarial: Tensor
    margin_reduction: Tensor

    def __or__(self, other: Reach) -> Reach:
        """The better of two on every row."""
        return Reach(self.adversarial | other.adversarial, torch.maximum(self.margin_reduction, other.margin_reduction))


@dataclass(frozen=True)
class Threat:
    """What an adversary may do.

    Attributes:
        eps: one radius, or (B,) radii on the samples' device.
        norm: "linf", "l2" or "l1".
        box: of the inputs.
    """

    eps: float | Tensor
    norm: Norm
    box: Box


@dataclass(frozen=True)
class Samples:
    """What is attacked.

    Attributes:
        x: (B, ...) inputs on the model's device, classified correctly unless there is an `obstacle`.
        y: (B,) labels there.
        index: (B,) int64 on the CPU, their positions in the data.
        obstacle: why attacks on them tell nothing (unusable outputs, no sample classified correctly); "" as a rule.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    obstacle: str = ""


@dataclass(frozen=True)
class Recorded:
    """What is known of an evaluation of the same model and data.

    Attributes:
        samples: its table, row i about sample i of the data; None if there is none.
        stages: its attacks; None if they are unknown.
    """

    samples: pd.DataFrame | None = None
    stages: Stages | None = None


@dataclass(frozen=True)
class Probe:
    """A model and all that the checks ask about it; an attack runs when a check first needs its result.

    Attributes:
        model: lent, in eval mode.
        samples: what is attacked.
        threat: what the attacks may do.
        recorded: what an evaluation found.
        seed: of all randomness.
        came_in_train_mode: how many layers with a train mode of their own were in it when the model was given.
    """

    model: nn.Module
    samples: Samples
    threat: Threat
    recorded: Recorded
    seed: int
    came_in_train_mode: int

    @property
    def x(self) -> Tensor:
        """The inputs, (B, ...)."""
        return self.samples.x

    @property
    def y(self) -> Tensor:
        """The labels, (B,)."""
        return self.samples.y

    def forward(self, points: Tensor) -> Tensor:
        """The outputs at these points, without gradients."""
        with torch.no_grad():
            outputs: Tensor = self.model(points)
        return outputs

    @cached_property
    def logits(self) -> Tensor:
        """Of the samples, (B, K).

        Raises:
            NotExamined: where there is an obstacle.
        """
        if self.samples.obstacle:
            raise NotExamined(self.samples.obstacle)
        return self.forward(self.x)

    @cached_property
    def output_variation(self) -> float:
        """The largest difference between repeated outputs at the samples, relative to the size of the logits."""
        return max(relative_difference(self.forward(self.x), self.logits) for _ in range(3))

    def require_repeatable_outputs(self) -> None:
        """Refuse to compare attacks on a model with random outputs.

        Raises:
            NotExamined: where outputs vary by more than `RANDOM_OUTPUT`.
        """
        if self.output_variation > RANDOM_OUTPUT:
            raise NotExamined("the outputs are random, and a comparison of attacks would be one of draws")

    # ---- gradients ----------------------------------------------------------------------------------------------

    def gradient(self, loss: Loss, points: Tensor | None = None) -> Tensor:
        """The input gradient of each row's loss, (B, ...), at the samples or at other points; it may hold NaN.

        Raises:
            NoGradient: where there is none.
        """
        self.logits  # noqa: B018 (raises where there is an obstacle)
        point = self.x if points is None else points
        try:
            return raw_input_gradient(self.model, point, lambda logits: loss(logits, self.y))[2]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NoInputGradient) as error:
            raise NoGradient(NO_GRADIENT) from error

    @cached_property
    def margin_gradient(self) -> Tensor:
        """Of the logit margin at the samples, (B, ...); no scale of the logits makes it vanish."""
        return self.gradient(losses.margin_loss)

    # ---- attacks ------------------------------------------------------------------------------------------------

    @cached_property
    def optimised(self) -> nn.Module:
        """The optimised copy of the model, which the attacks search with."""
        return optimised_copy(self.model, self.x)

    def reach_of(self, points: Tensor) -> Reach:
        """How far these points (B, ...) get on the model itself."""
        before = losses.logit_margin(self.logits, self.y)
        logits = self.forward(points)
        adversarial = losses.misclassified(logits, self.y)
        reduction = ((before - losses.logit_margin(logits, self.y)) / before).clamp(0, 1)
        return Reach(adversarial, torch.where(adversarial, 1, reduction))

    def attack(
        self, attack: Attack, *words: str, eps: float | Tensor | None = None, by: nn.Module | None = None
    ) -> Reach:
        """How far an attack gets.

        Args:
            attack: any, with norm and box of the threat.
            words: what else the random numbers of the attack depend on.
            eps: one radius or (B,) radii; None for those of the threat.
            by: the module whose gradients are followed; None for the optimised copy.

        Raises:
            NotExamined: where the outputs are random, or carry no gradient.
        """
        self.margin_gradient  # noqa: B018 (raises where there is none)
        self.require_repeatable_outputs()
        model = self.optimised if by is None else by
        radius = self.threat.eps if eps is None else eps
        seed = fold(self.seed, *words)
        found = attack(model, self.x, self.y, eps=radius, index=self.samples.index, seed=seed, check_success=False)
        return self.reach_of(found.x)

    def pgd(self, loss: Loss, steps: int = PGD_STEPS, *words: str) -> Reach:
        """PGD from a random start."""
        norm, box = self.threat.norm, self.threat.box
        return self.attack(PGD(norm=norm, box=box, steps=steps, loss=loss, keep="worst"), *words)

    @cached_property
    def pgd_on_margin(self) -> Reach:
        """PGD on the logit margin."""
        return self.pgd(losses.margin_loss)

    @cached_property
    def pgd_on_cross_entropy(self) -> Reach:
        """PGD on the cross-entropy."""
        return self.pgd(losses.cross_entropy)

    @property
    def pgd_by_own_gradients(self) -> Reach:
        """The better of the two."""
        return self.pgd_on_margin | self.pgd_on_cross_entropy

    @cached_property
    def pgd_restarted(self) -> Reach:
        """PGD on the margin from another random start."""
        return self.pgd(losses.margin_loss, PGD_STEPS, "restart")

    @cached_property
    def fgsm(self) -> Reach:
        """FGSM on the margin."""
        return self.attack(FGSM(norm=self.threat.norm, box=self.threat.box, loss=losses.margin_loss))

    @cached_property
    def pgd_with_surrogate_gradients(self) -> Reach:
        """PGD on the margin by surrogate gradients."""
        attack = PGD(norm=self.threat.norm, box=self.threat.box, steps=PGD_STEPS, loss=losses.margin_loss)
        return self.attack(attack, by=SurrogateGradients(self.optimised))

    @cached_property
    def pgd_with_averaged_gradients(self) -> Reach:
        """PGD by means of surrogate gradients over noise of half the radius, which also average out ripples."""
        index, seed = self.samples.index.to(self.x.device), fold(self.seed, "average")

        def noisy(x: Tensor, draw: int) -> Tensor:
            return self.noisy_copies(x, Noise(index[: len(x)], seed, draw))

        steps, norm, box = PGD_STEPS // 2, self.threat.norm, self.threat.box
        attack = PGD(norm=norm, box=box, steps=steps, loss=losses.margin_loss, draws=5)
        return self.attack(attack, by=SurrogateGradients(self.optimised, noisy))

    def noisy_copies(self, x: Tensor, noise: Noise, share: float = 0.5) -> Tensor:
        """Points (b, ...) of the box, drawn uniformly within a share of the radius around the first rows x (b, ...)."""
        norm, box, eps = self.threat.norm, self.threat.box, self.threat.eps
        radii = geometry.per_sample((eps[: len(x)] if isinstance(eps, Tensor) else eps) * share, x)
        return geometry.place(x, geometry.random_start(x, radii, norm, "uniform", noise), radii, norm, box)

    @cached_property
    def random_starts(self) -> Tensor:
        """Random points of the ball, one for each sample, (B, ...)."""
        noise = Noise(self.samples.index.to(self.x.device), fold(self.seed, "start"))
        return self.noisy_copies(self.x, noise, share=1)

    @cached_property
    def random_points(self) -> Reach:
        """The best of twenty random points at full radius (corners of the ball in linf)."""
        self.require_repeatable_outputs()
        norm, box = self.threat.norm, self.threat.box
        eps = geometry.per_sample(self.threat.eps, self.x)
        noise = Noise(self.samples.index.to(self.x.device), fold(self.seed, "random"))
        best = self.reach_of(self.x)
        for draw in range(20):
            way = geometry.steepest(noise.at(draw).normal(self.x.shape[1:], eps.dtype), norm)
            best |= self.reach_of(geometry.place(self.x, geometry.column(eps, way) * way, eps, norm, box))
        return best

    @property
    def all_attacks(self) -> Reach:
        """How far all of these get together, as far as they can be run."""
        best = self.reach_of(self.x)
        for name in _ATTACKS:
            with suppress(NotExamined):
                best |= getattr(self, name)
        return best


_ATTACKS = (
    "pgd_on_margin",
    "pgd_on_cross_entropy",
    "pgd_restarted",
    "fgsm",
    "pgd_with_surrogate_gradients",
    "pgd_with_averaged_gradients",
    "random_points",
)


def relative_difference(logits: Tensor, other: Tensor) -> float:
    """The largest l2 difference of a row of logits (B, K), relative to the size of that row of the other."""
    size = other.double().norm(dim=1).clamp_min(1e-12)
    return float(((logits.double() - other.double()).norm(dim=1) / size).max())


def choose_samples(model: nn.Module, x: Tensor | Inputs, y: Tensor, seed: int, rows: int) -> Samples:
    """Up to `rows` samples that the model classifies correctly; any others, and the obstacle, where there are none.

    Args:
        model: lent already.
        x: (N, ...) inputs on any device.
        y: (N,) labels.
        seed: of the order in which samples are tried: test sets are often sorted by class.
        rows: how many.

    Raises:
        InputError: for labels that cannot be used.
    """
    if len(y) != len(x):
        raise InputError(f"{len(x)} inputs and {len(y)} labels: must be as many")
    device = next((p.device for p in model.parameters()), x.device)

    def samples(index: Tensor, obstacle: str = "") -> Samples:
        return Samples(x[index].detach().to(device), y[index].to(device), index, obstacle)

    order = permutation(fold(seed, "examine"), 0, len(x))
    chosen: list[Tensor] = []
    for part in torch.split(order, rows):
        with torch.no_grad():
            logits = model(x[part].to(device))
        try:
            checks.valid_logits(logits, len(part))
        except InputError as error:
            return samples(order[:rows], str(error))
        checks.valid_labels(y[part], len(part), logits.shape[1])
        chosen.append(part[~losses.misclassified(logits, y[part].to(device)).cpu()])
        if sum(map(len, chosen)) >= rows:
            break
    index = torch.cat(chosen)[:rows]
    if not len(index):
        return samples(order[:rows], f"none of the {len(x)} samples is classified correctly")
    return samples(index)
