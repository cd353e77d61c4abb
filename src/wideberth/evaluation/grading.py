"""The grade of a verdict: signs of false confidence on some of its samples, and whether it says anything at all."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from wideberth.data import Readable, read
from wideberth.evaluation import shards
from wideberth.evaluation.diagnostics import Finding, Grade, examine, grade
from wideberth.evaluation.protocol import Protocol


@dataclass(frozen=True)
class LazyInputs:
    """Inputs of a table's rows that are read when asked for, so that a few of many can be examined.

    Attributes:
        source: where they are.
        position: (N,) int64, in the source.
        device: the one that they are read on.
    """

    source: Readable
    position: Tensor
    device: torch.device

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return read(self.source, self.position[rows])[0]


def grade_record(
    model: nn.Module, source: Readable, protocol: Protocol, table: pd.DataFrame, stages: list[dict[str, Any]]
) -> dict[str, Any]:
    """The grade of a verdict and the findings behind it, as the record holds them.

    The first process examines samples of all processes, chosen by data index, so that the grade depends neither on
    the number of processes nor on the order of the data.

    Args:
        model: as it is evaluated.
        source: the data of all processes.
        protocol: of the evaluation.
        table: of all samples.
        stages: the attacks of the record.
    """
    outcome: dict[str, Any] = {}
    if shards.mine()[0] == 0:
        ordered = table.sort_values("index", kind="stable").reset_index(drop=True)
        position, y, eps = (torch.tensor(ordered[name].to_numpy()) for name in ("position", "label", "eps"))
        findings = examine(
            model,
            LazyInputs(source, position, torch.device("cpu")),
            y,
            eps=eps if bool((eps != eps[0]).any()) else float(eps[0]),
            norm=protocol.norm,
            box=protocol.box,
            samples=ordered,
            stages=stages,
            seed=protocol.seed,
        )
        word, reason = grade_verdict(findings, table)
        outcome = {"grade": {"verdict": word, "reason": reason}, "findings": [asdict(found) for found in findings]}
    return shards.gathered(outcome)[0]


def grade_verdict(findings: list[Finding], table: pd.DataFrame) -> tuple[Grade, str]:
    """The grade of a verdict and one sentence why.

    A robust accuracy of 0 needs no trust. A clean accuracy that a constant answer reaches as well earns none: where
    its 95 % interval reaches down to the share of the most frequent label, the verdict is "doubtful" at best.
    """
    word, reason = grade(findings, float(table["robust"].mean()))
    if word != "trusted":
        return word, reason
    hits, n = int(table["clean_correct"].sum()), len(table)
    constant = float(table["label"].value_counts(normalize=True).max())
    low = binomtest(hits, n).proportion_ci(0.95, method="exact").low
    if low > constant:
        return word, reason
    return "doubtful", (
        f"The clean accuracy of {hits / n:.1%} on {n} samples is not distinguishable from that of a constant answer, "
        f"{constant:.1%}: a model that has learned nothing is as robust as that."
    )
