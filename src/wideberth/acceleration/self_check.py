"""Building a copy of a network and comparing it with the network; a copy that fails is dropped in silence."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
from torch import Tensor, nn

from wideberth.modes import lent


def checked_copy(
    build: Callable[[nn.Module], nn.Module], model: nn.Module, x: Tensor, tolerance: float
) -> nn.Module | None:
    """The copy that `build` makes, or None where building fails or the logits at `x` differ.

    Args:
        build: from the model in eval mode to a copy of it.
        model: any module; given back as it was.
        x: (B, ...) inputs to compare on.
        tolerance: the largest difference allowed, as a share of the largest logit.

    Returns:
        The copy, in eval mode, with parameters that take no gradients.
    """
    with lent(model), torch.no_grad(), _silence():
        try:
            copy = build(model)
            if not _same_logits(model, copy, x, tolerance):
                return None
        except Exception:  # the model's own code runs on tensors that it was not written for: anything may be raised
            return None
    return copy.eval().requires_grad_(False)


def _same_logits(model: nn.Module, copy: nn.Module, x: Tensor, tolerance: float) -> bool:
    expected, found = model(x), copy(x)
    if found.shape != expected.shape:
        return False
    return bool(((found - expected).abs() <= tolerance * expected.abs().amax().clamp_min(1e-30)).all())


@contextmanager
def _silence() -> Iterator[None]:
    """Keep stdout, stderr and warnings quiet: torch.fx prints a traceback where a traced forward fails."""
    unread = io.StringIO()
    with redirect_stdout(unread), redirect_stderr(unread), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
