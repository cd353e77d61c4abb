"""Named line-ups of attacks: what a verdict is made of, in the order it is run."""

from __future__ import annotations

from collections.abc import Callable

from wideberth import losses
from wideberth.attacks.base import Attack
from wideberth.attacks.gradient import PGD
from wideberth.checks import Box, Norm, choice


def pgd(norm: Norm = "linf", box: Box = (0.0, 1.0), steps: int = 20, restarts: int = 2) -> dict[str, Attack]:
    """PGD on the margin and on the cross-entropy, each with restarts.

    The margin comes first: it breaks nearly all that the cross-entropy breaks (and, unlike it, does not care how the
    logits are scaled), so that the second attack finds few rows left. `keep="worst"` judges every iterate.
    """

    def attack(loss: losses.Loss) -> PGD:
        return PGD(norm=norm, box=box, steps=steps, restarts=restarts, loss=loss, keep="worst")

    return {"PGD margin": attack(losses.margin_loss), "PGD cross-entropy": attack(losses.cross_entropy)}


SUITES: dict[str, Callable[..., dict[str, Attack]]] = {"pgd": pgd}


def suite(name: str, norm: Norm, box: Box = (0.0, 1.0)) -> dict[str, Attack]:
    """The line-up of that name for a norm: attack names to attacks, in order.

    Raises:
        InputError: for a name or norm that does not exist.
    """
    choice("suite", name, tuple(SUITES))
    return SUITES[name](norm=norm, box=box)
