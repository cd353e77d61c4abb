"""A smooth flow of the pixels (stAdv; Xiao et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from wideberth import checks, geometry, losses
from wideberth.attacks.base import Attack, input_gradient
from wideberth.attacks.pgd import ScaledStep
from wideberth.attacks.spatial import images_only, input_where_eps_is_zero, pixel_positions, sampled
from wideberth.attacks.state import AttackInputs, AttackState
from wideberth.geometry import Start
from wideberth.losses import Loss

_SMOOTH = 1e-8
"""Under the root of the roughness, which would have no derivative where the flow is constant."""


@dataclass(frozen=True)
class FlowState(AttackState):
    """The state of the flow attack.

    Attributes:
        flow: (B, 2, H, W) displacements in pixels, rows first, that lead to `point`.
    """

    flow: Tensor


@dataclass(frozen=True, kw_only=True)
class Flow(Attack[FlowState]):
    """A smooth flow of the pixels (stAdv; Xiao et al. 2018), by projected gradient steps on the flow.

    Each pixel takes the value that the input has at a displaced position, up to eps pixels away along each axis: eps is
    the largest absolute entry of the flow, in pixels, and eps = 0 returns the input bit for bit. It is not the radius
    of a norm ball around x, and `norm` has no effect. Defined on images (B, C, H, W); no position lies outside.

    The steps ascend loss - `tau` * roughness, where the roughness is the sum of ||flow(p) - flow(q)||_2 over all pairs
    of pixels p, q next to each other in a row or column. Among the flows queried, the one of highest loss that is
    misclassified is returned, or else the one of highest loss.

    What we do differently: the paper minimises roughness and margin together by L-BFGS, without a limit; here the flow
    is bounded, so that eps says how far pixels may move, and steps go along the sign of the gradient.

    Attributes:
        steps: how many, >= 1; the point of the last one takes one more forward and input gradient.
        step_size: in pixels, or a `ScaledStep` that follows eps.
        start: "none" (no flow), "uniform" (each entry in [-eps, eps]) or "gaussian" (0.001 * N(0, 1) pixels).
        tau: weight of the roughness, >= 0; with 0, the displacements of pixels are independent.
        loss: what is ascended; (logits, y) -> (B,).
    """

    steps: int = 20
    step_size: float | ScaledStep = field(default=ScaledStep())
    start: Start = "none"
    tau: float = 0.05
    loss: Loss = losses.margin_loss

    norm_bounded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that make no sense (`InputError`)."""
        super().__post_init__()
        checks.at_least("steps", self.steps, 1)
        checks.at_least("tau", self.tau, 0)
        checks.choice("start", self.start, ("uniform", "gaussian", "none"))
        if isinstance(self.step_size, int | float):
            checks.at_least("step_size", self.step_size, 0)

    @property
    def num_steps(self) -> int:
        """The steps, and a query of the last point."""
        return self.steps + 1

    def init(self, inputs: AttackInputs) -> FlowState:
        """Without a flow, or at a random one.

        Raises:
            InputError: for inputs that are not images.
        """
        images_only(self, inputs.x)
        x, eps = inputs.x, inputs.eps
        still = eps.new_zeros(len(x), 2, *x.shape[2:])
        flow = geometry.random_start(still, eps, "linf", self.start, inputs.noise.fold("flow"))
        flow = self._inside(inputs, flow)
        return FlowState.initial(inputs, self._flown(inputs, flow), flow=flow)

    def update(self, model: nn.Module, inputs: AttackInputs, state: FlowState) -> FlowState:
        """One forward and one input gradient at `state.point`, then one step of the flow."""
        logits, loss, gradient = input_gradient(model, state.point, inputs.attack_loss(self.loss))
        flow = state.flow.detach().requires_grad_()
        with torch.enable_grad():
            # By the chain rule, from the image's gradient to the flow's: no further pass of the model.
            reached = (gradient * self._sampled(inputs, flow)).sum() - self.tau * roughness(flow).sum()
            (flow_gradient,) = torch.autograd.grad(reached, flow)
        size = self.step_size(inputs.eps, self.steps) if callable(self.step_size) else self.step_size
        stride = geometry.column(geometry.per_sample(size, flow), flow)
        moved = state.flow + stride * geometry.steepest(flow_gradient.nan_to_num(nan=0.0), "linf")
        moved = self._inside(inputs, geometry.project(moved, inputs.eps, "linf"))
        state = state.recorded(inputs, logits, loss, cost=2)
        return replace(state, point=self._flown(inputs, moved), flow=moved)

    def _inside(self, inputs: AttackInputs, flow: Tensor) -> Tensor:
        """The nearest flow that does not leave the image."""
        rows, columns = pixel_positions(inputs.x, flow.dtype)
        down, across = flow.unbind(1)
        return torch.stack([down.clamp(-rows, rows.flip(1)), across.clamp(-columns, columns.flip(2))], dim=1)

    def _sampled(self, inputs: AttackInputs, flow: Tensor) -> Tensor:
        rows, columns = pixel_positions(inputs.x, flow.dtype)
        return sampled(inputs.x.to(flow.dtype), rows + flow[:, 0], columns + flow[:, 1])

    def _flown(self, inputs: AttackInputs, flow: Tensor) -> Tensor:
        return input_where_eps_is_zero(inputs.x, self._sampled(inputs, flow), inputs.eps, self.box)


def roughness(flow: Tensor) -> Tensor:
    """How much a flow (B, 2, H, W) differs between neighbours: the sum of ||flow(p) - flow(q)||_2 over all, (B,)."""
    pairs = flow.diff(dim=2).flatten(2), flow.diff(dim=3).flatten(2)
    return (torch.cat(pairs, dim=2).square().sum(1) + _SMOOTH).sqrt().sum(1)
