"""`evaluate`: run a line-up of attacks, verify what they found, and keep a record of every sample."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.progress import Progress
from torch import Tensor, nn

from wideberth.attacks import Attack, Stage
from wideberth.checks import Box, InputError, Norm
from wideberth.data import Data, DataSet, Readable, count, selected_rows
from wideberth.evaluation import shards
from wideberth.evaluation.console import Watch, progress_bar
from wideberth.evaluation.evidence import AdversarialPoints, RowFile, gather_points
from wideberth.evaluation.grading import grade_record
from wideberth.evaluation.identity import describe_samples, describe_search
from wideberth.evaluation.protocol import (
    Protocol,
    Radii,
    fingerprint,
    radius_of_each,
    stage_records,
    versions,
)
from wideberth.evaluation.record import Evaluation
from wideberth.evaluation.samples import Samples, read_samples, sample_table
from wideberth.evaluation.search import Search, SearchState
from wideberth.evaluation.state_file import StateFile, beyond


def evaluate(
    model: nn.Module,
    data: DataSet,
    *,
    norm: Norm = "linf",
    eps: Radii = 8 / 255,
    suite: str | Mapping[str, Attack | Stage] = "fast",
    box: Box | None = None,
    rows: int | None = None,
    batch_size: int = 256,
    margin: bool = True,
    seed: int = 0,
    progress: bool = False,
    radii: bool = False,
    examined: bool = True,
    evidence: bool = True,
    state: str | Path | None = None,
) -> Evaluation:
    """Clean accuracy and verified robust accuracy of a model within a radius.

    Attacks run in the order of the suite, each on the samples that are still robust; a sample counts as adversarial
    only if its adversarial point, evaluated again, lies in ball and box and is misclassified. Inputs are read when an
    attack begins on them, so that memory does not grow with the data set. Under `torchrun` every process evaluates its
    share of the samples, and all return the whole.

    Args:
        model: maps (B, ...) in the box to logits (B, K); run in eval mode where its parameters are, given back as it
            was.
        data: a `Data` (its test split), a split, any data set of (x, y) or (x, y, index), or tensors (x, y). It must
            give the same input each time a sample is read.
        norm: "linf", "l2" or "l1".
        eps: the radius, in units of the input; or one radius for each sample of the data, (N,) in their order, as
            tensor, array, list or Series. A sample of radius 0 is adversarial exactly if it is misclassified.
        suite: name of a line-up, or attacks (or `Stage`s) by name. "fast" comes to about the verdict of "standard", the
            composition of AutoAttack, in a small part of its time.
        box: what inputs lie in (default: the data's own, else (0, 1)).
        rows: only so many samples, a fixed random sample; of a `Data`, those that `test_rows=rows` takes.
        batch_size: samples at a time; attacks without gradients may ask about twice as many points.
        margin: also measure effective margins (one backward per class).
        seed: of the attacks' randomness.
        progress: show a progress bar with the accuracies so far.
        radii: also search the smallest radius at which each sample is adversarial, by the minimum-norm suite "radius",
            from which the whole curve of robust accuracy against eps follows; a sample for which this finds a point
            within its `eps` counts as adversarial.
        examined: also look for signs of false confidence on up to 64 samples, and grade the verdict (see `examine`).
        evidence: keep the adversarial points, by which `Evaluation.verify` checks the verdict without a search. They
            take as much disk space as the inputs of the samples that are found adversarial.
        state: a file in which to keep what is known, every two minutes and when interrupted; an evaluation that finds
            it there goes on from it, in the same process or in another. Removed when the record is
            saved, or by `Evaluation.discard_state`.

    Returns:
        The record; `robust_accuracy` is an upper bound on the true one, as for every attack.

    Raises:
        InputError: for arguments, data or a model that cannot be used.
    """
    began = time.monotonic()
    box = (data.box if isinstance(data, Data) else (0.0, 1.0)) if box is None else box
    protocol = Protocol(norm, box, suite, seed, batch_size, margin, radii, evidence)
    source: Readable = data.test() if isinstance(data, Data) else data
    total = count(source)
    positions, in_words = selected_rows(data, rows)
    radius = radius_of_each(eps, total, positions)
    rank, world = shards.mine()
    if len(positions) < world:  # refused by every process, or the others would wait
        raise InputError("data: holds no samples" if not total else "data: holds fewer samples than processes")
    mine = positions[rank::world]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    samples = read_samples(model, source, mine, radius[rank::world], protocol, device)
    with progress_bar(progress and rank == 0) as bar:
        found = _Evaluator(model, samples, protocol, bar, None if state is None else Path(state)).run()
    table, seconds = _gathered(found)
    stages = stage_records(table, found.line_up, seconds)
    record: dict[str, Any] = {
        **describe_samples(data, in_words),
        **describe_search(protocol, float(eps) if isinstance(eps, Real) else radius),
        "evidence": evidence,
        "attacks": stages,
        "seconds": time.monotonic() - began,
        "processes": world,
        "device": str(device),
        "dtype": str(next((p.dtype for p in model.parameters()), torch.float32)),
        "versions": versions(),
    }
    if examined:
        record |= grade_record(model, source, protocol, table, stages)
    points = None if found.points is None else gather_points(found.points)
    kept = () if state is None else tuple(StateFile(path) for path in (Path(state), beyond(Path(state))))
    return Evaluation(table, record, points, kept)


@dataclass(frozen=True)
class _Found:
    """What this process found out about its share of the samples.

    Attributes:
        table: one row per sample.
        line_up: all stages that ran, by name.
        seconds: that each took.
        points: the adversarial points, where they are kept.
    """

    table: pd.DataFrame
    line_up: Mapping[str, Stage]
    seconds: list[float]
    points: AdversarialPoints | None


@dataclass(frozen=True)
class _Evaluator:
    """The searches of one process: within the radii, and if asked for, for the smallest ones.

    Attributes:
        model: in any mode.
        samples: of this process.
        protocol: of the evaluation.
        bar: for the progress.
        state: where what is known is kept, if anywhere.
    """

    model: nn.Module
    samples: Samples
    protocol: Protocol
    bar: Progress
    state: Path | None

    def run(self) -> _Found:
        """Search, and describe what was found."""
        samples, line_up = self.samples, self.protocol.line_up(self.samples.classes)
        state, file = self._search(samples, line_up, self.state)
        columns: dict[str, Tensor] = {}
        if further := self.protocol.radius_line_up(samples.classes):
            path = None if self.state is None else beyond(self.state)
            unbounded, other = self._search(samples.unbounded(), further, path)
            new, columns["radius"] = state.add_unbounded(unbounded, samples.eps)
            if file is not None and other is not None:
                file.copy_rows(other, new.nonzero().squeeze(1))
            line_up = line_up | {f"{name}, smallest radius": stage for name, stage in further.items()}
        table = sample_table(samples, state.columns() | columns, list(line_up))
        points = None if file is None else self._points(state, file)
        return _Found(table, line_up, state.seconds.tolist(), points)

    def _search(
        self, samples: Samples, line_up: Mapping[str, Stage], path: Path | None
    ) -> tuple[SearchState, RowFile | None]:
        """Run a line-up, from what its file holds if there is one."""
        state = SearchState.empty(samples.prediction, len(line_up))
        file = None
        if path is not None:
            rows = (samples.clean_hash, samples.y, samples.index, samples.eps, samples.prediction)
            file = StateFile(path, fingerprint(self.model, line_up, self.protocol, rows))
            state = file.load(self.protocol.evidence) or state
        points = None
        if self.protocol.evidence:
            kind = samples.shape, samples.dtype
            points = RowFile.temporary(*kind) if file is None else RowFile.at(file.points_path, *kind)

        def save(known: SearchState) -> None:
            if file is not None:
                file.save(known, points)

        watch = Watch(self.bar, samples.correct)
        Search(self.model, samples, line_up, self.protocol, points, watch, save).run(state)
        save(state)  # kept until the record is made: what follows may be interrupted too
        return state, points

    def _points(self, state: SearchState, file: RowFile) -> AdversarialPoints:
        """The points of the samples that are adversarial now; the file may hold older ones too."""
        rows, samples = state.adversarial.nonzero().squeeze(1), self.samples
        return AdversarialPoints(samples.position[rows], samples.index[rows], samples.clean_hash[rows], rows, file)


def _gathered(found: _Found) -> tuple[pd.DataFrame, list[float]]:
    """The table of all processes in the order of the data, and the seconds that the slowest took for each stage."""
    parts = shards.gathered((found.table, found.seconds))
    table = pd.concat([part for part, _ in parts]).sort_values("position", kind="stable").reset_index(drop=True)
    return table, [max(each) for each in zip(*(seconds for _, seconds in parts), strict=True)]
