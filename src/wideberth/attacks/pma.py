"""The probability margin attack (PMA; Xie et al. 2025), from diverse starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.attacks.base import Attack, input_gradient
from wideberth.attacks.state import AttackInputs, ProjectedState
from wideberth.losses import Loss


@dataclass(frozen=True, kw_only=True)
class PMA(Attack[ProjectedState]):
    """Probability margin attack (Xie et al. 2025): steepest ascent on the largest other probability minus the label's.

    Its step size falls from `largest` * eps to `smallest` * eps along a cosine. Before that, a restart may move away
    from where others went: `diverse` steps of length eps along a random direction of the logits (output-diversified
    starts, Tashiro et al. 2020; their use for fast evaluations is from Liu et al. 2022).

    What we do differently: where the label leads so far that the probabilities are flat, the logit margin is ascended
    instead, so that a scale of the logits hides nothing. The published attack splits the margin in two for the first
    half of the steps (its code even ascends the label's own probability in the first one); here the random directions
    serve that purpose.

    Attributes:
        steps: of the ascent, >= 1, not counting the diverse ones.
        diverse: steps along a random direction of the logits beforehand, >= 0.
        largest: first step size, in units of eps.
        smallest: last step size, in units of eps.
        loss: what is ascended; (logits, y) -> (B,).
        draws: passes that a gradient is the mean of, for randomised models.
    """

    steps: int = 20
    diverse: int = 5
    largest: float = 1.0
    smallest: float = 0.05
    loss: Loss = losses.unsaturated_margin_loss
    draws: int = 1

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        super().__post_init__()
        checks.at_least("steps", self.steps, 1)
        checks.at_least("diverse", self.diverse, 0)
        checks.at_least("draws", self.draws, 1)
        checks.at_least("smallest", self.smallest, 0)
        checks.at_least("largest", self.largest, self.smallest)

    @property
    def num_steps(self) -> int:
        """Diverse steps and ascent, and a query of the last point."""
        return self.diverse + self.steps + 1

    def init(self, inputs: AttackInputs) -> ProjectedState:
        """At the clean input."""
        return ProjectedState.initial_in_ball(inputs, inputs.x, self.norm, self.box)

    def update(self, model: nn.Module, inputs: AttackInputs, state: ProjectedState) -> ProjectedState:
        """One forward and one input gradient; then one step up the margin or, early on, a direction of the logits."""
        margin = inputs.attack_loss(self.loss)
        early = state.iteration < self.diverse

        def ascended(logits: Tensor) -> Tensor:
            wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
            direction = 2 * inputs.noise.fold("direction").uniform(wide.shape[1:], wide.dtype) - 1
            # Both are computed for every row; `where` lets only one of them send a gradient back.
            return torch.where(early, (direction * wide).sum(1), margin(wide))

        logits, loss, gradient = input_gradient(model, state.point, ascended, self.draws)
        # The loss of an early row is not its margin.
        loss = torch.where(early, float("-inf"), loss)
        size = inputs.eps * torch.where(early, self.largest, self._step_size(state.iteration))
        step = geometry.column(size, inputs.x) * geometry.steepest(gradient, self.norm)
        point = state.projected(inputs, state.point, step, self.norm, self.box)
        return replace(state.recorded(inputs, logits, loss, cost=2 * self.draws), point=point)

    def _step_size(self, iteration: Tensor) -> Tensor:
        """The step size in units of eps, (B,): a cosine from the largest to the smallest."""
        done = (iteration - self.diverse).clamp_min(0) / max(1, self.steps - 1)
        return self.smallest + (self.largest - self.smallest) * (1 + torch.cos(math.pi * done.clamp_max(1))) / 2
