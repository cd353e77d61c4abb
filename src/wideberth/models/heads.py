"""Last layers other than a linear one, and the word by which a network takes them: `head="cosine"`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from wideberth.checks import InputError, at_least
from wideberth.configuration import construct, import_object, parse_call

Head: TypeAlias = str | Callable[[int, int], nn.Module]


class CosineHead(nn.Linear):
    """Logits that are scaled cosines between features and class weights (Pang et al., NeurIPS 2020; Wang et al., 2018).

    What hypersphere embedding and additive-margin softmax train; their margin belongs to the loss, the scale is here.

    Args:
        features: how many features come in, >= 1.
        classes: number of classes, >= 2.
        scale: what a cosine of one is as a logit, > 0; 15 by default as in the paper.

    Input (B, features); output (B, classes) logits in [-scale, scale].

    Raises:
        InputError: when a size or the scale is out of range.

    What we do differently: the authors' model returns cosines, before which cross-entropy is nearly flat and attacks
    see no gradient; ours returns scale * cosine. They overwrite the weights by normalised ones in every forward, which
    undoes weight decay, averaging and perturbation of weights; here the stored weights are those of the optimizer.
    """

    def __init__(self, features: int, classes: int, scale: float = 15.0) -> None:
        _valid_sizes(features, classes)
        _positive("scale", scale)
        super().__init__(features, classes, bias=False)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """Scaled cosines (B, K) of features (B, D)."""
        # Features that are all zero have the gradient of a length of 1e-6; torch's 1e-12 is zero in float16.
        return self.scale * linear(normalize(input, dim=-1, eps=1e-6), normalize(self.weight, dim=-1, eps=1e-6))

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"{super().extra_repr()}, scale={self.scale}"


class MahalanobisHead(nn.Module):
    """Logits that are negative squared distances to fixed class centres (max-Mahalanobis, Pang et al., ICLR 2020).

    The centres lie on a sphere, each as far from every other as from any, so that growing weights move no class away
    from another. With the default scale a sample at its own centre leads by 0.1 radius^2 K / (K - 1) logits, 11 for ten
    classes at radius 10. At the original's scale of 1 it leads by 222, where float32 rounds cross-entropy and its
    gradient to exactly zero: attacks that climb cross-entropy stay where they are, and the model looks robust.

    Args:
        features: how many features come in, >= classes - 1.
        classes: number of classes K, >= 2.
        radius: length of the centres, > 0; two of them are radius * sqrt(2 K / (K - 1)) apart.
        scale: factor of the squared distances, > 0; 1 in the original.
        embed: whether a linear layer, features to features, comes first, as the authors have it: what an activation
            such as ReLU leaves is never negative, and the centres are.

    Input (B, features); output (B, classes) logits <= 0.

    Raises:
        InputError: when a size, the radius or the scale is out of range.

    What we do differently: the scale. The authors load centres from a file made by the recursion that `simplex`
    writes in closed form; theirs for fewer features than classes - 1, found numerically, are refused here.
    """

    centers: Tensor

    def __init__(
        self, features: int, classes: int, radius: float = 10.0, scale: float = 0.05, embed: bool = True
    ) -> None:
        _valid_sizes(features, classes)
        if features < classes - 1:
            raise InputError(
                f"features={features}: must be at least {classes - 1}, as {classes} centres at equal distances need"
            )
        _positive("radius", radius)
        _positive("scale", scale)
        super().__init__()
        self.embed = nn.Linear(features, features) if embed else nn.Identity()
        self.radius, self.scale = radius, scale
        self.register_buffer("centers", radius * simplex(classes, features))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of features (B, features)."""
        features = self.embed(x)
        # The square written out: (B, classes, features) differences would not fit in memory for a thousand classes.
        squared = features.square().sum(-1, keepdim=True) + self.radius**2
        logits: Tensor = self.scale * (2 * linear(features, self.centers) - squared)
        return logits.clamp_max(0)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        classes, features = self.centers.shape
        return f"features={features}, classes={classes}, radius={self.radius}, scale={self.scale}"


def simplex(classes: int, features: int) -> Tensor:
    """Unit vectors with inner product -1 / (classes - 1) between any two, the least that so many can have.

    Coordinate j is zero in the vectors before the j-th and has one value in all after it, which makes the inner
    products with vector j right; the last coordinate of each vector makes its length one.

    Args:
        classes: how many vectors, >= 2.
        features: their dimension, >= classes - 1.

    Returns:
        (classes, features), of torch's default dtype.
    """
    after = torch.arange(classes - 1, 0, -1, dtype=torch.float64)  # how many vectors come after the j-th
    own = (classes * after / ((classes - 1) * (after + 1))).sqrt()
    vectors = torch.zeros(classes, features, dtype=torch.float64)
    vectors[:, : classes - 1] = (-own / after).expand(classes, -1).tril(-1)
    vectors.diagonal().copy_(torch.cat([own, own.new_zeros(1)])[: min(classes, features)])
    return vectors.to(torch.get_default_dtype())


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "cosine": CosineHead,
    "mahalanobis": MahalanobisHead,
}


def last_layer(name: Head, features: int, classes: int) -> nn.Module:
    """A new last layer of a network.

    Args:
        name: "linear", "cosine" or "mahalanobis"; an import path, with arguments where needed, such as
            "wideberth.models.CosineHead(scale=10)"; or a callable that takes `features` and `classes`.
        features: how many features come in.
        classes: how many logits go out.

    Raises:
        InputError: when the name is unknown, does not lead to an `nn.Module`, or the head refuses its arguments.
    """
    if isinstance(name, str):
        path, args, kwargs = parse_call(name)
        if path not in HEADS and not {".", ":"} & set(path):
            raise InputError(
                f"head={name!r}: accepted are {', '.join(HEADS)}, "
                "or an import path such as wideberth.models.CosineHead(scale=10)"
            )
        factory = HEADS[path] if path in HEADS else import_object(path)
        layer = construct(factory, f"head {path}", features, classes, *args, **kwargs)
    elif isinstance(name, nn.Module):
        raise InputError(f"head={name!r}: is one layer, must be what makes a new one, such as its class")
    else:
        layer = construct(name, f"head {name!r}", features, classes)
    if not isinstance(layer, nn.Module):
        raise InputError(f"head={name!r}: must give an nn.Module, gave {type(layer).__name__}")
    return layer


def _valid_sizes(features: int, classes: int) -> None:
    at_least("features", features, 1)
    at_least("classes", classes, 2)


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise InputError(f"{name}={value}: must be a finite number > 0")
