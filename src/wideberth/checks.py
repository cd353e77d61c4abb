"""Refusing bad input: every message names the argument, what came and what is accepted, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Box: TypeAlias = tuple[float, float]
Norm: TypeAlias = Literal["linf", "l2", "l1"]


class InputError(ValueError):
    """What the caller gave cannot be used; the message is one line, fit for a terminal."""


def one_line(error: BaseException) -> str:
    """An exception as "Kind: message", on one line and short enough for a terminal: at most 200 characters.

    Control characters, which a damaged file may bring in, are replaced.
    """
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    text = "".join(character if character.isprintable() else chr(0xFFFD) for character in text)
    return text if len(text) <= 200 else text[:197] + "..."


def choice(name: str, value: object, accepted: Sequence[str]) -> None:
    """Refuse `value` unless it is one of `accepted`.

    Raises:
        InputError: naming the argument, the value and the accepted words.
    """
    if value not in accepted:
        raise InputError(f"{name}={value!r}: accepted are {', '.join(accepted)}")


def norm_name(norm: str) -> None:
    """Refuse a norm that is not "linf", "l2" or "l1" (`InputError`)."""
    choice("norm", norm, get_args(Norm))


def at_least(name: str, value: float, least: float) -> None:
    """Refuse a number below `least` or not a number (`InputError`)."""
    if not isinstance(value, Real) or not float(value) >= least:
        raise InputError(f"{name}={value}: must be at least {least}")


def share(name: str, value: float) -> None:
    """Refuse a number outside [0, 1] or not a number (`InputError`)."""
    at_least(name, value, 0)
    if value > 1:
        raise InputError(f"{name}={value}: a share, must be in [0, 1]")


def valid_box(box: Sequence[float]) -> None:
    """Refuse a box that is not (low, high) with low < high (`InputError`)."""
    if len(box) != 2 or not box[0] < box[1]:
        raise InputError(f"box={tuple(box)}: must be (low, high) with low < high")


def valid_eps(eps: float | Tensor, batch: int | None = None) -> None:
    """Refuse a radius that is not a finite number >= 0 or, where there is a batch, a (batch,) tensor of such."""
    if isinstance(eps, Tensor) and batch is not None:
        if eps.dim() and tuple(eps.shape) != (batch,):
            raise InputError(
                f"eps of shape {tuple(eps.shape)}: must be a number or one radius per sample, shape ({batch},)"
            )
        if not bool(((eps >= 0) & torch.isfinite(eps)).all()):
            raise InputError("eps holds a negative or non-finite radius: every radius must be finite and >= 0")
    elif not isinstance(eps, Real) or not 0 <= float(eps) < float("inf"):
        each = "" if batch is None else f", or a tensor of shape ({batch},)"
        raise InputError(f"eps={eps!r}: must be a finite number >= 0{each}")


def valid_inputs(x: Tensor, box: Box) -> None:
    """Refuse inputs that are empty, not floating point, not finite or outside the box (`InputError`)."""
    if x.dim() < 2 or x.shape[0] == 0:
        raise InputError(f"x of shape {tuple(x.shape)}: must be (B, ...) with at least one sample")
    if not x.is_floating_point():
        raise InputError(f"x is {x.dtype}: must be floating point, in the box {list(box)}")
    low, high = torch.aminmax(x)
    # Tensors, not numbers: a face of the box is what x's dtype makes of it, as it is where points are clamped.
    if not (low >= box[0] and high <= box[1]):
        raise InputError(f"x spans [{low:.4g}, {high:.4g}]: must lie in the box {list(box)}")


def valid_labels(y: Tensor, batch: int, classes: int) -> None:
    """Refuse labels that are not one int64 class in 0..classes-1 per sample (`InputError`)."""
    if tuple(y.shape) != (batch,) or y.dtype != torch.int64:
        raise InputError(f"y of shape {tuple(y.shape)} and {y.dtype}: must be ({batch},) classes, torch.int64")
    low, high = (int(v) for v in torch.aminmax(y))
    if low < 0 or high >= classes:
        raise InputError(f"labels span {low}..{high}: the model has {classes} classes, so 0..{classes - 1}")


def valid_logits(logits: Tensor, batch: int) -> None:
    """Refuse model outputs that are not (batch, K >= 2) finite logits (`InputError`).

    A one-column output is the classic silent failure: no attack can ever flip it.
    """
    if logits.dim() != 2 or logits.shape[0] != batch or logits.shape[1] < 2:
        raise InputError(
            f"the model returned shape {tuple(logits.shape)} for {batch} inputs: "
            f"must be logits ({batch}, K) with K >= 2 classes"
        )
    if not bool(torch.isfinite(logits).all()):
        raise InputError("the model returned NaN or infinite logits: must be finite")
