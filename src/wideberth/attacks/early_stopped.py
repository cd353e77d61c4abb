"""Early-stopped PGD, the attack of friendly adversarial training (FAT; Zhang et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wideberth import checks, geometry
from wideberth.attacks.base import Keep
from wideberth.attacks.pgd import PGD
from wideberth.attacks.state import AttackInputs, AttackState, ProjectedState


@dataclass(frozen=True, kw_only=True)
class Friendly(ProjectedState):
    """What early-stopped PGD remembers.

    Attributes:
        left: (B,) int64, steps that a row may still take while it is misclassified; it stands still where negative.
    """

    left: Tensor


@dataclass(frozen=True, kw_only=True)
class EarlyStoppedPGD(PGD):
    """PGD that stops soon after it has succeeded (FAT; Zhang et al. 2020): wrong enough to teach, no worse.

    A row takes `tau` further steps from iterates that are misclassified, and then stays where it is, at a misclassified
    iterate; a step that leads back to the right side is not counted. With `tau` >= `steps` this is PGD. The paper
    raises `tau` from 0 to 2 over training, with 10 steps of 0.007 in linf, eps 0.031 and `omega` 0.001.

    What we do differently: rows that have stopped are masked instead of leaving the batch, so that rows stay in order
    and nothing waits for the device; they still cost a forward and a backward per step. A tie for first place counts
    as misclassified, here as everywhere.

    Attributes:
        tau: steps taken from misclassified iterates, >= 0.
        omega: standard deviation of normal noise added to each step, in units of the input.
        keep: "last", which is where the row stopped; nothing else makes sense.
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

    def init(self, inputs: AttackInputs) -> Friendly:
        """Begin as PGD does, with all steps left."""
        left = torch.full_like(inputs.y, self.tau)
        return self.started(inputs, Friendly.within(inputs, inputs.x, self.norm, self.box, left=left))

    def onward(self, inputs: AttackInputs, state: AttackState, logits: Tensor, gradient: Tensor) -> AttackState:
        """One step uphill for the rows that go on."""
        assert isinstance(state, Friendly)
        here = state.point
        left = state.left - inputs.goal_reached(logits).to(state.left.dtype)
        move = self.uphill(inputs, here, gradient)
        if self.omega:
            noise = inputs.noise.fold("friendly").then(state.iteration - 1)
            move = move + self.omega * noise.normal(here.shape[1:], inputs.eps.dtype)
        point = state.moved(inputs, here, move, self.norm, self.box)
        point = geometry.choose(left >= 0, point, here)
        return replace(state, point=point, left=left)
