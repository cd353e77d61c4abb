"""FAB (Croce and Hein 2020): along the decision boundary, with a bias towards the input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from wideberth import checks, geometry
from wideberth.attacks.base import Attack
from wideberth.attacks.linear_model import Plane, class_gradients, goal_differences, nearest_plane, rounded_off_input
from wideberth.attacks.minimum_norm import record_closer
from wideberth.attacks.state import AttackInputs, AttackState


@dataclass(frozen=True)
class FABState(AttackState):
    """The state of FAB.

    Attributes:
        random_start: (B,) bool, whether the row begins at a random point near the input.
    """

    random_start: Tensor


@dataclass(frozen=True, kw_only=True)
class FAB(Attack[FABState]):
    """Fast adaptive boundary attack (Croce and Hein 2020): a small perturbation, without a step size to tune.

    Each step replaces the model by its linear model at the current point and takes the nearest boundary of that. The
    current point and the input are both projected onto it, inside the box, and the next point is a mean of the two
    projections, extrapolated by `eta`. From a misclassified point a step first goes back towards the input. The method
    is the same for any scale of the logits.

    With targets (FAB-T) a step takes only the boundary between label and target: a forward and one input gradient.
    Without, it costs a forward and K - 1 input gradients. Where only the target counts as success, it takes the
    boundary between the target and the class that is predicted now; with several other classes between label and
    target, it may fail where the target can be reached.

    What we do differently: the original queries the model twice in each step, for the linear model and whether the new
    point is misclassified. Here the linear model is taken at the new point, also where that is misclassified and the
    step then starts a little before it; as long as both lie in one linear region of the network it is the same. The
    first query is at the input. Restarts after the first then go to a random point, at most half of eps away and no
    further than the estimated distance to the boundary (so that an infinite eps has a scale too); the original draws
    it at exactly half of eps.

    Attributes:
        steps: >= 1; the input itself is queried first, so there is one query more.
        alpha_max: the largest weight of the input in the next point, in [0, 1].
        eta: how far the next point goes, in units of the way to the boundary, >= 1.
        beta: factor of the perturbation in a step back towards the input, in [0, 1].
    """

    steps: int = 100
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    minimum_norm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        super().__post_init__()
        checks.at_least("steps", self.steps, 1)
        checks.at_least("alpha_max", self.alpha_max, 0)
        checks.at_least("eta", self.eta, 1)
        checks.at_least("beta", self.beta, 0)
        for name in ("alpha_max", "beta"):
            if getattr(self, name) > 1:
                raise checks.InputError(f"{name}={getattr(self, name)}: must be at most 1")

    @property
    def num_steps(self) -> int:
        """A query of the input, and one after each step."""
        return self.steps + 1

    def init(self, inputs: AttackInputs) -> FABState:
        """At the clean input."""
        restart = torch.zeros_like(inputs.y) if inputs.restart is None else inputs.restart
        return FABState.initial(inputs, inputs.x, random_start=restart > 0)

    def update(self, model: nn.Module, inputs: AttackInputs, state: FABState) -> FABState:
        """One forward and the class gradients at `state.point`, then one step along the boundary."""
        x = inputs.x.to(torch.promote_types(inputs.x.dtype, torch.float32))
        found = class_gradients(model, state.point, goal_differences(inputs))
        success = inputs.goal_reached(found.logits)
        away = state.point - x
        back = away * geometry.column(torch.where(success, self.beta, 1).to(away.dtype), away)
        plane = nearest_plane(found, state.point, x + back, self.norm)
        first = state.iteration == 0
        state = record_closer(inputs, state, success, geometry.norm(away, self.norm), found.cost)
        delta, distance = self._step(x, back, plane)
        if self.restarts > 1:
            random = geometry.column(first & state.random_start, delta)
            delta = torch.where(random, self._random_perturbation(inputs, distance), delta)
        return replace(state, point=rounded_off_input(inputs.x, delta, self.box))

    def _step(self, x: Tensor, back: Tensor, plane: Plane) -> tuple[Tensor, Tensor]:
        """From x + `back`, the next perturbation (B, ...), and how far the boundary is from x itself (B,)."""
        # One after the other: twice the rows at once would not stay in a CPU's cache.
        from_here, from_input = (plane.step_from(point, self.norm, self.box) for point in (x + back, x))
        here, there = geometry.norm(from_here, self.norm), geometry.norm(from_input, self.norm)
        total = here + there
        alpha = geometry.column(torch.where(total > 0, here / total, 0).clamp_max(self.alpha_max), back)
        return torch.lerp(back + self.eta * from_here, self.eta * from_input, alpha), there

    def _random_perturbation(self, inputs: AttackInputs, distance: Tensor) -> Tensor:
        """A random perturbation, of at most half of eps and at most as long as the way to the boundary (B,)."""
        # Without a gradient the estimated distance is 0, which is no scale.
        known = torch.where(distance > 0, distance, float("inf"))
        reach = torch.minimum(inputs.eps / 2, known)
        reach = torch.where(reach.isinf(), 0, reach)
        return geometry.random_start(inputs.x, reach, self.norm, "uniform", inputs.noise.fold("restart"))
