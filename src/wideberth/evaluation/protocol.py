"""What an evaluation asks: the ball, the line-up of attacks, and which evaluation a saved state belongs to."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from wideberth import checks
from wideberth.attacks import SUITES, Attack, Stage
from wideberth.attacks import suite as named_suite
from wideberth.checks import Box, InputError, Norm
from wideberth.configuration import describe

Radii: TypeAlias = float | Tensor | np.ndarray | Sequence[float] | pd.Series
"""One radius for all samples, or one for each sample of the data, in their order."""


@dataclass(frozen=True)
class Protocol:
    """How an evaluation proceeds, whatever the model and the data.

    Attributes:
        norm: "linf", "l2" or "l1".
        box: of the inputs.
        suite: name of a line-up, or attacks or stages by name.
        seed: of all randomness.
        batch_size: samples at a time.
        margin: whether effective margins are measured.
        radii: whether the smallest radius of each sample is searched.
        evidence: whether the adversarial points are kept.
    """

    norm: Norm
    box: Box
    suite: str | Mapping[str, Attack | Stage]
    seed: int
    batch_size: int
    margin: bool
    radii: bool
    evidence: bool

    def __post_init__(self) -> None:
        """Refuse what cannot be asked, before the model is run (`InputError`)."""
        checks.norm_name(self.norm)
        checks.at_least("batch_size", self.batch_size, 1)
        checks.valid_box(self.box)
        if isinstance(self.suite, str):
            checks.choice("suite", self.suite, tuple(SUITES))
        else:
            self.line_up(classes=2)

    def line_up(self, classes: int) -> dict[str, Stage]:
        """The stages of the suite by name, in order, for a number of classes."""
        suite = self.suite
        if isinstance(suite, str):
            suite = named_suite(suite, self.norm, self.box, classes)
        return self._checked(suite)

    def radius_line_up(self, classes: int) -> dict[str, Stage]:
        """The stages that search the smallest radius of each sample; none where that is not asked for."""
        return self._checked(named_suite("radius", self.norm, self.box, classes)) if self.radii else {}

    def most_targets(self, classes: int) -> int:
        """The most classes that an attack of either line-up aims at."""
        stages = [*self.line_up(classes).values(), *self.radius_line_up(classes).values()]
        return min(max(stage.attack.targets for stage in stages), classes - 1)

    def _checked(self, suite: Mapping[str, Attack | Stage]) -> dict[str, Stage]:
        stages = {name: part if isinstance(part, Stage) else Stage(part) for name, part in suite.items()}
        if not stages:
            raise InputError("suite: holds no attack, so that no sample would count as adversarial")
        for name, stage in stages.items():
            attack = stage.attack
            if not attack.norm_bounded:
                kind = type(attack).__name__
                raise InputError(f"suite: {name}: {kind} has no ball of a norm, as a verdict does; call it directly")
            if attack.norm != self.norm or tuple(attack.box) != tuple(self.box):
                raise InputError(
                    f"suite: {name} attacks in {attack.norm} and box {tuple(attack.box)}, the evaluation is in "
                    f"{self.norm} and box {tuple(self.box)}"
                )
        return stages


def radius_of_each(eps: Radii, size: int, positions: Tensor) -> Tensor:
    """The radii of the samples at these positions (n,), float64.

    Args:
        eps: one radius, or one for each of all `size` samples.
        size: how many samples the data hold.
        positions: (n,) int64, which are evaluated; only their radii are looked at.

    Raises:
        InputError: for a radius that is negative or not finite, or another number of radii than of samples.
    """
    if not isinstance(eps, Tensor | np.ndarray | pd.Series | Sequence) or isinstance(eps, str):
        checks.valid_eps(eps)
        return torch.full((len(positions),), float(eps), dtype=torch.float64)
    try:
        values = eps.detach().cpu() if isinstance(eps, Tensor) else np.array(eps, dtype=np.float64)
        radii = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"eps: a {type(eps).__name__} that holds no numbers; must be one radius per sample") from error
    if tuple(radii.shape) != (size,):
        raise InputError(
            f"eps of shape {tuple(radii.shape)}: must be a number or one radius per sample, shape ({size},)"
        )
    chosen = radii[positions]
    checks.valid_eps(chosen, len(chosen))
    return chosen


def fingerprint(model: nn.Module, line_up: Mapping[str, Stage], protocol: Protocol, rows: Sequence[Tensor]) -> str:
    """A hash that two evaluations share exactly if they reach the same verdict: in this process or in another.

    Args:
        model: its weights and buffers count, by name.
        line_up: the stages count by import path and arguments.
        protocol: norm, box and seed count.
        rows: one value per sample and tensor that tell the samples apart: hashes of inputs, labels, indices, radii.
    """
    digest = sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype if isinstance(value, Tensor) else ''}".encode())
        digest.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    for values in rows:
        digest.update(_bytes(values))
    stages = {name: describe(stage) for name, stage in line_up.items()}
    settings = [protocol.norm, list(protocol.box), protocol.seed, protocol.evidence, stages]
    digest.update(json.dumps(settings).encode())
    return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def stage_records(table: pd.DataFrame, line_up: Mapping[str, Stage], seconds: Sequence[float]) -> list[dict[str, Any]]:
    """Of each attack in order: the robust accuracy that it left, the seconds that it took, and its settings."""
    left = float(table["clean_correct"].mean())
    records: list[dict[str, Any]] = []
    for (name, stage), spent in zip(line_up.items(), seconds, strict=True):
        left -= float((table["clean_correct"] & (table["attack"] == name)).mean())
        record = {"name": name, "robust_accuracy": left, "seconds": spent, "settings": describe(stage.attack)}
        record |= {"margin_threshold": stage.margin_threshold, "precision": stage.precision}
        records.append(record | {"parallel_restarts": stage.parallel_restarts})
    return records


def versions() -> dict[str, str]:
    """Of what a verdict depends on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "wideberth": version("wideberth")}
