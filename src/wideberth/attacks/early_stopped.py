"""Early-stopped PGD, the attack of friendly adversarial training (FAT; Zhang et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wideberth import checks, geometry
from wideberth.attacks.base import Keep, Query
from wideberth.attacks.pgd import GradientAscent
from wideberth.attacks.state import AttackInputs, ProjectedState


@dataclass(frozen=True, kw_only=True)
class EarlyStoppedState(ProjectedState):
    """The state of early-stopped PGD.

    Attributes:
        steps_left: (B,) int64, steps still allowed from misclassified points; negative once the row has stopped.
    """

    steps_left: Tensor


@dataclass(frozen=True, kw_only=True)
class EarlyStoppedPGD(GradientAscent[EarlyStoppedState]):
    """PGD that stops `tau` steps after its first success (FAT; Zhang et al. 2020).

    A row takes `tau` further steps from points that are misclassified, and then stays where it is, at a misclassified
    point; steps from points that are classified correctly are not counted. With `tau` >= `steps` this is PGD. The paper
    raises `tau` from 0 to 2 over training, with 10 steps of 0.007 in linf, eps 0.031 and `omega` 0.001.

    What we do differently: rows that have stopped are masked instead of leaving the batch, so that rows stay in order
    and there is no host synchronisation; they still cost a forward and a backward per step. A tie for first place
    counts as misclassified, here as everywhere.

    Attributes:
        tau: steps taken from misclassified points, >= 0.
        omega: standard deviation of normal noise added to each step, in units of the input.
        keep: "last" alone, which is where the row stopped.
    """

    tau: int = 0
    omega: float = 0.0
    keep: Keep = "last"

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        super().__post_init__()
        checks.at_least("tau", self.tau, 0)
        checks.at_least("omega", self.omega, 0)
        checks.choice("keep", self.keep, ("last",))

    def init(self, inputs: AttackInputs) -> EarlyStoppedState:
        """As PGD, with all `tau` steps left."""
        left = torch.full_like(inputs.y, self.tau)
        state = EarlyStoppedState.initial_in_ball(inputs, inputs.x, self.norm, self.box, steps_left=left)
        return self.starting(inputs, state)

    def move(self, inputs: AttackInputs, state: EarlyStoppedState, query: Query) -> EarlyStoppedState:
        """One step along the gradient, for rows that have steps left."""
        here = state.point
        left = state.steps_left - inputs.goal_reached(query.logits).to(state.steps_left.dtype)
        step = self.ascent_step(inputs, here, query.gradient)
        if self.omega:
            noise = inputs.noise.fold("friendly").then(state.iteration - 1)
            step = step + self.omega * noise.normal(here.shape[1:], inputs.eps.dtype)
        point = state.projected(inputs, here, step, self.norm, self.box)
        return replace(state, point=geometry.choose(left >= 0, point, here), steps_left=left)
