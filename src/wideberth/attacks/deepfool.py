"""DeepFool (Moosavi-Dezfooli et al. 2016): on to the nearest boundary of the linear model, again and again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, hyperplanes
from wideberth.attacks.base import Attack
from wideberth.attacks.linear_model import Plane, class_gradients, goal_differences, nearest_plane, rounded_off_input
from wideberth.attacks.minimum_norm import record_closer
from wideberth.attacks.state import AttackInputs, AttackState

_NO_BOX = (float("-inf"), float("inf"))


@dataclass(frozen=True)
class DeepFoolState(AttackState):
    """The state of DeepFool.

    Attributes:
        total: (B, ...) the perturbation to the boundary, as estimated so far.
        overshoot: (B,) fraction of `total` by which `point` lies beyond it.
    """

    total: Tensor
    overshoot: Tensor


@dataclass(frozen=True, kw_only=True)
class DeepFool(Attack[DeepFoolState]):
    """DeepFool (Moosavi-Dezfooli et al. 2016): a cheap estimate of the smallest perturbation, and a loose one.

    Each step replaces the model by its linear model at the current point and goes straight to the nearest boundary of
    that, and a little beyond. A step costs one forward and an input gradient for each class considered, one with a
    target. There is no randomness in it: further restarts find the same again.

    What we do differently: the original ends at the first success, which lies 2 % beyond the boundary and not at its
    nearest point. Here the run starts again from the input, towards what the linear model at the success says is
    nearest to the input, with half the overshoot; the closest success is kept. So on a linear model the result
    converges to the smallest perturbation, and on networks it comes much closer than the first. Where the linear model
    is taken, beyond the boundary, and where a step starts, on it, are kept apart, so that overshoots do not add up.
    Entries that have come to a face of the box are left out of the step.

    Attributes:
        steps: >= 1; the input itself is queried first, so there is one query more.
        overshoot: >= 0, share of the perturbation that is added to it to cross the boundary.
        candidates: classes considered, those of largest logit other than the label; >= 1.
    """

    steps: int = 50
    overshoot: float = 0.02
    candidates: int = 10

    minimum_norm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        super().__post_init__()
        checks.at_least("steps", self.steps, 1)
        checks.at_least("overshoot", self.overshoot, 0)
        checks.at_least("candidates", self.candidates, 1)

    @property
    def num_steps(self) -> int:
        """A query of the input, and one after each step."""
        return self.steps + 1

    def init(self, inputs: AttackInputs) -> DeepFoolState:
        """At the clean input."""
        total = torch.zeros_like(inputs.x, dtype=torch.promote_types(inputs.x.dtype, torch.float32))
        overshoot = torch.full_like(inputs.eps, self.overshoot)
        return DeepFoolState.initial(inputs, inputs.x, total=total, overshoot=overshoot)

    def update(self, model: nn.Module, inputs: AttackInputs, state: DeepFoolState) -> DeepFoolState:
        """One forward and the class gradients at `state.point`; then to the nearest boundary, and a little beyond."""
        found = class_gradients(model, state.point, goal_differences(inputs, self.candidates))
        success = inputs.goal_reached(found.logits)
        x = inputs.x.to(state.total.dtype)
        distance = geometry.norm(state.point - x, self.norm)
        state = record_closer(inputs, state, success, distance, found.cost)
        again = geometry.column(success, x)
        start = torch.where(again, x, x + state.total)
        plane = nearest_plane(found, state.point, start, self.norm)
        step = torch.where(again, plane.step_from(x, self.norm, self.box), self._onward(plane, start))
        total = (start + step).clamp(*self.box) - x
        overshoot = torch.where(success, state.overshoot / 2, state.overshoot)
        point = rounded_off_input(inputs.x, total * geometry.column(1 + overshoot, total), self.box)
        return replace(state, point=point, total=total, overshoot=overshoot)

    def _onward(self, plane: Plane, start: Tensor) -> Tensor:
        """The step as if there were no box, of the entries that are not at its face yet; to be clamped.

        Before the boundary is found, this is better than the way there inside the box: where the gradient is small and
        the boundary seems far, that would lead to the farthest corner.
        """
        ahead = plane.at(start)
        outward = plane.normal * geometry.column(-ahead, start)
        room = torch.where(outward > 0, start < self.box[1], start > self.box[0])
        return hyperplanes.shortest_step(start, plane.normal * room, -ahead, self.norm, _NO_BOX)
