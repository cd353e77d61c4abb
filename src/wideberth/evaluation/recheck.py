"""A verdict checked again: every stored adversarial point against its clean input and the model, without a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from wideberth.checks import Box, InputError, Norm
from wideberth.configuration import construct, import_object
from wideberth.data import Data, Readable, count, read
from wideberth.evaluation.evidence import AdversarialPoints
from wideberth.evaluation.samples import row_hashes
from wideberth.trust import NotTrusted, check
from wideberth.verification import check_points

OUTSIDE_BALL = "outside the ball"
OUTSIDE_BOX = "outside the box"
CORRECT = "classified correctly"
MISSING = "the point is missing"
OTHER_SAMPLE = "the clean sample differs"
NOT_COUNTED = "the table does not count the sample as adversarial"


@dataclass(frozen=True)
class Disagreement:
    """A sample on which a recheck and the record do not agree.

    Attributes:
        position: of the sample in the data.
        index: what the data call it.
        reason: why, in a few words; more than one where more than one applies.
    """

    position: int
    index: int
    reason: str

    def __str__(self) -> str:
        return f"sample {self.position} (index {self.index}): {self.reason}"


@dataclass(frozen=True)
class Verification:
    """What became of the samples that a record calls adversarial when their points were checked again.

    Attributes:
        checked: how many samples, each with its point or the lack of one.
        disagreements: those whose point does not show what the record says, by position.
    """

    checked: int
    disagreements: tuple[Disagreement, ...]

    @property
    def agreed(self) -> int:
        """How many points are in the ball, in the box and misclassified."""
        return self.checked - len(self.disagreements)

    def __str__(self) -> str:
        lines = [f"{self.agreed} of {self.checked} adversarial points agree with the record"]
        return "\n".join([*lines, *(f"  {each}" for each in self.disagreements)])


def recheck(
    model: nn.Module,
    table: pd.DataFrame,
    protocol: dict[str, Any],
    points: AdversarialPoints | None,
    data: Data | Readable | None = None,
    batch_size: int = 256,
) -> Verification:
    """Check the points of a record again.

    Args:
        model: the one that the record is about; run in eval mode where its parameters are, given back as it was.
        table: of the record's samples.
        protocol: of the record.
        points: its adversarial points.
        data: what the record was made on (a `Data`: its test split); None: the data set that the protocol describes,
            where it is one of wideberth's own.
        batch_size: points at a time.

    Raises:
        InputError: where the record holds no points, or the data are not given and not described or hold too few
            samples.
    """
    if points is None:
        raise InputError("the record holds no adversarial points: evaluate again with evidence")
    data = described_data(protocol) if data is None else data
    source = data.test() if isinstance(data, Data) else data
    known = _expected(table, protocol)
    last = int(max(known.index.max(), points.position.max() if len(points) else 0))
    if last >= count(source):
        raise InputError(f"data: holds {count(source)} samples: the record is about sample {last} too")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found: list[Disagreement] = []
    for rows in torch.arange(len(points)).split(batch_size):  # type: ignore[no-untyped-call]
        found += _check(model, source, known, (points, rows, device), protocol["norm"], tuple(protocol["box"]))
    stored = set(points.position.tolist())
    adversarial = known[known["adversarial"]]
    lost = adversarial[~adversarial.index.isin(stored)]
    names = zip(lost.index.tolist(), lost["index"].tolist(), strict=True)
    found += [Disagreement(place, index, MISSING) for place, index in names]
    checked = len(adversarial) + sum(each.reason.startswith(NOT_COUNTED) for each in found)
    return Verification(checked, tuple(sorted(found, key=lambda each: each.position)))


def _expected(table: pd.DataFrame, protocol: dict[str, Any]) -> pd.DataFrame:
    """By position: index, label, eps, and whether the record calls the sample adversarial."""
    known = table[["index", "label"]].copy()
    known["eps"] = table["eps"] if "eps" in table else float(protocol["eps"])
    known["adversarial"] = table["clean_correct"] & ~table["robust"]
    known.index = pd.Index(table["position"] if "position" in table else range(len(table)))
    return known


def _check(
    model: nn.Module,
    source: Readable,
    known: pd.DataFrame,
    part: tuple[AdversarialPoints, Tensor, torch.device],
    norm: Norm,
    box: Box,
) -> list[Disagreement]:
    """Which of these rows of the points do not agree with the record."""
    points, rows, device = part
    position, index = points.position[rows], points.index[rows]
    x, y, given = (value.cpu() for value in read(source, position))
    expected = known.reindex(position.tolist())
    stored = points.x(rows)
    if x.shape != stored.shape:
        raise InputError(f"data: inputs of shape {tuple(x.shape[1:])}: the record's have {tuple(stored.shape[1:])}")
    eps = torch.tensor(expected["eps"].to_numpy(float)).nan_to_num(nan=0.0)
    same = (given == index) & (row_hashes(x) == points.clean_hash[rows])
    for name, values in (("index", given), ("label", y)):
        same &= torch.from_numpy(expected[name].to_numpy() == values.numpy())
    checked = check_points(model, x.to(device), y.to(device), stored.to(device), eps.to(device), norm, box)
    counted = torch.from_numpy(expected["adversarial"].to_numpy() == True)  # noqa: E712 (missing rows are no bool)
    failures = {
        NOT_COUNTED: ~counted,
        OTHER_SAMPLE: ~same,
        OUTSIDE_BALL: ~checked.in_ball.cpu(),
        OUTSIDE_BOX: ~checked.in_box.cpu(),
        CORRECT: ~checked.misclassified.cpu(),
    }
    reasons = [
        ", ".join(reason for reason, failed in failures.items() if bool(failed[place])) for place in range(len(rows))
    ]
    pairs = zip(position.tolist(), index.tolist(), reasons, strict=True)
    return [Disagreement(place, name, reason) for place, name, reason in pairs if reason]


def described_data(protocol: dict[str, Any]) -> Data:
    """The data set that a protocol describes.

    Only what needs no trust is made from a record: a record of a stranger must not choose what code runs.

    Raises:
        InputError: where it describes none, or one of another package.
    """
    described = protocol.get("data")
    path = str(described.get("class_path")) if isinstance(described, dict) else ""
    try:
        if not isinstance(described, dict) or "." not in path:
            raise NotTrusted
        check(described, Data, "evaluation.json", "data")
    except NotTrusted:
        raise InputError("data: needed, since the record does not describe a data set of wideberth.data") from None
    made: Data = construct(import_object(path), path, **(described.get("init_args") or {}))
    return made
