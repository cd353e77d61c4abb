"""Regularizers: what the shape of the function pays. Each gives one value per sample, so that a weight means the same
at every batch size; published code that squares the gradient of a batch mean divides by B once more, and its weights
are converted in the recipes.

Here are those of the Jacobian and of the weights; those of the loss around a point are in `linearity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from wideberth import checks
from wideberth.models.heads import CosineHead
from wideberth.modes import Mode
from wideberth.randomness import Noise
from wideberth.training.linearity import Curvature, GradientAlignment, InputGradient, LocalLinearity
from wideberth.training.penalty import Regularizer, Where, positive, settled, squared_norm
from wideberth.training.schedules import Schedule

__all__ = [
    "Curvature",
    "EffectiveMargin",
    "GradientAlignment",
    "InputGradient",
    "Jacobian",
    "LocalLinearity",
    "Regularizer",
    "WeightNorm",
    "Where",
    "settled",
    "squared_norm",
]

_TINY = 1e-12
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, CosineHead)


def squared_jacobian(logits: Tensor, point: Tensor) -> Tensor:
    """||J||_F^2 of each row's Jacobian of `logits` (B, K) at `point`, (B,): one backward per class."""
    return torch.stack([squared_norm(column, point) for column in logits.unbind(1)]).sum(0)


def projected_jacobian(logits: Tensor, point: Tensor, noise: Noise, draws: int) -> Tensor:
    """K * ||J^T v||^2, the mean over `draws` random unit vectors v per row, (B,): unbiased for ||J||_F^2."""
    classes = logits.shape[1]
    total = torch.zeros(len(point), dtype=logits.dtype, device=logits.device)
    for draw in range(draws):
        direction = noise.fold("projection", draw).normal((classes,), logits.dtype)
        direction = direction / direction.norm(dim=1, keepdim=True)
        total = total + squared_norm((direction * logits).sum(1), point)
    return total.mul(classes / draws)


class EffectiveMargin(Regularizer):
    """Effective margin regularisation (EMR; Liu and Chan 2022): keep the effective weight, the Jacobian J, small.

    Cross-entropy can be lowered by scaling the logits, which widens no margin; the effective margin is the logit
    margin over the norm of the effective weight, so the norm is what pays.

    Args:
        weight: factor of the mean penalty; a number or a `Schedule`.
        estimator: "exact": ||J||_F^2, one backward per class (the paper's version for small networks). "projection":
            K * ||J^T v||^2 for random unit vectors v, an unbiased estimate of the former in one backward per draw
            (Hoffman et al. 2019, without their factor 1/2). "softmax": ||J^T q||^2 with q = softmax(z / temperature),
            detached: one backward, the released large-scale version.
        temperature: of "softmax". Towards 0 it penalises the predicted logit alone, towards infinity the mean logit
            (which cross-entropy does not see). The authors use 40 with PGD-AT, 1 with TRADES.
        draws: of "projection".
        mode: of the model meanwhile, see `Regularizer`.

    What we do differently: the released code squares the gradient of the batch mean, which divides the penalty by B
    once more; ours is the mean over samples. Their lambda 3 at batch size 128 is our weight 3/128.
    """

    def __init__(
        self,
        weight: float | Schedule,
        estimator: Literal["exact", "projection", "softmax"] = "projection",
        temperature: float = 1.0,
        draws: int = 1,
        mode: Mode = "eval",
    ) -> None:
        super().__init__(weight, mode)
        checks.choice("estimator", estimator, ("exact", "projection", "softmax"))
        positive("temperature", temperature)
        checks.at_least("draws", draws, 1)
        self.estimator, self.temperature, self.draws = estimator, temperature, draws

    def compute(self, model: nn.Module, point: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """The estimate of each sample's squared effective weight norm, (B,)."""
        logits = model(point)
        if self.estimator == "softmax":
            mixture = (logits / self.temperature).softmax(1).detach()
            return squared_norm((mixture * logits).sum(1), point)
        if self.estimator == "exact":
            return squared_jacobian(logits, point)
        return projected_jacobian(logits, point, noise, self.draws)


class Jacobian(Regularizer):
    """Jacobian regularisation (Hoffman, Roberts and Yaida 2019): half of ||J||_F^2, the Jacobian of the logits.

    `EffectiveMargin` without its other estimator, at half its weight: in the terms of its own paper.

    Args:
        weight: factor of the mean penalty; a number or a `Schedule`. The authors use 0.01.
        draws: random projections whose mean is the estimate.
        exact: take one backward per class instead, and draw nothing.
        mode: of the model meanwhile, see `Regularizer`.

    What we do differently: nothing in the value. The model is in eval mode, theirs in train mode, where batch norm
    couples the samples.
    """

    def __init__(self, weight: float | Schedule, draws: int = 1, exact: bool = False, mode: Mode = "eval") -> None:
        super().__init__(weight, mode)
        checks.at_least("draws", draws, 1)
        self.draws, self.exact = draws, exact

    def compute(self, model: nn.Module, point: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """Half of each sample's squared Frobenius norm, or of its estimate, (B,)."""
        logits = model(point)
        if self.exact:
            return squared_jacobian(logits, point) / 2
        return projected_jacobian(logits, point, noise, self.draws) / 2


def unnormalised(model: nn.Module) -> list[str]:
    """The names of the linear and convolution layers after the last normalisation, in the order of registration.

    What a normalisation divides by shrinks along with the weights before it, through any layers that are linear or
    ReLUs: their scale is free, also that of residual branches which meet at a later normalisation. A `CosineHead`
    normalises its features and its own weight.
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
    changes neither the function nor the penalty. It asks nothing of the model, is the same for every sample, and may
    be negative. Switch the optimizer's weight decay off for these layers.

    Args:
        weight: factor of the penalty; a number or a `Schedule`.
        sparsity: factor of the sum of ||W||_1 / ||W||_2, added to the above. It is invariant to scale as well.
        layers: names of the layers that count. None: the linear and convolution layers that no normalisation comes
            after in the order of `model.named_modules()`. Where the scale is free, the penalty has no lower bound.
        mode: of the model meanwhile, see `Regularizer`.

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
            length = torch.linalg.vector_norm(weight).clamp_min(_TINY)  # of a layer that starts at zero, too
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
