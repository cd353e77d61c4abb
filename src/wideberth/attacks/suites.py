"""Suites: named sequences of attacks, in the order in which an evaluation runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from wideberth import checks, losses
from wideberth.attacks.apgd import APGD
from wideberth.attacks.base import Attack
from wideberth.attacks.ddn_fmn import FMN
from wideberth.attacks.fab import FAB
from wideberth.attacks.pgd import PGD
from wideberth.attacks.pma import PMA
from wideberth.attacks.square import Square
from wideberth.checks import Box, Norm

_BFLOAT16_MARGIN = -0.02
"""Probability margins above this may have the wrong sign in bfloat16, whose rounding moves them by about 0.01."""

_PARALLEL = 3
"""Restarts or targets in parallel, where nearly all samples need all of them: the last samples then fill a batch."""

Precision: TypeAlias = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Stage:
    """One attack of a suite: which samples it attacks, and how it runs.

    Attributes:
        attack: what is run.
        margin_threshold: attack only samples for which an earlier attack has reached at least this probability margin
            (the largest other probability minus the label's, in [-1, 1], at a temperature at which that of the clean
            sample is not saturated); None: all samples that are not adversarial yet. It depends on the sample alone, so
            that a result does not depend on the other samples.
        precision: of the search; its results are verified in the model's own precision. bfloat16 is for models in
            float32 on machines with bfloat16 arithmetic, and changes nothing elsewhere.
        parallel_restarts: so many of a sample's jobs (restarts, targets) run in parallel: fuller batches where few
            samples are left, for more evaluations on samples that succeed in one of them.
    """

    attack: Attack
    margin_threshold: float | None = None
    precision: Precision = "float32"
    parallel_restarts: int = 1

    def __post_init__(self) -> None:
        """Refuse what makes no sense (`InputError`)."""
        checks.choice("precision", self.precision, ("float32", "bfloat16"))
        checks.at_least("parallel_restarts", self.parallel_restarts, 1)


def pgd(norm: Norm, box: Box, classes: int, steps: int = 20, restarts: int = 2) -> dict[str, Attack]:
    """PGD on the margin and on the cross-entropy, each with restarts.

    The margin comes first: it breaks nearly all that the cross-entropy breaks (and, unlike it, does not care how the
    logits are scaled), so that the second attack finds few rows left. `keep="worst"` judges every iterate.
    """
    del classes  # the same for any number

    def attack(loss: losses.Loss) -> PGD:
        return PGD(norm=norm, box=box, steps=steps, restarts=restarts, loss=loss, keep="worst")

    return {"PGD margin": attack(losses.margin_loss), "PGD cross-entropy": attack(losses.cross_entropy)}


def standard(norm: Norm, box: Box, classes: int) -> dict[str, Attack | Stage]:
    """The composition of AutoAttack standard (Croce and Hein 2020; l1: Croce and Hein 2021), for any number of classes.

    APGD on the cross-entropy, APGD on the targeted DLR loss, targeted FAB, and Square with 5,000 queries. There are as
    many targets as other classes, at most nine; with fewer than four classes the ratio is not defined, and the margin
    takes its place. What a search in bfloat16 has brought within its rounding of a mistake is searched once more,
    without rounding.
    """
    l1 = norm == "l1"
    ratio = losses.dlr_loss if classes >= 4 else losses.margin_loss
    targeted = APGD(norm=norm, box=box, loss=ratio, targets=5 if l1 else 9, large_eps=l1)
    return {
        "APGD-CE": Stage(APGD(norm=norm, box=box, restarts=5 if l1 else 1, large_eps=l1), precision="bfloat16"),
        "APGD-T": Stage(targeted, precision="bfloat16", parallel_restarts=_PARALLEL),
        "FAB-T": Stage(FAB(norm=norm, box=box, targets=9), precision="bfloat16", parallel_restarts=_PARALLEL),
        "Square": Stage(Square(norm=norm, box=box), precision="bfloat16"),
        "APGD, float32": Stage(
            APGD(norm=norm, box=box, restarts=2, loss=losses.margin_loss), margin_threshold=_BFLOAT16_MARGIN
        ),
    }


def plus(norm: Norm, box: Box, classes: int) -> dict[str, Attack | Stage]:
    """The composition of AutoAttack plus: more restarts, and the untargeted attacks, before the targeted ones.

    In l1, the larger radii are searched first here too, as in `standard`; there, they are not.
    """
    ratio = losses.dlr_loss if classes >= 3 else losses.margin_loss
    targeted = losses.dlr_loss if classes >= 4 else losses.margin_loss
    return {
        "APGD-CE": APGD(norm=norm, box=box, large_eps=norm == "l1", restarts=5),
        "APGD-DLR": APGD(norm=norm, box=box, large_eps=norm == "l1", restarts=5, loss=ratio),
        "FAB": FAB(norm=norm, box=box, restarts=5),
        "Square": Square(norm=norm, box=box),
        "APGD-T": APGD(norm=norm, box=box, large_eps=norm == "l1", loss=targeted, targets=9),
        "FAB-T": FAB(norm=norm, box=box, targets=9),
    }


def rand(norm: Norm, box: Box, classes: int) -> dict[str, Attack | Stage]:
    """The composition of AutoAttack rand, for models whose output is random: gradients are means over 20 passes.

    In l1, the larger radii are searched first here too, as in `standard`; there, they are not.
    """
    ratio = losses.dlr_loss if classes >= 3 else losses.margin_loss
    return {
        "APGD-CE": APGD(norm=norm, box=box, large_eps=norm == "l1", draws=20),
        "APGD-DLR": APGD(norm=norm, box=box, large_eps=norm == "l1", loss=ratio, draws=20),
    }


def radius(norm: Norm, box: Box, classes: int) -> dict[str, Attack | Stage]:
    """Minimum-norm attacks: each sample's smallest radius, from which robust accuracy follows at every eps."""
    del classes
    return {"FMN": FMN(norm=norm, box=box), "FAB": FAB(norm=norm, box=box)}


