"""Ascent on the probability margin from diverse starts: what breaks most samples for the fewest gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.attacks.base import Attack, input_gradient
from wideberth.attacks.state import AttackInputs, AttackState, ProjectedState
from wideberth.losses import Loss


@dataclass(frozen=True, kw_only=True)
class PMA(Attack):
    """Probability margin attack (Xie et al. 2025): steepest ascent on the largest other probability minus the label's.

    Its step falls from `largest` * eps to `smallest` * eps along a cosine. Before that, a run may be led away from
    where others have been: `diverse` steps of length eps up a random direction of the logits (output-diversified
    starts, Tashiro et al. 2020; their use for fast verdicts is from Liu et al. 2022).

    What we do differently: where the label leads so far that the probabilities are flat, the logit margin is ascended
    in their place, so that a scale of the logits hides nothing. The published attack splits the margin in two for the
    first half of the steps (its code even ascends the label's own probability in the first one); here the random
    directions do that work.

    Attributes:
        steps: of the ascent, >= 1; the diverse ones come on top.
        diverse: steps up a random direction of the logits beforehand, >= 0; 0 goes straight uphill from the input.
        largest: first step, in units of eps.
        smallest: last step, in units of eps.
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
        """Diverse steps and ascent, and a look at where they led."""
        return self.diverse + self.steps + 1

    def init(self, inputs: AttackInputs) -> ProjectedState:
        """Start at the clean input."""
        return ProjectedState.within(inputs, inputs.x, self.norm, self.box)

    def step(self, model: nn.Module, inputs: AttackInputs, state: AttackState, loss: Loss | None = None) -> AttackState:
        """One forward and one input gradient, then one step up the margin or, early on, a direction of the logits."""
        assert isinstance(state, ProjectedState)
        ascended = inputs.loss(self.loss if loss is None else loss)
        early = state.iteration < self.diverse

        def mixed(logits: Tensor) -> Tensor:
            wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
            direction = 2 * inputs.noise.fold("direction").uniform(wide.shape[1:], wide.dtype) - 1
            # Both are computed for every row; where() lets only one of them send a gradient back.
            return torch.where(early, (direction * wide).sum(1), ascended(wide))

        logits, value, gradient = input_gradient(model, state.point, mixed, self.draws)
        # The loss of an early row is not its margin.
        value = torch.where(early, float("-inf"), value)
        stride = inputs.eps * torch.where(early, self.largest, self._pace(state.iteration))
        move = geometry.column(stride, inputs.x) * geometry.steepest(gradient, self.norm)
        point = state.moved(inputs, state.point, move, self.norm, self.box)
        return replace(state.after(inputs, logits, value, cost=2 * self.draws), point=point)

    def _pace(self, iteration: Tensor) -> Tensor:
        """The step in units of eps, (B,): a cosine from the largest to the smallest."""
        share = (iteration - self.diverse).clamp_min(0) / max(1, self.steps - 1)
        return self.smallest + (self.largest - self.smallest) * (1 + torch.cos(math.pi * share.clamp_max(1))) / 2
