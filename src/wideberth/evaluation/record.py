"""The record of an evaluation: one row per sample, and what can be said of them all."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from scipy.stats import binomtest
from torch import nn

from wideberth.checks import InputError, choice
from wideberth.data import Data, Readable
from wideberth.evaluation.evidence import AdversarialPoints
from wideberth.evaluation.recheck import Verification, recheck
from wideberth.evaluation.samples import upgraded_table
from wideberth.runs import write_atomically


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
    """

    samples: pd.DataFrame
    protocol: dict[str, Any]
    adversarial: AdversarialPoints | None = None

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

    def save(self, out: str | Path) -> Path:
        """Write evaluation.json, evaluation.parquet and adversarial.safetensors (the points), atomically."""
        out = Path(out)
        if self.adversarial is not None:
            self.adversarial.save(out / "adversarial.safetensors")
        write_atomically(out / "evaluation.parquet", lambda file: self.samples.to_parquet(file))
        text = json.dumps(self.summary(), indent=2)
        write_atomically(out / "evaluation.json", lambda file: file.write_text(text))
        return out

    @classmethod
    def load(cls, out: str | Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            InputError: where there is no evaluation.
        """
        out = Path(out)
        if not (out / "evaluation.json").is_file() or not (out / "evaluation.parquet").is_file():
            raise InputError(f"{str(out)!r}: holds no evaluation; run `wideberth evaluate` on it first")
        told = json.loads((out / "evaluation.json").read_text())
        samples = upgraded_table(pd.read_parquet(out / "evaluation.parquet"))
        points = out / "adversarial.safetensors"
        adversarial = AdversarialPoints.load(points) if points.is_file() else None
        derived = cls(samples, {}).summary().keys()
        return cls(samples, {name: value for name, value in told.items() if name not in derived}, adversarial)
