"""The record of an evaluation: one row per sample, what can be said of them all, and its files."""

from __future__ import annotations

import json
import math
import shutil
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import binomtest
from torch import nn

from wideberth import schema
from wideberth.checks import InputError, choice
from wideberth.data import Data, Readable
from wideberth.evaluation.evidence import AdversarialPoints
from wideberth.evaluation.identity import record_name
from wideberth.evaluation.recheck import Verification, recheck
from wideberth.evaluation.state_file import StateFile
from wideberth.runs import EVALUATIONS, Run, write_atomically, write_record

STORAGE = (schema.KEY, "id", "saved")
"""Entries of evaluation.json that are about the file, not about the evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        samples: one row per sample: index, label, clean_prediction, adversarial_prediction, clean_correct, robust,
            logit_margin, effective_margin, effective_weight_norm, distance (of the adversarial point), attack (that
            found it; "clean" where the sample is misclassified as it is), job and step (of that attack), eps, position
            (in the data), evaluations (forwards and backwards spent).
        protocol: how it was found: norm, eps, suite, seed, the attacks in order, versions.
        adversarial: the adversarial point of every sample that has one; None where they were not kept.
        state_files: what an evaluation with `state` keeps on disk until its record is saved.
    """

    samples: pd.DataFrame
    protocol: dict[str, Any]
    adversarial: AdversarialPoints | None = None
    state_files: tuple[StateFile, ...] = field(default=(), compare=False, repr=False)

    @property
    def clean_accuracy(self) -> float:
        """Share of samples classified correctly, in [0, 1]."""
        return float(self.samples["clean_correct"].mean())

    @property
    def robust_accuracy(self) -> float:
        """Share of samples classified correctly and broken by no attack: an upper bound on the true one, in [0, 1]."""
        return float(self.samples["robust"].mean())

    def interval(self, which: Literal["robust", "clean"] = "robust", confidence: float = 0.95) -> tuple[float, float]:
        """The exact (Clopper-Pearson) binomial interval of an accuracy, for the drawing of the samples."""
        choice("which", which, ("robust", "clean"))
        hits = self.samples["robust" if which == "robust" else "clean_correct"]
        found = binomtest(int(hits.sum()), len(hits)).proportion_ci(confidence, method="exact")
        return float(found.low), float(found.high)

    def verify(self, model: nn.Module, data: Data | Readable | None = None, batch_size: int = 256) -> Verification:
        """Check every stored adversarial point again: in the ball, in the box and misclassified; without a search.

        Args:
            model: the one that was evaluated; given back as it was.
            data: what it was evaluated on (a `Data`: its test split); None: the data set that the protocol describes,
                where it is one of wideberth's own.
            batch_size: points at a time.

        Returns:
            How many points agree with the record, and which do not, with the reason.

        Raises:
            InputError: where the record holds no points, or the data do not go with it.
        """
        return recheck(model, self.samples, self.protocol, self.adversarial, data, batch_size)

    def summary(self) -> dict[str, Any]:
        """What evaluation.json holds."""
        table = self.samples
        told: dict[str, Any] = {
            **self.protocol,
            "n": len(table),
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "clean_interval": self.interval("clean"),
            "robust_interval": self.interval("robust"),
            "confidence": 0.95,
            "evaluations_per_sample": float(table["evaluations"].mean()),
        }
        if "effective_weight_norm" in table:
            told["zero_gradients"] = float((table["effective_weight_norm"] == 0).mean())
        for name in ("effective_margin", "effective_weight_norm"):
            if name in table:
                values = {"median": float(table[name].median()), "mean": float(table[name].mean())}
                # JSON has no infinity, which is what the margin is where the gradient is zero.
                told[name] = {key: value if math.isfinite(value) else None for key, value in values.items()}
        return told

    @property
    def name(self) -> str:
        """The name of the record's folder, made from the protocol."""
        eps = self.samples["eps"].to_numpy() if isinstance(self.protocol.get("eps"), dict) else None
        protocol = {"radii": "radius" in self.samples, **self.protocol}
        return record_name(protocol, len(self.samples), eps)

    def save(self, out: str | Path, overwrite: bool = False) -> Path:
        """Write evaluation.json, evaluation.parquet and adversarial.safetensors into a folder, OUT/evaluations/NAME.

        NAME stands for the protocol, so evaluations by different protocols stand beside each other. The folder appears
        when its files are complete. What `state` kept of the search is removed then.

        Args:
            out: a run directory, or any other (made if need be).
            overwrite: replace an evaluation by the same protocol.

        Returns:
            The folder.

        Raises:
            InputError: where there is an evaluation by the same protocol already, and `overwrite` is false.
        """
        folder = check_free(out, self.name, overwrite)
        identifier = uuid.uuid4().hex
        table = pa.Table.from_pandas(self.samples)
        # In both files, so that files of two evaluations are never taken for one.
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"wideberth_id": identifier.encode()})
        about = {schema.KEY: schema.VERSION, "id": identifier, "saved": datetime.now(UTC).isoformat()}
        text = json.dumps(self.summary() | about, indent=2)
        fresh = folder.with_name(f".{folder.name}.{identifier}")
        try:
            if self.adversarial is not None:
                self.adversarial.save(fresh / "adversarial.safetensors")
            write_record(fresh / "evaluation.parquet", lambda file: pq.write_table(table, file))
            write_record(fresh / "evaluation.json", lambda file: file.write_text(text, encoding="utf-8"))
            _replace(folder, fresh, overwrite)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        self.discard_state()
        return folder

    def discard_state(self) -> None:
        """Remove what `evaluate(state=...)` kept on disk to go on from; `save` does it as well."""
        for file in self.state_files:
            file.remove()

    @classmethod
    def load(cls, out: str | Path) -> Evaluation:
        """Read what `save` wrote.

        Args:
            out: the folder of one evaluation, or a directory that holds some, of which the newest is read.

        Raises:
            InputError: where there is no evaluation, or a file of it is damaged.
        """
        records = Run(out).evaluations if Path(out).is_dir() else []
        samples = records[-1].samples if records else None
        if samples is None:
            raise InputError(f"{str(out)!r}: holds no evaluation; run `wideberth evaluate` on it first")
        derived = {*cls(samples, {}).summary(), *STORAGE}
        protocol = {name: value for name, value in records[-1].summary.items() if name not in derived}
        points = records[-1].path / "adversarial.safetensors"
        return cls(samples, protocol, AdversarialPoints.load(points) if points.is_file() else None)


