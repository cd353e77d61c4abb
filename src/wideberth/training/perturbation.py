"""Perturbation of the weights: the gradient is taken at nearby weights where the loss is higher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wideberth import checks
from wideberth.checks import InputError
from wideberth.randomness import own_generators


class AWP:
    """Adversarial weight perturbation (AWP; Wu, Xia and Wang 2020): the loss should be low at nearby weights too.

    After the attack each layer's weights w move by a vector of length gamma * ||w|| along the gradient of the training
    loss; the loss and its gradient are computed there; then the weights are put back and the optimizer steps.

    Args:
        gamma: length of the move relative to the layer's weights: 0.01 for PGD-AT, 0.005 for TRADES.
        warmup: epochs before it begins: 0 for PGD-AT, 10 for TRADES.

    Only weights of more than one dimension move: no biases, no batch norm. Penalties are computed at the moved weights,
    but the direction of the move does not depend on them. With `accumulate_grad_batches` each batch moves the weights
    by itself.

    What we do differently: the weights are put back, bit for bit, before the optimizer steps instead of after it. That
    is the same step without the rounding, except that weight decay acts on the weights and not on the moved ones. The
    direction is computed on the model itself, whose batch-norm statistics are put back, where theirs needs a copy of
    the network; it meets the same dropout as the step. Radii and logged accuracies are those of the weights before the
    move.
    """

    def __init__(self, gamma: float = 0.01, warmup: int = 0) -> None:
        checks.at_least("gamma", gamma, 0)
        checks.at_least("warmup", warmup, 0)
        self.gamma, self.warmup = gamma, warmup

    def ascent(self, model: nn.Module, loss: Tensor) -> list[Tensor]:
        """The gradient of the loss, (), in each of `layers`; zero where the loss does not depend on it."""
        with torch.autocast(loss.device.type, enabled=False):
            return list(torch.autograd.grad(loss, layers(model), allow_unused=True, materialize_grads=True))

    @contextmanager
    def moved(self, model: nn.Module, ascent: Sequence[Tensor]) -> Iterator[None]:
        """Move the `layers` of the model along `ascent`, and put them back exactly as they were."""
        weights = layers(model)
        kept = [weight.detach().clone() for weight in weights]
        try:
            with torch.no_grad():
                for weight, raw in zip(weights, ascent, strict=True):
                    weight.add_(rescaled(raw, weight), alpha=self.gamma)
            torch.clear_autocast_cache()  # it holds half-precision copies of the weights before
            yield
        finally:
            with torch.no_grad():
                for weight, value in zip(weights, kept, strict=True):
                    weight.copy_(value)
            torch.clear_autocast_cache()


def layers(model: nn.Module) -> list[nn.Parameter]:
    """The weights that move: trainable parameters with "weight" in their name and more than one dimension."""
    return [p for name, p in model.named_parameters() if "weight" in name and p.dim() > 1 and p.requires_grad]


def rescaled(raw: Tensor, weight: Tensor) -> Tensor:
    """`raw` with the l2 norm of `weight`; zero where it has no direction, or none that is finite."""
    wide = torch.promote_types(raw.dtype, torch.float32)
    length = raw.to(wide).norm()
    ratio = weight.detach().to(wide).norm() / length
    return torch.where((length > 0) & length.isfinite(), raw * ratio.to(raw.dtype), 0)


@contextmanager
def without_trace(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a pass that leaves no trace: all buffers (batch-norm statistics) and the global generators are put back."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with own_generators(None, device):
            yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


def check_perturbation(perturbation: AWP | None, model: nn.Module, precision: str | None = None) -> None:
    """Refuse a model that has nothing to move, and the precision whose gradients must be scaled (`InputError`)."""
    if perturbation is None:
        return
    name = type(perturbation).__name__
    if not layers(model):
        raise InputError(f"perturbation={name}: the model has no trainable weights of more than one dimension to move")
    if precision == "16-mixed":
        raise InputError(
            f'perturbation={name} with precision="16-mixed": its gradients are taken before the loss is scaled, and '
            'would vanish in float16; use "bf16-mixed" or "32-true"'
        )
