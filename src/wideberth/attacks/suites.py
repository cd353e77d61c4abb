"""Named line-ups of attacks: what a verdict is made of, in the order it is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from wideberth import checks, losses
from wideberth.attacks.base import Attack
from wideberth.attacks.gradient import PGD
from wideberth.checks import Box, Norm


Precision: TypeAlias = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Stage:
    """One attack of a line-up: on whom, and how exactly it need look.

    Attributes:
        attack: what is run.
        near: only on samples that some attack has brought this close to a mistake, as a probability margin (the
            largest other probability minus the label's, in [-1, 1]); None: on all that are unbroken. A condition on
            the sample alone, so that the verdict does not depend on who else is judged.
        precision: of the search; what it finds is judged in the model's own precision all the same.
    """

    attack: Attack
    near: float | None = None
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        """Refuse a precision that does not exist (`InputError`)."""
        checks.choice("precision", self.precision, ("float32", "bfloat16"))


def pgd(norm: Norm, box: Box, classes: int, steps: int = 20, restarts: int = 2) -> dict[str, Attack]:
    """PGD on the margin and on the cross-entropy, each with restarts.

    The margin comes first: it breaks nearly all that the cross-entropy breaks (and, unlike it, does not care how the
    logits are scaled), so that the second attack finds few rows left. `keep="worst"` judges every iterate.
    """

    del classes  # the same for any number

    def attack(loss: losses.Loss) -> PGD:
        return PGD(norm=norm, box=box, steps=steps, restarts=restarts, loss=loss, keep="worst")

    return {"PGD margin": attack(losses.margin_loss), "PGD cross-entropy": attack(losses.cross_entropy)}


SUITES: dict[str, Callable[..., Mapping[str, Attack | Stage]]] = {"pgd": pgd}


def suite(name: str, norm: Norm, box: Box = (0.0, 1.0), classes: int = 10) -> Mapping[str, Attack | Stage]:
    """The line-up of that name for a norm and a number of classes: attack names to attacks, in order.

    Raises:
        InputError: for a name or norm that does not exist.
    """
    checks.choice("suite", name, tuple(SUITES))
    return SUITES[name](norm=norm, box=box, classes=classes)
