"""Gradients in a model's input: the one place where they are taken, with the one message where there are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wideberth.checks import InputError

NO_GRADIENT = "the model's output carries no gradient to its input"


class NoInputGradient(InputError):
    """The output of a model does not depend on its input in a way that can be differentiated."""


def require_gradient(output: Tensor) -> None:
    """Refuse an output without graph.

    Args:
        output: logits or losses, from an input that takes gradients.

    Raises:
        NoInputGradient: where the output requires no gradient.
    """
    if not output.requires_grad:
        raise NoInputGradient(f"{NO_GRADIENT}: attacks by gradients and effective margins need one")


def gradient_of(output: Tensor, point: Tensor, *, retain_graph: bool = False, create_graph: bool = False) -> Tensor:
    """The gradient of each row's output in its own row of the point, (B, ...).

    Args:
        output: (B,), row i a function of row i of `point` alone; it is summed, not averaged.
        point: (B, ...) that takes gradients.
        retain_graph: whether the graph of `output` is needed again.
        create_graph: whether the gradient will be differentiated again.
    """
    keep = retain_graph or create_graph
    (gradient,) = torch.autograd.grad(
        output.sum(), point, retain_graph=keep, create_graph=create_graph, materialize_grads=True
    )
    return gradient


def input_gradient(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], draws: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and one input gradient, in which NaN is replaced by zero.

    NaN has no direction; it would spread to the point and end the attack on the row.

    Args:
        model: maps x to logits.
        x: (B, ...) where.
        loss: from logits (B, K) to losses (B,).
        draws: see `raw_input_gradient`.

    Returns:
        Logits (B, K), losses (B,), and the gradient of each row's own loss (B, ...), a tensor that the caller may
        change in place.

    Raises:
        InputError: see `raw_input_gradient`.
    """
    logits, value, gradient = raw_input_gradient(model, x, loss, draws)
    return logits, value, gradient.nan_to_num(nan=0.0)


def raw_input_gradient(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], draws: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and one input gradient as autograd returns it: it may hold NaN, and must not be changed in place.

    Args:
        model: maps x to logits.
        x: (B, ...) where.
        loss: from logits (B, K) to losses (B,).
        draws: forwards and backwards, for a randomised model: losses and gradients are means over them (expectation
            over transformation, Athalye et al. 2018), and the logits are those of the last.

    Returns:
        Logits (B, K), losses (B,), and the gradient of each row's own loss (B, ...); detached.

    Raises:
        NoInputGradient: where the model's output does not depend differentiably on its input.
        InputError: where `loss` does not return one loss per sample.
    """
    point = x.detach().requires_grad_()
    value, gradient = torch.zeros(()), torch.zeros(())
    for draw in range(draws):
        with torch.enable_grad():
            logits = model(point)
            values = loss(logits)
            require_gradient(values)
            if values.shape != x.shape[:1]:
                came = tuple(values.shape)
                raise InputError(f"the loss returned shape {came}: must be one loss per sample, ({len(x)},)")
            found = gradient_of(values, point)
        value = value + values.detach() if draw else values.detach()
        gradient = gradient + found if draw else found
    if draws > 1:
        value, gradient = value / draws, gradient / draws
    return logits.detach(), value, gradient


class Gradients(NamedTuple):
    """What one forward tells of M functions of the logits.

    Attributes:
        logits: (B, K), detached.
        values: (B, M) of the functions, in at least float32, detached.
        each: their input gradients (B, ...), in order, each computed when asked for, so that memory holds only one.
        cost: forwards and backwards per row, 1 + M.
    """

    logits: Tensor
    values: Tensor
    each: Iterator[Tensor]
    cost: int


def class_gradients(model: nn.Module, x: Tensor, functions: Callable[[Tensor], Tensor]) -> Gradients:
    """One forward, and then one input gradient for each of several functions of the logits.

    Args:
        model: maps x to logits.
        x: (B, ...) where.
        functions: from logits (B, K) to (B, M), as a rule differences of two classes.

    Returns:
        Logits, values and gradients; in the gradients, what is not finite is replaced by zero.

    Raises:
        NoInputGradient: where the model's output does not depend differentiably on its input.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        logits = model(point)
        require_gradient(logits)
        values = functions(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        columns = values.unbind(1)

    def each() -> Iterator[Tensor]:
        for rank, column in enumerate(columns, 1):
            gradient = gradient_of(column, point, retain_graph=rank < len(columns))
            # A value that is not finite has no direction.
            yield gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    return Gradients(logits.detach(), values.detach(), each(), 1 + len(columns))
