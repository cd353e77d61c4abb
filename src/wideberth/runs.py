"""A run directory: everything needed to trust, repeat or continue a run, written atomically and read without pickles.

config.yaml           the resolved configuration
metrics.csv           one row per epoch
checkpoints/          last.ckpt, previous.ckpt of the epoch before, and best.ckpt where a held-out split is used
model.safetensors     the weights, at the end
export.json           of which epoch (0-based) they are, and why training ended early, if it did
samples.parquet       one row per training sample: index, label, radius, ...
radii.parquet         histogram of the radii per epoch: epoch, low, high, count
extremes.npz          the training samples with the smallest and the largest radii
evaluations/NAME/     one folder for each evaluation; NAME tells norm, eps, suite and number of samples
  evaluation.json     accuracies, intervals, protocol
  evaluation.parquet  one row per evaluated sample
  adversarial.safetensors  the adversarial points, where they are kept
report.html           what people read
checksums.txt         of these files, here and in the folders (of safetensors within themselves): see `checksums`

config.yaml has no checksum: it is meant to be read and may be edited. adversarial.safetensors has none either: every
point of it is checked by `wideberth verify`, which names those that were altered.

Version 0.1 kept one evaluation, in the run directory itself. It is read as the oldest one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from wideberth import checksums, schema
from wideberth.checks import InputError, one_line
from wideberth.yaml_files import load_yaml

EVALUATIONS = "evaluations"
"""The folder of a run directory that holds its evaluations."""
RENAMED = {"run": "job", "closest": "max_probability_margin"}
"""Columns of evaluation.parquet in version 0.1, and their names today."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it into place: readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_record(path: Path, write: Callable[[Path], object]) -> None:
    """`write_atomically` a file of a run, with a checksum that `reading` holds it to."""

    def noted(temporary: Path) -> None:
        write(temporary)
        checksums.note(path, checksums.digest(temporary))

    write_atomically(path, noted)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Check a file that is about to be read, and let whatever its reader raises be one line that names it.

    Raises:
        InputError: where the file is not as it was written, or an exception comes out of the block.
    """
    try:
        checksums.verified(file)
        yield
    except InputError:
        raise
    except Exception as error:
        reason = shorten(one_line(error), 200, placeholder=" ...")
        raise InputError(f"{str(file)!r}: cannot be read ({reason})") from error


@dataclass(frozen=True)
class EvaluationRecord:
    """A saved evaluation: a folder with evaluation.json and evaluation.parquet; each property reads its file.

    Attributes:
        path: the folder.
        name: the folder's own; "evaluation" for the one that version 0.1 kept in the run directory itself.
    """

    path: Path
    name: str

    @property
    def summary(self) -> dict[str, Any]:
        """What evaluation.json holds: the accuracies and the protocol.

        Raises:
            InputError: where it cannot be read, or a newer version of wideberth wrote it.
        """
        file = self.path / "evaluation.json"
        with reading(file):
            summary = _mapping(json.loads(file.read_text(encoding="utf-8")))
        schema.check_version(summary, repr(str(file)))
        return summary

    @property
    def samples(self) -> pd.DataFrame | None:
        """One row per evaluated sample, by today's column names; None where there is no evaluation.parquet.

        Raises:
            InputError: where it cannot be read, or belongs to another evaluation than evaluation.json.
        """
        file = self.path / "evaluation.parquet"
        if not file.is_file():
            return None
        expected = self.summary.get("id")
        with reading(file):
            table = pq.read_table(file)
            held = (table.schema.metadata or {}).get(b"wideberth_id", b"").decode() or None
            samples: pd.DataFrame = table.to_pandas()
        if held != expected:
            raise InputError(f"{str(file)!r}: is of another evaluation than the evaluation.json beside it")
        return upgraded(samples)


def upgraded(samples: pd.DataFrame) -> pd.DataFrame:
    """A table of evaluated samples with the columns of version 0.1 under the names they have today."""
    return samples.rename(columns={old: new for old, new in RENAMED.items() if new not in samples})


def read_table(file: Path) -> pd.DataFrame:
    """The table in a .csv or .parquet file (`InputError` where it is damaged)."""
    with reading(file):
        return pd.read_csv(file) if file.suffix == ".csv" else pd.read_parquet(file)


def read_json(file: Path) -> dict[str, Any]:
    """The names and values in a .json file (`InputError` where it is damaged)."""
    with reading(file):
        return _mapping(json.loads(file.read_text()))


RECORDS = {
    "export.json": "export",
    "metrics.csv": "metrics",
    "samples.parquet": "samples",
    "radii.parquet": "radii",
    "extremes.npz": "extremes",
}
"""The records that reports read, and the properties of `Run` that read them."""


class Run:
    """The records of one run directory; each property reads its file, or returns None where there is none.

    Args:
        path: the directory.
        evaluation: the name of the evaluation that is read; the newest if None.

    Raises:
        InputError: when the directory does not exist, it has no evaluation of this name, or the file of a property
            cannot be read (or, for `config`, is not there).
    """

    def __init__(self, path: str | Path, evaluation: str | None = None) -> None:
        self.path = Path(path)
        self._evaluation = evaluation
        self._left_out: list[str] = []
        if not self.path.is_dir():
            raise InputError(f"run {str(path)!r}: no such directory")
        if evaluation is not None:
            self._chosen_evaluation()

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def leave_out_damaged(self) -> list[str]:
        """From now on, take records that cannot be read as not there; returns a line about each, naming its file."""
        told = []
        for file, attribute in RECORDS.items():
            try:
                getattr(self, attribute)
            except InputError as error:
                told.append(str(error))
                self._left_out.append(file)
        for record in self._evaluation_records():
            name = record.name
            try:
                _ = record.summary
                name = f"{record.name}/evaluation.parquet"
                _ = record.samples
            except InputError as error:
                told.append(str(error))
                self._left_out.append(name)
        return told

    def with_evaluation(self, name: str | None) -> Run:
        """The same run, of which another evaluation is read; what is left out stays so."""
        other = Run(self.path, name)
        other._left_out = self._left_out
        return other

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.resolve().name

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, by today's names."""
        file = self.path / "config.yaml"
        if not file.is_file():
            raise InputError(f"run {str(self.path)!r}: holds no config.yaml, so it is not a run directory")
        with reading(file):
            return schema.upgraded_configuration(_mapping(load_yaml(file.read_text())), repr(str(file)))

    @property
    def finished(self) -> bool:
        """Whether training came to its end (the weights were exported)."""
        return (self.path / "model.safetensors").is_file()

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint, to resume from."""
        file = self.path / "checkpoints" / "last.ckpt"
        return file if file.is_file() else None

    @property
    def export(self) -> dict[str, Any] | None:
        """Of the exported weights: `epoch` (0-based), `keep` ("last" or "best"), `ended` (why early, or None)."""
        return self._json("export.json")

    @property
    def metrics(self) -> pd.DataFrame | None:
        """One row per epoch."""
        return self._table("metrics.csv")

    @property
    def samples(self) -> pd.DataFrame | None:
        """One row per training sample."""
        return self._table("samples.parquet")

    @property
    def radii(self) -> pd.DataFrame | None:
        """Histogram of the radii per epoch: epoch, low, high, count."""
        return self._table("radii.parquet")

    @property
    def extremes(self) -> dict[str, np.ndarray] | None:
        """Arrays {small, large}_{x, index, label, radius} of the training samples at both ends of the radii."""
        if (file := self._file("extremes.npz")) is None:
            return None
        with reading(file), np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)

    @property
    def evaluations(self) -> list[EvaluationRecord]:
        """All evaluations of the run, oldest first."""
        records = [record for record in self._evaluation_records() if record.name not in self._left_out]
        return sorted(records, key=lambda record: (str(record.summary.get("saved", "")), record.name))

    def _evaluation_records(self) -> list[EvaluationRecord]:
        old = [EvaluationRecord(self.path, "evaluation")] if (self.path / "evaluation.json").is_file() else []
        folders = [file.parent for file in (self.path / EVALUATIONS).glob("*/evaluation.json")]
        return old + [EvaluationRecord(folder, folder.name) for folder in folders if not folder.name.startswith(".")]

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The newest evaluation, or the one that was asked for, as its evaluation.json holds it."""
        record = self._chosen_evaluation()
        return None if record is None else record.summary

    @property
    def evaluation_samples(self) -> pd.DataFrame | None:
        """One row per sample of this evaluation."""
        record = self._chosen_evaluation()
        left_out = record is None or f"{record.name}/evaluation.parquet" in self._left_out
        return None if record is None or left_out else record.samples

    @property
    def evaluation_name(self) -> str | None:
        """The name of this evaluation."""
        record = self._chosen_evaluation()
        return None if record is None else record.name

    def _chosen_evaluation(self) -> EvaluationRecord | None:
        records = self.evaluations
        if self._evaluation is None:
            return records[-1] if records else None
        for record in records:
            if record.name == self._evaluation:
                return record
        names = ", ".join(record.name for record in records) or "none"
        raise InputError(f"evaluation={self._evaluation!r}: {str(self.path)!r} holds {names}")

    def _file(self, name: str) -> Path | None:
        file = self.path / name
        return file if file.is_file() and name not in self._left_out else None

    def _table(self, name: str) -> pd.DataFrame | None:
        return None if (file := self._file(name)) is None else read_table(file)

    def _json(self, name: str) -> dict[str, Any] | None:
        return None if (file := self._file(name)) is None else read_json(file)


def _mapping(loaded: object) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        raise TypeError(f"must hold names and their values, holds {type(loaded).__name__}")
    return loaded
