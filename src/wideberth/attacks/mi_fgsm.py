"""MI-FGSM (Dong et al. 2018): gradient ascent that accumulates its directions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wideberth import checks, geometry
from wideberth.attacks.base import Query
from wideberth.attacks.pgd import GradientAscent, ScaledStep
from wideberth.attacks.state import AttackInputs, ProjectedState
from wideberth.geometry import Start

_EQUAL_STEPS = ScaledStep(1.0)


@dataclass(frozen=True, kw_only=True)
class MomentumState(ProjectedState):
    """The state of MI-FGSM.

    Attributes:
        momentum: (B, ...) the decayed sum of the gradients, each of unit l1 norm.
    """

    momentum: Tensor


@dataclass(frozen=True, kw_only=True)
class MIFGSM(GradientAscent[MomentumState]):
    """The momentum iterative method (MI-FGSM; Dong et al. 2018): steepest steps along the accumulated gradient.

    Gradients count equally, whatever their length: each is scaled to unit l1 norm before it is added. Such directions
    transfer better to models other than the one attacked. Costs, and what is not listed here, are those of `PGD`.

    The paper defines linf and l2. In l1 a step goes in the one entry where the momentum is largest and there is room.

    Attributes:
        step_size: eps / steps by default.
        start: "none" by default.
        decay: of the momentum from step to step, >= 0; 0 is iterative FGSM.
    """

    step_size: float | ScaledStep = _EQUAL_STEPS
    start: Start = "none"
    decay: float = 1.0

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        super().__post_init__()
        checks.at_least("decay", self.decay, 0)

    def init(self, inputs: AttackInputs) -> MomentumState:
        """As PGD, without momentum."""
        none = torch.zeros_like(inputs.x, dtype=inputs.eps.dtype)
        state = MomentumState.initial_in_ball(inputs, inputs.x, self.norm, self.box, momentum=none)
        return self.starting(inputs, state)

    def move(self, inputs: AttackInputs, state: MomentumState, query: Query) -> MomentumState:
        """Add the gradient to the momentum, and step along that."""
        gradient = query.gradient.to(inputs.eps.dtype).nan_to_num(nan=0.0)
        momentum = self.decay * state.momentum + _unit(gradient)
        return self.stepped(inputs, replace(state, momentum=momentum), momentum)


def _unit(gradient: Tensor) -> Tensor:
    """The gradient at unit l1 norm; zero where it is zero."""
    # By the largest entry first: the sum of entries of 1e-40 would have lost its digits, that of 1e38 overflow.
    scale = geometry.norm(gradient, "linf")
    scaled = gradient / geometry.column(torch.where(scale > 0, scale, 1), gradient)
    return scaled / geometry.column(geometry.norm(scaled, "l1").clamp_min(1), gradient)
