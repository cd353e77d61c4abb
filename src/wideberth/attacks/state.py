"""What an attack works on and where it stands, row by row: `AttackInputs` and `AttackState`.

The first axis of every tensor is the row, one sample at one restart. Rows may leave a batch and others may join it,
each at an iteration of its own; `Rows` does that for any dataclass of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from wideberth import geometry, losses
from wideberth.checks import Box, Norm
from wideberth.losses import Loss
from wideberth.randomness import Noise


@dataclass(frozen=True)
class Rows:
    """A dataclass whose tensors have the row as their first axis; anything else in it holds for all rows."""

    def rows(self, where: Tensor) -> Self:
        """Some of the rows, `where` (B,) bool or (n,) indices."""
        return replace(self, **{f.name: _rows(getattr(self, f.name), where) for f in fields(self)})

    def joined(self, other: Self) -> Self:
        """These rows, followed by those of `other`."""
        return replace(self, **{f.name: _joined(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})

    def to(self, device: torch.device) -> Self:
        """The same rows on another device."""
        return replace(self, **{f.name: _on_device(getattr(self, f.name), device) for f in fields(self)})


def _rows(part: Any, where: Tensor) -> Any:
    if isinstance(part, Noise):
        return part.rows(where)
    return part[where] if isinstance(part, Tensor) else part


def _joined(part: Any, other: Any) -> Any:
    if isinstance(part, Tensor):
        return torch.cat([part, other])
    if isinstance(part, Noise):
        draw = part.draw
        if isinstance(draw, Tensor):
            draw = torch.cat([draw, other.draw])
        return Noise(torch.cat([part.index, other.index]), part.seed, draw)
    return part


def _on_device(part: Any, device: torch.device) -> Any:
    if isinstance(part, Noise):
        return Noise(part.index.to(device), part.seed, _on_device(part.draw, device))
    return part.to(device) if isinstance(part, Tensor) else part


@dataclass(frozen=True)
class AttackInputs(Rows):
    """What an attack is given: a batch of rows, and what is to be reached on each.

    Attributes:
        x: (B, ...) clean inputs.
        y: (B,) int64 labels.
        eps: (B,) radii; infinite where a minimum-norm attack is to find the smallest perturbation.
        noise: the random stream of each row.
        target: (B,) int64 target classes, or None for an untargeted attack.
        target_only: with a target, whether only a prediction of the target is a success. In an evaluation any
            misclassification is one, and this is False.
        restart: (B,) int64, which restart each row is at; None: the first.
        loss: what is ascended in place of the attack's own loss. It may be tied to its batch, as the KL divergence from
            this batch's clean logits is.
        points_per_row: how many points of each row the model may be queried at together. Drivers set it; attacks whose
            queries depend on each other ignore it.
    """

    x: Tensor
    y: Tensor
    eps: Tensor
    noise: Noise
    target: Tensor | None = None
    target_only: bool = True
    restart: Tensor | None = None
    loss: Loss | None = None
    points_per_row: int = 1

    def goal_reached(self, logits: Tensor) -> Tensor:
        """Whether these logits (B, K) are a success, (B,) bool."""
        if self.target is None or not self.target_only:
            return losses.misclassified(logits, self.y)
        return losses.predictions(logits) == self.target

    def attack_loss(self, default: Loss) -> Callable[[Tensor], Tensor]:
        """What is to be ascended, a function of logits (B, K) to (B,): `loss`, else `default`, towards the target."""
        loss, y, target = self.loss or default, self.y, self.target
        if target is None:
            return lambda logits: loss(logits, y)
        if self.target_only:
            return lambda logits: -loss(logits, target)
        return lambda logits: losses.towards(loss)(logits, y, target)


@dataclass(frozen=True)
class AttackState(Rows):
    """Where an attack stands on each row. Attacks extend it with what their algorithm remembers.

    Attributes:
        point: (B, ...) where the model is queried next.
        best: (B, ...) the best point so far: what the attack would return now.
        best_loss: (B,) the loss at `best`; for a minimum-norm attack, minus its distance from the input.
        adversarial: (B,) bool, whether `best` is a success within its radius.
        steps_survived: (B,) int64, points queried before the first success.
        iteration: (B,) int64, updates made (Square: queries answered).
        evaluations: (B,) int64, forwards plus backwards spent.
    """

    point: Tensor
    best: Tensor
    best_loss: Tensor
    adversarial: Tensor
    steps_survived: Tensor
    iteration: Tensor
    evaluations: Tensor

    @classmethod
    def initial(cls, inputs: AttackInputs, point: Tensor, **own: Any) -> Self:
        """The state before the first query, which will be at `point` (B, ...)."""
        none = torch.zeros_like(inputs.y, dtype=torch.int64)
        loss = torch.full_like(inputs.eps, float("-inf"))
        return cls(point, point, loss, none.bool(), none, none, none, **own)

    def recorded(self, inputs: AttackInputs, logits: Tensor, loss: Tensor, cost: int, first: bool = False) -> Self:
        """The state with the model's output at `point` recorded; `best` becomes that point if it is better.

        A success is better than none; of two successes, or two failures, the one of higher loss is.

        Args:
            inputs: the rows.
            logits: (B, K) at `point`.
            loss: (B,) there.
            cost: forwards plus backwards that this query took.
            first: the first success stays the best point, whatever the loss of later ones.
        """
        success, loss = inputs.goal_reached(logits), loss.to(self.best_loss.dtype)
        better = (success & ~self.adversarial) | ((success == self.adversarial) & (loss > self.best_loss))
        if first:
            better = better & ~self.adversarial
        return replace(
            self,
            best=geometry.choose(better, self.point, self.best),
            best_loss=torch.where(better, loss, self.best_loss),
            adversarial=self.adversarial | success,
            # A row that has survived every query so far, and this one.
            steps_survived=self.steps_survived + (~success & (self.steps_survived == self.iteration)),
            iteration=self.iteration + 1,
            evaluations=self.evaluations + cost,
        )


@dataclass(frozen=True, kw_only=True)
class ProjectedState(AttackState):
    """A state whose points stay in ball and box; in linf, where both together are a box, it holds that box.

    Attributes:
        low: (B, ...) the smallest value of each entry; None in the other norms.
        high: (B, ...) the largest.
    """

    low: Tensor | None = None
    high: Tensor | None = None

    @classmethod
    def initial_in_ball(cls, inputs: AttackInputs, point: Tensor, norm: Norm, box: Box, **own: Any) -> Self:
        """The state before the first query, at `point` (B, ...) of the ball of `norm` and the box."""
        low, high = geometry.faces(inputs.x, inputs.eps, box) if norm == "linf" else (None, None)
        return cls.initial(inputs, point, low=low, high=high, **own)

    def projected(self, inputs: AttackInputs, origin: Tensor, step: Tensor, norm: Norm, box: Box) -> Tensor:
        """origin + step, projected onto ball and box, (B, ...).

        All are (B, ...); the memory of `step` may be reused for the result.
        """
        step = step.to(torch.promote_types(step.dtype, origin.dtype))
        if self.low is None:
            wide = inputs.eps.dtype
            delta = step.add_(origin.to(wide) - inputs.x.to(wide))
            return geometry.place(inputs.x, delta, inputs.eps, norm, box)
        # The faces were rounded towards x: a clamp is enough, at a fifth of the cost of `place`.
        return step.add_(origin).to(origin.dtype).clamp_(self.low, self.high)
