"""The model under examination: some samples that it classifies correctly, and how far attacks get on them.

What an attack is compared by is its *headway*: the share of a sample's clean logit margin that it takes away, 1 where
the sample is broken. Unlike a count of broken samples it tells attacks apart at radii where none, or all, get through;
unlike a loss it does not change when the logits are rescaled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from wideberth import checks, geometry, losses
from wideberth.acceleration import optimised_copy
from wideberth.attacks import FGSM, PGD, Attack
from wideberth.checks import Box, InputError, Norm
from wideberth.gradients import NO_GRADIENT, NoInputGradient, raw_input_gradient
from wideberth.losses import Loss
from wideberth.randomness import Noise, fold, permutation

STEPS = 20
"""Of PGD, wherever nothing else is said."""

WOBBLE = 0.01
"""Of the logits' size: outputs that differ more than this from call to call are random, not just inexact."""

Stages: TypeAlias = Sequence[Mapping[str, Any]] | Mapping[str, bool]
"""The line-up of a record: its list of attacks (name, settings), or names to whether they need gradients, in order."""


class NotExamined(Exception):
    """A check cannot be made; the message says why."""


class NoGradient(NotExamined):
    """The model's output gives no gradient to its input."""


@dataclass(frozen=True)
class Reached:
    """How far an attack got.

    Attributes:
        broken: (B,) bool.
        headway: (B,) in [0, 1], the share of the clean logit margin that is gone; 1 where broken.
    """

    broken: Tensor
    headway: Tensor

    def __or__(self, other: Reached) -> Reached:
        """The better of two on every row."""
        return Reached(self.broken | other.broken, torch.maximum(self.headway, other.headway))


