"""One gradient step: FGSM (Goodfellow et al. 2015) and N-FGSM (de Jorge et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from wideberth import checks, geometry
from wideberth.attacks.pgd import PGD, ScaledStep
from wideberth.attacks.state import AttackInputs, ProjectedState
from wideberth.geometry import Start

_WHOLE_RADIUS = ScaledStep(1.0)


@dataclass(frozen=True, kw_only=True)
class FGSM(PGD):
    """The fast gradient sign method (Goodfellow et al. 2015): one steepest step of length eps from the clean input.

    With `start="uniform"` and `step_size=ScaledStep(1.25)` it is the training attack of "Fast is better than free"
    (Wong et al. 2020). In l2 and l1 the step is the steepest one of that norm.
    """

    steps: int = 1
    step_size: float | ScaledStep = _WHOLE_RADIUS
    start: Start = "none"


@dataclass(frozen=True, kw_only=True)
class NFGSM(FGSM):
    """Noise FGSM (de Jorge et al. 2022): one signed step of length eps from strong noise, not projected onto the ball.

    The start is uniform within `noise` * eps of the input, inside the box; the point that the step leads to is kept in
    the box alone, up to (`noise` + 1) * eps away in linf. It is a training attack at the cost of FGSM; the noise
    prevents catastrophic overfitting. It is of no use in an evaluation, because its points lie outside the ball.

    Attributes:
        noise: reach of the start in units of eps, >= 0; 2 in the paper, 3 or 4 where eps is large.
        norm: "linf" alone.
        start: "uniform" alone; `noise` says how far.

    What we do differently: the model is attacked in the mode that training chooses (eval by default), theirs in train
    mode.
    """

    noise: float = 2.0
    start: Start = "uniform"

    norm_bounded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        super().__post_init__()
        checks.choice("norm", self.norm, ("linf",))
        checks.choice("start", self.start, ("uniform",))
        checks.at_least("noise", self.noise, 0)

    def init(self, inputs: AttackInputs) -> ProjectedState:
        """At the noisy input, with the box as the only limit."""
        x = inputs.x
        delta = geometry.random_start(x, self.noise * inputs.eps, self.norm, self.start, inputs.noise)
        point = (x + delta).to(x.dtype).clamp(*self.box)
        # A row with radius 0 stays where it is, whatever the step size.
        free = geometry.column(inputs.eps > 0, x)
        low, high = (torch.where(free, torch.full_like(x, face).clamp(*self.box), x) for face in self.box)
        return ProjectedState.initial(inputs, point, low=low, high=high)