def fast(norm: Norm, box: Box, classes: int) -> dict[str, Attack | Stage]:
    """Nearly the verdict of `standard` for a small part of its cost.

    Ascent on the probability margin breaks most of what can be broken; runs led elsewhere by random directions of the
    logits are spent on samples that it brought near a mistake, longer ones by APGD on the nearest, and Square, which
    needs no gradient, on these too.
    """
    del classes
    if norm == "l1":  # steepest steps move one entry at a time; APGD spreads them
        return {
            "APGD margin": APGD(norm=norm, box=box, steps=30, loss=losses.margin_loss, large_eps=True),
            "APGD targeted": Stage(
                APGD(norm=norm, box=box, steps=30, loss=losses.margin_loss, large_eps=True, targets=3),
                margin_threshold=-0.7,
            ),
            "Square": Stage(Square(norm=norm, box=box, queries=1000), margin_threshold=-0.3),
        }
    return {
        "PMA": Stage(PMA(norm=norm, box=box, steps=20, diverse=0), precision="bfloat16"),
        "PMA diverse": Stage(
            PMA(norm=norm, box=box, steps=20, diverse=5, restarts=8), margin_threshold=-0.9, precision="bfloat16"
        ),
        "APGD margin": Stage(
            APGD(norm=norm, box=box, restarts=3, loss=losses.margin_loss),
            margin_threshold=-0.12,
            precision="bfloat16",
            parallel_restarts=3,
        ),
        "Square": Stage(Square(norm=norm, box=box, queries=1000), margin_threshold=-0.3, precision="bfloat16"),
    }


SUITES: dict[str, Callable[..., Mapping[str, Attack | Stage]]] = {
    "standard": standard,
    "fast": fast,
    "plus": plus,
    "rand": rand,
    "pgd": pgd,
    "radius": radius,
}


def suite(name: str, norm: Norm, box: Box = (0.0, 1.0), classes: int = 10) -> Mapping[str, Attack | Stage]:
    """The line-up of that name for a norm and a number of classes: attack names to attacks, in order.

    Raises:
        InputError: for a name or norm that does not exist.
    """
    checks.choice("suite", name, tuple(SUITES))
    return SUITES[name](norm=norm, box=box, classes=classes)
