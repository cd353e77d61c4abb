"""What a row is attacked on, and where its run stands: rows leave a batch and join one, each at a step of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from wideberth import geometry, losses
from wideberth.checks import Box, Norm
from wideberth.losses import Loss
from wideberth.randomness import Noise


class Rows:
    """A dataclass of tensors whose first axis is the row: rows can leave it, and others join."""

    def rows(self, where: Tensor) -> Self:
        """The part of the rows `where` (bool or indices); what is no tensor is of all rows, and stays."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **{name: _rows(part, where) for name, part in parts.items()})  # type: ignore[type-var]

    def joined(self, other: Self) -> Self:
        """These rows, and then those of `other`."""
        parts = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **{name: _joined(*pair) for name, pair in parts.items()})  # type: ignore[type-var]

    def to(self, device: torch.device) -> Self:
        """The same rows on another device."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **{name: _moved(part, device) for name, part in parts.items()})  # type: ignore[type-var]


def _moved(part: Any, device: torch.device) -> Any:
    if isinstance(part, Noise):
        return Noise(part.index.to(device), part.seed, _moved(part.draw, device))
    return part.to(device) if isinstance(part, Tensor) else part


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


@dataclass(frozen=True)
class AttackInputs(Rows):
    """One batch to attack, row by row.

    Attributes:
        x: (B, ...) inputs.
        y: (B,) labels, which are to be left.
        eps: (B,) radii; infinite where a minimum-norm attack is to find the smallest.
        noise: each row's random stream.
        target: (B,) classes to steer to, or None.
        strict: whether only the target counts as success; a verdict's targeted runs are content with any mistake.
    """

    x: Tensor
    y: Tensor
    eps: Tensor
    noise: Noise
    target: Tensor | None = None
    strict: bool = True

    def goal_reached(self, logits: Tensor) -> Tensor:
        """Whether these logits (B, K) are what the attack wants, (B,) bool."""
        if self.target is None or not self.strict:
            return losses.misclassified(logits, self.y)
        return losses.predictions(logits) == self.target

    def loss(self, loss: Loss) -> Callable[[Tensor], Tensor]:
        """The loss to ascend, of the logits: the given one, or its form that steers to the target."""
        y, target = self.y, self.target
        if target is None:
            return lambda logits: loss(logits, y)
        if self.strict:
            return lambda logits: -loss(logits, target)
        return lambda logits: losses.towards(loss)(logits, y, target)


@dataclass(frozen=True)
class AttackState(Rows):
    """Where a run stands; every tensor's first axis is the row. Attacks extend it with what they remember.

    Attributes:
        point: (B, ...) where the model is asked next.
        kept: (B, ...) what the run would return now.
        value: (B,) how good `kept` is, higher = better: the loss there, or minus its distance of a minimum-norm attack.
        broken: (B,) bool, whether `kept` achieves the goal within its radius.
        steps_survived: (B,) int64, points asked about before the first that achieves the goal.
        iteration: (B,) int64, steps taken; Square, which may ask several at once, counts queries.
        spent: (B,) int64, forwards plus backwards, but for what is asked ahead in vain (see `Square`).
    """

    point: Tensor
    kept: Tensor
    value: Tensor
    broken: Tensor
    steps_survived: Tensor
    iteration: Tensor
    spent: Tensor

    @classmethod
    def at(cls, inputs: AttackInputs, point: Tensor, **own: Any) -> Self:
        """The state of a run that begins at `point` (B, ...) and has asked nothing yet."""
        none = torch.zeros_like(inputs.y, dtype=torch.int64)
        value = torch.full_like(inputs.eps, float("-inf"))
        return cls(point, point, value, none.bool(), none, none, none, **own)

    def after(self, inputs: AttackInputs, logits: Tensor, value: Tensor, cost: int, first: bool = False) -> Self:
        """The state after the model's answer about `point`, which is kept if it is better than what was.

        Better is what achieves the goal, and among equals the higher loss.

        Args:
            inputs: the rows.
            logits: (B, K) at `point`.
            value: (B,) loss there.
            cost: forwards plus backwards that the answer took.
            first: what achieves the goal is kept for good, whatever comes after it.
        """
        now, value = inputs.goal_reached(logits), value.to(self.value.dtype)
        better = (now & ~self.broken) | ((now == self.broken) & (value > self.value))
        if first:
            better = better & ~self.broken
        return replace(
            self,
            kept=geometry.choose(better, self.point, self.kept),
            value=torch.where(better, value, self.value),
            broken=self.broken | now,
            # A row that has survived every look so far, and this one.
            steps_survived=self.steps_survived + (~now & (self.steps_survived == self.iteration)),
            iteration=self.iteration + 1,
            spent=self.spent + cost,
        )


S = TypeVar("S", bound=AttackState)
E = TypeVar("E", bound="ProjectedState")


@dataclass(frozen=True, kw_only=True)
class ProjectedState(AttackState):
    """A state that knows between which faces all points lie, where ball and box together are a box: in linf.

    Attributes:
        low: (B, ...) the least point; None in the other norms.
        high: (B, ...) the greatest.
    """

    low: Tensor | None = None
    high: Tensor | None = None

    @classmethod
    def within(cls, inputs: AttackInputs, point: Tensor, norm: Norm, box: Box, **own: Any) -> Self:
        """The state of a run that begins at `point` (B, ...) of the ball of that norm and the box."""
        faces = geometry.faces(inputs.x, inputs.eps, box) if norm == "linf" else (None, None)
        return cls.at(inputs, point, low=faces[0], high=faces[1], **own)

    def moved(self, inputs: AttackInputs, origin: Tensor, move: Tensor, norm: Norm, box: Box) -> Tensor:
        """Where `move` leads from `origin`, brought back into ball and box.

        All are (B, ...); `move` may be worked on in place.
        """
        move = move.to(torch.promote_types(move.dtype, origin.dtype))
        if self.low is None:
            wide = inputs.eps.dtype
            delta = move.add_(origin.to(wide) - inputs.x.to(wide))
            return geometry.place(inputs.x, delta, inputs.eps, norm, box)
        # The faces were rounded towards x: a clamp is enough, at a fifth of the cost of `place`.
        return move.add_(origin).to(origin.dtype).clamp_(self.low, self.high)
