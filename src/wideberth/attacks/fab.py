"""FAB (Croce and Hein 2020): along the decision boundary, with a bias towards the input."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from wideberth import checks, geometry
from wideberth.attacks.base import Attack
from wideberth.attacks.linear_model import Plane, class_gradients, goals, land, nearest_plane
from wideberth.attacks.minimum_norm import nearer
from wideberth.attacks.state import AttackInputs, AttackState
from wideberth.losses import Loss


@dataclass(frozen=True)
class _Run(AttackInputs):
    """A problem that knows which restart (B,) each row is at; None: the first."""

    restart: Tensor | None = None


@dataclass(frozen=True)
class _Along(AttackState):
    """Where FAB stands.

    Attributes:
        astray: (B,) bool, whether the run leaves the input in a random direction.
    """

    astray: Tensor


@dataclass(frozen=True, kw_only=True)
class FAB(Attack):
    """Fast adaptive boundary attack (Croce and Hein 2020): a small perturbation, without a step size to tune.

    Each step replaces the model by its linear model at the current point and takes the nearest boundary of that. The
    current point and the input are both brought there, inside the box, and the next point lies between the two, a
    little beyond. From a misclassified point the run first goes back towards the input. The method is the same for any
    scale of the logits.

    With targets (FAB-T) a step heeds the boundary between label and target alone: a forward and one input gradient.
    Without, it costs a forward and K - 1 input gradients. Where nothing but one target counts, it heeds the boundary
    between that and the class now ahead; with several rivals in the way, it may fail where the target can be reached.

    What we do differently: the original asks the model twice in each step, for the linear model and whether the new
    point is misclassified. Here the linear model is taken at the new point, also where that is misclassified and the
    step then starts a little before it; as long as both lie in one linear region of the network it is the same. Every
    run begins with a look at the input. Restarts after the first leave it for a random point, at most half of eps away
    and no further than the boundary seems to be (so that an infinite eps has a scale too); the original draws it at
    exactly half of eps.

    Attributes:
        steps: >= 1; the input itself is looked at first, so a run asks once more.
        alpha_max: the largest weight of the input in the next point, in [0, 1].
        eta: how far the next point goes, in units of the way to the boundary, >= 1.
        beta: the share of a perturbation that is left when a run goes back, in [0, 1].
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
        """A look at the input, and one after each step."""
        return self.steps + 1

    def prepared(self, inputs: AttackInputs, run: Tensor, likely: Tensor | None) -> AttackInputs:
        """As every attack's, and with the number of the restart, which decides where a run goes first."""
        inputs = super().prepared(inputs, run, likely)
        ranks = 1 if likely is None else len(self.runs(likely.shape[1] + 1)) // self.restarts
        known = {field.name: getattr(inputs, field.name) for field in fields(AttackInputs)}
        return _Run(**known, restart=run // ranks)

    def init(self, inputs: AttackInputs) -> _Along:
        """Begin at the clean inputs."""
        restart = inputs.restart if isinstance(inputs, _Run) else None
        astray = torch.zeros_like(inputs.y) if restart is None else restart
        return _Along.at(inputs, inputs.x, astray=astray > 0)

    def step(self, model: nn.Module, inputs: AttackInputs, state: AttackState, loss: Loss | None = None) -> AttackState:
        """One forward and the class gradients at `state.point`, then one step along the boundary."""
        del loss  # there is none: what counts is which class is ahead
        assert isinstance(state, _Along)
        x = inputs.x.to(torch.promote_types(inputs.x.dtype, torch.float32))
        found = class_gradients(model, state.point, goals(inputs))
        now = inputs.goal_reached(found.logits)
        away = state.point - x
        back = away * geometry.column(torch.where(now, self.beta, 1).to(away.dtype), away)
        plane = nearest_plane(found, state.point, x + back, self.norm)
        first = state.iteration == 0
        state = nearer(inputs, state, now, geometry.norm(away, self.norm), found.cost)
        delta, distance = self._along(x, back, plane)
        if self.restarts > 1:
            leave = geometry.column(first & state.astray, delta)
            delta = torch.where(leave, self._stray(inputs, distance), delta)
        return replace(state, point=land(inputs.x, delta, self.box))

    def _along(self, x: Tensor, back: Tensor, plane: Plane) -> tuple[Tensor, Tensor]:
        """From x + `back`, the next perturbation (B, ...), and how far the boundary is from x itself (B,)."""
        # One after the other: twice the rows at once would not stay in a CPU's cache.
        from_here, from_input = (plane.step_from(point, self.norm, self.box) for point in (x + back, x))
        here, there = geometry.norm(from_here, self.norm), geometry.norm(from_input, self.norm)
        total = here + there
        share = torch.where(total > 0, here / total, 0).clamp_max(self.alpha_max)
        alpha = geometry.column(share, back)
        return torch.lerp(back + self.eta * from_here, self.eta * from_input, alpha), there

    def _stray(self, inputs: AttackInputs, distance: Tensor) -> Tensor:
        """A random perturbation, of at most half of eps and at most as long as the way to the boundary (B,)."""
        # A model without a gradient puts the boundary nowhere: at 0, which is no scale.
        known = torch.where(distance > 0, distance, float("inf"))
        reach = torch.minimum(inputs.eps / 2, known)
        reach = torch.where(reach.isinf(), 0, reach)
        return geometry.random_start(inputs.x, reach, self.norm, "uniform", inputs.noise.fold("restart"))
