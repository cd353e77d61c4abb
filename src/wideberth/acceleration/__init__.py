"""The optimised copy of a network: the same function in less time, for attacks that search with it.

Each pass is one file. It builds a copy, compares the copy's logits with those of the network that it was given on a few
inputs, and is left out where they differ. What an attack finds on a copy is checked on the network itself.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from torch import Tensor, nn

from wideberth import checks
from wideberth.acceleration.bfloat16 import in_bfloat16
from wideberth.acceleration.folding import folded

__all__ = ["Precision", "optimised_copy"]

Precision: TypeAlias = Literal["float32", "bfloat16"]
"""What the copy computes in; "float32" leaves every layer in the precision that it has."""


def optimised_copy(model: nn.Module, x: Tensor, precision: Precision = "float32") -> nn.Module:
    """A faster copy of a network, or the network itself where no pass applies.

    Nothing is printed when a pass fails. The network is left as it is.

    Args:
        model: any module that maps inputs to logits (B, K); it may be an optimised copy in float32, which saves time.
        x: (B, ...) inputs on the model's device, on which each copy is compared with what it was made from.
        precision: "float32" folds batch norms into convolutions; "bfloat16" also computes most layers in bfloat16,
            where the inputs are float32 and the device has bfloat16 arithmetic.

    Returns:
        A module in eval mode whose parameters take no gradients; `model` itself where no pass applies.

    Raises:
        InputError: for a precision of another name.
    """
    checks.choice("precision", precision, get_args(Precision))
    copy = folded(model, x)
    return in_bfloat16(copy, x) if precision == "bfloat16" else copy
