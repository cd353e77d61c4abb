"""Weight-scale-shift-invariant regularisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from wideberth import checks
from wideberth.models.heads import CosineHead
from wideberth.modes import Mode
from wideberth.randomness import Noise
from wideberth.training.regularizers.base import Regularizer
from wideberth.training.schedules import Schedule

_TINY = 1e-12
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, CosineHead)


def unnormalised(model: nn.Module) -> list[str]:
    """The names of the linear and convolution layers after the last normalisation, in the order of registration.

    A normalisation divides by a quantity that scales with the weights before it, through any linear layers and ReLUs.
    The scale of those weights is therefore free, also in residual branches that meet at a later normalisation. A
    `CosineHead` normalises its features and its own weight.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, _NORMS):
            found.clear()
        elif isinstance(module, nn.Linear | _ConvNd):
            found.append(name)
    return found


class WeightNorm(Regularizer):
    """Weight-scale-shift-invariant regularisation (WEISSI; Liu, Cui and Chan 2020): the log of the product of norms.

    The sum over layers of log ||W||_2, W flattened: what one layer of a ReLU net gains in scale and another loses
    changes neither the function nor the penalty. It makes no forward, is the same for every sample, and may be
    negative. Switch the optimizer's weight decay off for these layers.

    Args:
        weight: factor of the penalty; a number or a `Schedule`.
        sparsity: factor of the sum of ||W||_1 / ||W||_2, added to the above. It is invariant to scale as well.
        layers: names of the layers that count. None: the linear and convolution layers after the last normalisation
            in the order of `model.named_modules()`. Where the scale is free, the penalty has no lower bound.
        mode: of the model, see `Regularizer`.

    What we do differently: layers before a batch norm (layer, group, ... norm) are left out. The authors' weights are
    `weight` and `weight * sparsity`.
    """

    twice = False

    def __init__(
        self,
        weight: float | Schedule,
        sparsity: float = 0.0,
        layers: Sequence[str] | None = None,
        mode: Mode = "eval",
    ) -> None:
        super().__init__(weight, mode)
        checks.at_least("sparsity", sparsity, 0)
        self.sparsity, self.layers = sparsity, layers

    def compute(self, model: nn.Module, point: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """The sum over the layers, once per sample, (B,)."""
        del y, noise
        total = torch.zeros((), dtype=point.dtype, device=point.device)
        for weight in self.weights(model):
            length = torch.linalg.vector_norm(weight).clamp_min(_TINY)  # also of a layer that starts at zero
            total = total + length.log()
            if self.sparsity:
                total = total + self.sparsity * weight.abs().sum() / length
        return total.expand(len(point))

    def weights(self, model: nn.Module) -> list[Tensor]:
        """The weights that count.

        Raises:
            InputError: where there are none, or a name of `layers` is of no layer with a weight.
        """
        names = unnormalised(model) if self.layers is None else self.layers
        if not names:
            raise checks.InputError(
                f"WeightNorm(layers={self.layers}): the model has no linear or convolution layer after its last "
                "normalisation; name the layers that are to count"
            )
        modules, found = dict(model.named_modules()), []
        for name in names:
            weight = getattr(modules.get(name), "weight", None)
            if not isinstance(weight, Tensor):
                raise checks.InputError(f"WeightNorm(layers={list(names)}): the model has no layer {name!r} of weights")
            found.append(weight)
        return found
