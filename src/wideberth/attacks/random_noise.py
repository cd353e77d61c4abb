"""Random points of the ball: the floor that every attack with a gradient must beat."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.attacks.base import Attack
from wideberth.attacks.state import AttackInputs, AttackState
from wideberth.losses import Loss


@dataclass(frozen=True, kw_only=True)
class RandomNoise(Attack[AttackState]):
    """The worst of `tries` points drawn uniformly from the ball: one forward each, no gradient.

    In high dimensions it finds next to nothing. Where it finds what gradient attacks do not, their gradients mislead
    them, and the model only looks robust (Carlini et al. 2019, "On evaluating adversarial robustness").

    Points are uniform over the volume of the ball and then projected into the box (see `geometry.place`).

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
    def num_steps(self) -> int:
        """One query for each point."""
        return self.tries

    def init(self, inputs: AttackInputs) -> AttackState:
        """At the first random point."""
        return AttackState.initial(inputs, self._random_point(inputs, torch.zeros_like(inputs.y)))

    def update(self, model: nn.Module, inputs: AttackInputs, state: AttackState) -> AttackState:
        """One forward at `state.point`, then the next draw."""
        with torch.no_grad():
            logits = model(state.point)
            loss = inputs.attack_loss(self.loss)(logits)
        state = state.recorded(inputs, logits, loss, cost=1, first=self.keep == "first_flip")
        return replace(state, point=self._random_point(inputs, state.iteration))

    def _random_point(self, inputs: AttackInputs, iteration: Tensor) -> Tensor:
        noise = inputs.noise.fold("random noise").then(iteration)
        delta = geometry.random_start(inputs.x, inputs.eps, self.norm, "uniform", noise)
        return geometry.place(inputs.x, delta, inputs.eps, self.norm, self.box)
