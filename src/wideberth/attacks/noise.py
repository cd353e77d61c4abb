"""Random points of the ball: the floor that every attack with a gradient must beat."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.attacks.base import Attack, Problem, State
from wideberth.losses import Loss

S = TypeVar("S", bound=State)


def seen(problem: Problem, state: S, logits: Tensor, value: Tensor, cost: int, first: bool = False) -> S:
    """The state after a look at `state.point`, which is kept if it is the worst so far.

    Args:
        problem: the rows.
        state: before the look.
        logits: (B, K) there.
        value: (B,) the loss there.
        cost: forwards and backwards that the look took.
        first: keep the first point that achieves the goal, rather than the one of highest loss that does.
    """
    now, value = problem.achieved(logits), value.to(state.value.dtype)
    better = now & ~state.broken
    if first:
        better = better | (~state.broken & (value > state.value))
    else:
        better = better | ((now == state.broken) & (value > state.value))
    return replace(
        state,
        kept=geometry.choose(better, state.point, state.kept),
        value=torch.where(better, value, state.value),
        broken=state.broken | now,
        survived=state.survived + (~now & (state.survived == state.iteration)),
        iteration=state.iteration + 1,
        spent=state.spent + cost,
    )


@dataclass(frozen=True, kw_only=True)
class RandomNoise(Attack):
    """The worst of `tries` points drawn uniformly from the ball: one forward each, no gradient.

    In high dimensions it finds next to nothing. Where it finds what gradient attacks do not, those are being misled,
    and the model only looks robust (Carlini et al. 2019, "On evaluating adversarial robustness").

    Points are uniform over the volume of the ball and then moved into the box (see `geometry.place`).

    Attributes:
        tries: points per run, >= 1.
        loss: what ranks them; (logits, y) -> (B,).
        keep: "worst" returns the misclassified point of highest loss, "first_flip" the first misclassified one; where
            none is misclassified, both return the point of highest loss.
    """

    tries: int = 100
    loss: Loss = losses.cross_entropy
    keep: Literal["worst", "first_flip"] = "worst"

    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        super().__post_init__()
        checks.at_least("tries", self.tries, 1)
        checks.choice("keep", self.keep, ("worst", "first_flip"))

    @property
    def rounds(self) -> int:
        """As many as there are tries."""
        return self.tries

    def begin(self, problem: Problem) -> State:
        """Begin at the first draw."""
        return State.at(problem, self._drawn(problem, torch.zeros_like(problem.y)))

    def step(self, model: nn.Module, problem: Problem, state: State, loss: Loss | None = None) -> State:
        """One forward at `state.point`, then the next draw."""
        with torch.no_grad():
            logits = model(state.point)
            value = problem.loss(self.loss if loss is None else loss)(logits)
        state = seen(problem, state, logits, value, cost=1, first=self.keep == "first_flip")
        return replace(state, point=self._drawn(problem, state.iteration))

    def _drawn(self, problem: Problem, iteration: Tensor) -> Tensor:
        noise = problem.noise.fold("random noise").then(iteration)
        delta = geometry.random_start(problem.x, problem.eps, self.norm, "uniform", noise)
        return geometry.place(problem.x, delta, problem.eps, self.norm, self.box)
