"""A run directory: everything needed to trust, repeat or continue a run, written atomically and read without pickles.

config.yaml           the resolved configuration
metrics.csv           one row per epoch
checkpoints/          last.ckpt (and best.ckpt where a held-out split is used)
model.safetensors     the weights, at the end
export.json           of which epoch (0-based) they are, and why training ended early, if it did
samples.parquet       one row per training sample: index, label, radius, ...
radii.parquet         histogram of the radii per epoch: epoch, low, high, count
extremes.npz          the training samples with the smallest and the largest radii
evaluation.json       the verdict: accuracies, intervals, protocol
evaluation.parquet    one row per evaluated sample
report.html           what people read
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from wideberth.checks import InputError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it into place: readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Run:
    """The records of one run directory; each property reads its file, or returns None where there is none.

    Raises:
        InputError: when the directory does not exist (or, for `config`, holds no config.yaml).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(f"run {str(path)!r}: no such directory")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.resolve().name

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        file = self.path / "config.yaml"
        if not file.is_file():
            raise InputError(f"run {str(self.path)!r}: holds no config.yaml, so it is not a run directory")
        loaded = yaml.safe_load(file.read_text())
        return loaded if isinstance(loaded, dict) else {}

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
        file = self.path / "export.json"
        return json.loads(file.read_text()) if file.is_file() else None

    @property
    def metrics(self) -> pd.DataFrame | None:
        """One row per epoch."""
        file = self.path / "metrics.csv"
        return pd.read_csv(file) if file.is_file() else None

    @property
    def samples(self) -> pd.DataFrame | None:
        """One row per training sample."""
        return self._table("samples")

    @property
    def radii(self) -> pd.DataFrame | None:
        """Histogram of the radii per epoch: epoch, low, high, count."""
        return self._table("radii")

    @property
    def extremes(self) -> dict[str, np.ndarray] | None:
        """Arrays {small, large}_{x, index, label, radius} of the training samples at both ends of the radii."""
        file = self.path / "extremes.npz"
        if not file.is_file():
            return None
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The verdict, as evaluation.json holds it."""
        file = self.path / "evaluation.json"
        return json.loads(file.read_text()) if file.is_file() else None

    @property
    def evaluation_samples(self) -> pd.DataFrame | None:
        """One row per evaluated sample."""
        return self._table("evaluation")

    def _table(self, stem: str) -> pd.DataFrame | None:
        file = self.path / f"{stem}.parquet"
        return pd.read_parquet(file) if file.is_file() else None