def check_free(out: str | Path, name: str, overwrite: bool = False) -> Path:
    """The folder of the record `name` in a directory, after trying that it can be written.

    Raises:
        InputError: where there is such a record already, and `overwrite` is false.
        OSError: where nothing can be written.
    """
    folder = Path(out) / EVALUATIONS / name
    if folder.exists() and not overwrite:
        raise InputError(
            f"{str(folder)!r}: holds an evaluation by the same protocol; use it, or replace it with --overwrite "
            "(overwrite=True)"
        )
    trial = folder.parent / f".{name}.{uuid.uuid4().hex}"
    write_atomically(trial, lambda file: file.touch())
    trial.unlink()
    return folder


def _replace(folder: Path, fresh: Path, overwrite: bool) -> None:
    """Move a folder into place; with `overwrite` in the place of another, which stays as it was where that fails.

    Raises:
        InputError: where another process has saved an evaluation by the same protocol meanwhile.
    """
    if not overwrite or not folder.exists():
        try:
            fresh.rename(folder)  # never onto a folder that holds something
        except OSError as error:
            if folder.exists():
                raise InputError(f"{str(folder)!r}: was saved meanwhile by another process; it stays") from error
            raise
        return
    before = fresh.with_name(f"{fresh.name}.replaced")
    folder.rename(before)
    try:
        fresh.rename(folder)
    except OSError:
        before.rename(folder)
        raise
    shutil.rmtree(before, ignore_errors=True)