@dataclass(frozen=True)
class Subject:
    """What is examined; attacks run when a check first asks for them.

    Attributes:
        model: lent, in eval mode.
        x: (B, ...) samples on the model's device, classified correctly unless there is an `obstacle`.
        y: (B,) labels.
        where: (B,) their positions in the data.
        obstacle: why attacks tell nothing (unusable outputs, no sample classified correctly); "" as a rule.
        trained: how many layers the model brought along in train mode.
        eps: radius.
        norm: "linf", "l2" or "l1".
        box: of the inputs.
        seed: of all randomness.
        samples: the record's table for all of the data, if there is one.
        stages: its line-up.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    where: Tensor
    obstacle: str
    trained: int
    eps: float
    norm: Norm
    box: Box
    seed: int
    samples: pd.DataFrame | None
    stages: Stages | None

    def forward(self, points: Tensor) -> Tensor:
        """The outputs at these points, without gradients."""
        with torch.no_grad():
            outputs: Tensor = self.model(points)
        return outputs

    @cached_property
    def logits(self) -> Tensor:
        """Of the samples, (B, K)."""
        if self.obstacle:
            raise NotExamined(self.obstacle)
        return self.forward(self.x)

    @cached_property
    def wobble(self) -> float:
        """The largest difference between answers to the same question, relative to the size of the logits."""
        return max(difference(self.forward(self.x), self.logits) for _ in range(3))

    # ---- gradients ----------------------------------------------------------------------------------------------

    def gradient(self, loss: Loss, points: Tensor | None = None) -> Tensor:
        """The input gradient of each row's loss, (B, ...), at the samples or at other points, NaN and all.

        Raises:
            NoGradient: where there is none.
        """
        self.logits  # noqa: B018 (refuses where there is an obstacle)
        point = self.x if points is None else points
        try:
            return raw_input_gradient(self.model, point, lambda logits: loss(logits, self.y))[2]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NoInputGradient) as error:
            raise NoGradient(NO_GRADIENT) from error

    @cached_property
    def margin_gradient(self) -> Tensor:
        """That of the logit margin at the samples, which no scale of the logits can make vanish."""
        return self.gradient(losses.margin_loss)

    # ---- attacks ------------------------------------------------------------------------------------------------

    @cached_property
    def stand_in(self) -> nn.Module:
        """What attacks ask in the model's place: the same function, faster where there is a way."""
        return optimised_copy(self.model, self.x)

    def judged(self, points: Tensor) -> Reached:
        """How far these points got, as the model itself sees them."""
        before = losses.logit_margin(self.logits, self.y)
        logits = self.forward(points)
        broken = losses.misclassified(logits, self.y)
        headway = ((before - losses.logit_margin(logits, self.y)) / before).clamp(0, 1)
        return Reached(broken, torch.where(broken, 1, headway))

    def attacked(self, attack: Attack, *words: str, eps: float | None = None, by: nn.Module | None = None) -> Reached:
        """How far an attack gets, within `eps`, following the gradients of `by` (default: `stand_in`)."""
        self.margin_gradient  # noqa: B018 (refuses where there is none)
        self._settled()
        model = self.stand_in if by is None else by
        radius = self.eps if eps is None else eps
        seed = fold(self.seed, *words)
        found = attack(model, self.x, self.y, eps=radius, index=self.where, seed=seed, check_success=False)
        return self.judged(found.x)

    def _settled(self) -> None:
        if self.wobble > WOBBLE:
            raise NotExamined("the outputs are random, and a comparison of attacks would be one of draws")

    def pgd(self, loss: Loss, steps: int = STEPS, *words: str) -> Reached:
        """PGD from a random start."""
        return self.attacked(PGD(norm=self.norm, box=self.box, steps=steps, loss=loss, keep="worst"), *words)

    @cached_property
    def on_margin(self) -> Reached:
        """PGD on the logit margin."""
        return self.pgd(losses.margin_loss)

    @cached_property
    def on_cross_entropy(self) -> Reached:
        """PGD on the cross-entropy."""
        return self.pgd(losses.cross_entropy)

    @property
    def own(self) -> Reached:
        """The better of the two: what following the model's own gradients leads to."""
        return self.on_margin | self.on_cross_entropy

    @cached_property
    def restarted(self) -> Reached:
        """PGD on the margin from another random start."""
        return self.pgd(losses.margin_loss, STEPS, "restart")

    @cached_property
    def in_one_step(self) -> Reached:
        """FGSM on the margin."""
        return self.attacked(FGSM(norm=self.norm, box=self.box, loss=losses.margin_loss))

    @cached_property
    def softly(self) -> Reached:
        """PGD by the gradients of the model with its kinks and steps passed over."""
        attack = PGD(norm=self.norm, box=self.box, steps=STEPS, loss=losses.margin_loss)
        return self.attacked(attack, by=Softened(self.stand_in))

    @cached_property
    def averaged(self) -> Reached:
        """PGD by gradients that are means over noise of half the radius, which also levels ripples."""
        index, seed = self.where.to(self.x.device), fold(self.seed, "average")
        by = Softened(self.stand_in, lambda x, draw: self.shaken(x, Noise(index[: len(x)], seed, draw)))
        attack = PGD(norm=self.norm, box=self.box, steps=STEPS // 2, loss=losses.margin_loss, draws=5)
        return self.attacked(attack, by=by)

    def shaken(self, x: Tensor, noise: Noise, share: float = 0.5) -> Tensor:
        """Points (B, ...) within a share of the radius around x, drawn uniformly, in the box."""
        eps = geometry.per_sample(self.eps * share, x)
        return geometry.place(x, geometry.random_start(x, eps, self.norm, "uniform", noise), eps, self.norm, self.box)

    @cached_property
    def at_start(self) -> Tensor:
        """Random points of the ball, one for each sample, (B, ...)."""
        noise = Noise(self.where.to(self.x.device), fold(self.seed, "start"))
        return self.shaken(self.x, noise, share=1)

    @cached_property
    def at_random(self) -> Reached:
        """The best of twenty random points at full radius (corners of the ball in linf)."""
        self._settled()
        eps = geometry.per_sample(self.eps, self.x)
        noise = Noise(self.where.to(self.x.device), fold(self.seed, "random"))
        best = self.judged(self.x)
        for draw in range(20):
            way = geometry.steepest(noise.at(draw).normal(self.x.shape[1:], eps.dtype), self.norm)
            best |= self.judged(geometry.place(self.x, geometry.column(eps, way) * way, eps, self.norm, self.box))
        return best

    @property
    def anything(self) -> Reached:
        """What all of these reach together, as far as they can be run."""
        found = self.judged(self.x)
        for name in _ATTACKS:
            with suppress(NotExamined):
                found |= getattr(self, name)
        return found


_ATTACKS = ("on_margin", "on_cross_entropy", "restarted", "in_one_step", "softly", "averaged", "at_random")


def difference(logits: Tensor, other: Tensor) -> float:
    """The largest difference of a row, relative to the size of the logits."""
    size = other.double().norm(dim=1).clamp_min(1e-12)
    return float(((logits.double() - other.double()).norm(dim=1) / size).max())


def drawn(model: nn.Module, x: Tensor, y: Tensor, seed: int, rows: int) -> tuple[Tensor, str]:
    """Positions of up to `rows` correctly classified samples, and why attacks would tell nothing ("" as a rule).

    Args:
        model: lent already.
        x: (N, ...) samples.
        y: (N,) labels.
        seed: of the order in which they are tried: test sets are often sorted by class.
        rows: how many.

    Raises:
        InputError: for labels that cannot be used.
    """
    if len(y) != len(x):
        raise InputError(f"{len(x)} inputs and {len(y)} labels: must be as many")
    device = next((p.device for p in model.parameters()), x.device)
    order = permutation(fold(seed, "examine"), 0, len(x))
    chosen: list[Tensor] = []
    for part in order.split(rows):  # type: ignore[no-untyped-call]
        with torch.no_grad():
            logits = model(x[part].to(device))
        try:
            checks.valid_logits(logits, len(part))
        except InputError as error:
            return order[:rows], str(error)
        checks.valid_labels(y[part], len(part), logits.shape[1])
        chosen.append(part[~losses.misclassified(logits, y[part].to(device)).cpu()])
        if sum(map(len, chosen)) >= rows:
            break
    where = torch.cat(chosen)[:rows]
    return (where, "") if len(where) else (order[:rows], f"none of the {len(x)} samples is classified correctly")


# ---- a model whose gradients tell more than its own -------------------------------------------------------------


def _leaning(x: Tensor) -> Tensor:
    """Slopes of a rectifier that is rounded off: between 0 and 1, 1/2 at zero, on the scale of each row's entries."""
    scale = x.abs().flatten(1).mean(1) if x.dim() > 1 else x.abs()
    return torch.sigmoid(4 * x / scale.view(-1, *[1] * (x.dim() - 1)).clamp_min(1e-12))


_RECTIFIERS = {
    *(F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
    *(F.relu6, F.threshold),
}
_STEPS = {
    *(F.hardtanh, F.hardtanh_),
    *(torch.clamp, torch.clamp_, Tensor.clamp, Tensor.clamp_, torch.clip, Tensor.clip, Tensor.clip_),
    *(torch.round, torch.round_, Tensor.round, Tensor.round_, torch.floor, torch.floor_, Tensor.floor, Tensor.floor_),
    *(torch.ceil, torch.ceil_, Tensor.ceil, Tensor.ceil_, torch.trunc, torch.trunc_, Tensor.trunc, Tensor.trunc_),
    *(torch.sign, Tensor.sign, Tensor.sign_, torch.heaviside, Tensor.heaviside),
}


class _PassingGradients(TorchFunctionMode):
    """Leaves what functions return as it is, and lets gradients through where they are flat."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        flat = func in _STEPS or func in _RECTIFIERS
        if not (flat and args and isinstance(args[0], Tensor) and args[0].requires_grad):
            return func(*args, **(kwargs or {}))
        x = args[0]
        copy = x.detach().clone()
        slope = _leaning(x.detach()) if func in _RECTIFIERS else torch.ones(())
        value = func(copy, *args[1:], **(kwargs or {}))
        passed = x * slope + (value - (x * slope).detach())
        # What worked in place still does: others may hold the same tensor.
        return x.copy_(passed) if value is copy else passed


class Softened(nn.Module):
    """The same function with gradients that do not vanish: rectifiers rounded off, rounding and clamping passed over.

    Only the gradients differ (BPDA, Athalye et al. 2018), unless inputs are moved by noise first, which makes them the
    gradients of the function's mean over a neighbourhood. Comparisons and casts to integers cannot be passed over.

    Args:
        model: any module that was not compiled or scripted.
        shaken: (x, how many calls before) -> the points to look at instead; None for x itself.
    """

    def __init__(self, model: nn.Module, shaken: Callable[[Tensor, int], Tensor] | None = None) -> None:
        super().__init__()
        self.model, self.shaken, self.calls = model, shaken, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.shaken is not None:
            x = x + (self.shaken(x.detach(), self.calls) - x.detach())
            self.calls += 1
        with _PassingGradients():
            logits: Tensor = self.model(x)
        return logits
