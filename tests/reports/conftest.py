"""Six synthetic run directories, with the shapes that real training on the 8x8 digits leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.datasets import load_digits

from wideberth.runs import Run

EPS = 0.1
EPOCHS = 30
EVALUATED = 360
# name: (clean, robust, median margin, final weight norm, regularized, adaptive radii)
METHODS: dict[str, tuple[float, float, float, float, bool, bool]] = {
    "standard": (0.983, 0.286, 0.062, 310.0, False, False),
    "standard + EMR": (0.978, 0.531, 0.104, 41.0, True, False),
    "PGD-AT": (0.956, 0.722, 0.141, 58.0, False, False),
    "IAAT": (0.969, 0.714, 0.138, 52.0, False, True),
    "AT + EMR": (0.950, 0.764, 0.158, 17.5, True, False),
    "IAAT + EMR": (0.964, 0.772, 0.161, 18.9, True, True),
}
ATTACKS = (("APGD-CE", 0.02), ("APGD-T", 0.008), ("FAB-T", 0.002), ("Square", 0.0))


def _config(name: str, regularized: bool, adaptive: bool) -> dict[str, Any]:
    adversarial = not name.startswith("standard")
    radius = "InstanceAdaptive" if adaptive else "Fixed"
    weight = {"class_path": "wideberth.regularizers.EffectiveMargin", "init_args": {"weight": 0.02}}
    return {
        "name": name,
        "model": {"class_path": "wideberth.models.SmallConv", "init_args": {"classes": 10, "width": 32}},
        "data": {"class_path": "wideberth.data.Digits", "init_args": {"batch_size": 128}},
        "attack": {"class_path": "wideberth.attacks.PGD", "init_args": {"norm": "linf", "steps": 10}},
        "radius": {"class_path": f"wideberth.radii.{radius}", "init_args": {"eps": EPS if adversarial else 0.0}},
        "objective": {"class_path": "wideberth.objectives.CrossEntropy"},
        "weighting": None,
        "regularizers": [weight] if regularized else [],
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
        "epochs": EPOCHS,
        "seed": 0,
    }


def _metrics(clean: float, robust: float, margin: float, norm: float, rng: np.random.Generator) -> pd.DataFrame:
    epoch = np.arange(EPOCHS)
    rise = 1 - np.exp(-(epoch + 1) / 6)
    jitter = lambda size: size * rng.standard_normal(EPOCHS)
    return pd.DataFrame(
        {
            "epoch": epoch,
            "step": 12 * (epoch + 1),
            "loss": 2.3 * np.exp(-epoch / 8) + 1.4 * (1 - robust) + jitter(0.02),
            "penalty": np.nan,
            "accuracy_clean": clean * rise + jitter(0.004),
            "validation_clean": clean * rise + jitter(0.006),
            "validation_robust": robust * rise * (1 - 0.0015 * epoch) + jitter(0.008),
            "effective_margin": margin * rise + jitter(0.001),
            "effective_weight_norm": np.exp(np.log(norm) * rise + jitter(0.02)),
            "learning_rate": 0.1 * (1 + np.cos(np.pi * epoch / EPOCHS)) / 2,
            "seconds": 1.5 + np.abs(jitter(0.1)),
        }
    )


def _radii(rng: np.random.Generator, samples: int) -> tuple[pd.DataFrame, np.ndarray]:
    ease = rng.beta(1.6, 1.1, samples)
    edges = np.linspace(0, 2 * EPS, 41)
    frames = []
    radii = np.full(samples, EPS / 10)
    for epoch in range(EPOCHS):
        radii = np.clip(radii + 0.12 * (2 * EPS * ease - radii), 0, 2 * EPS)
        counts, _ = np.histogram(radii, edges)
        frames.append(pd.DataFrame({"epoch": epoch, "low": edges[:-1], "high": edges[1:], "count": counts}))
    return pd.concat(frames, ignore_index=True), radii


def write_run(path: Path, name: str, seed: int = 0) -> Path:
    """Write one of `METHODS` as a finished and evaluated run."""
    clean, robust, margin, norm, regularized, adaptive = METHODS[name]
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(_config(name, regularized, adaptive), sort_keys=False))
    _metrics(clean, robust, margin, norm, rng).to_csv(path / "metrics.csv", index=False)
    digits = load_digits()
    images, digit_labels = (digits.images / 16).astype(np.float32)[:, None], digits.target
    samples = pd.DataFrame({"index": np.arange(1000), "label": digit_labels[:1000], "radius": EPS})
    if adaptive:
        table, radii = _radii(rng, 1000)
        table.to_parquet(path / "radii.parquet")
        samples["radius"] = radii
        order = np.argsort(radii)
        ends = {"small": order[:16], "large": order[::-1][:16]}
        arrays = {
            f"{kind}_{field}": values[index]
            for kind, index in ends.items()
            for field, values in (
                ("x", images), ("index", np.arange(1000)), ("label", digit_labels), ("radius", radii.astype(np.float32))
            )
        }  # fmt: skip
        np.savez(path / "extremes.npz", **arrays)
    samples.to_parquet(path / "samples.parquet")

    correct = rng.random(EVALUATED) < clean
    margins = np.where(correct, 1, -0.2) * margin * rng.gamma(4, 1 / 3.67, EVALUATED)
    pd.DataFrame(
        {
            "index": np.arange(EVALUATED),
            "label": digit_labels[1000 : 1000 + EVALUATED],
            "clean_correct": correct,
            "robust": margins > EPS,
            "effective_margin": margins.astype(np.float32),
        }
    ).to_parquet(path / "evaluation.parquet")
    interval = lambda p: [p - 1.96 * (p * (1 - p) / EVALUATED) ** 0.5, p + 1.96 * (p * (1 - p) / EVALUATED) ** 0.5]
    verdict = {
        "model": name, "data": "digits", "split": "test", "norm": "linf", "eps": EPS, "suite": "standard",
        "n": EVALUATED, "clean_accuracy": clean, "robust_accuracy": robust, "clean_interval": interval(clean),
        "robust_interval": interval(robust), "confidence": 0.95,
        "attacks": [
            {"name": attack, "robust_accuracy": robust + above, "seconds": 2.0,
             "settings": {"class_path": f"wideberth.attacks.{attack}", "init_args": {"steps": 100}}}
            for attack, above in ATTACKS
        ],
        "effective_margin": {"median": margin, "mean": margin}, "effective_weight_norm": {"median": norm},
        "evaluations_per_sample": 812.4, "seed": 0,
        "versions": {"wideberth": "0.1.0", "torch": "2.11.0", "python": "3.11.7"},
    }  # fmt: skip
    (path / "evaluation.json").write_text(json.dumps(verdict))
    return path


@pytest.fixture(scope="session")
def six_paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    slug = lambda name: name.lower().replace(" + ", "-")
    return [write_run(root / slug(name), name, seed) for seed, name in enumerate(METHODS)]


@pytest.fixture
def six(six_paths: list[Path]) -> list[Run]:
    """One run per method; do not write into them."""
    return [Run(path) for path in six_paths]


@pytest.fixture
def iaat(six: list[Run]) -> Run:
    return six[3]


@pytest.fixture
def altered(six_paths: list[Path], tmp_path: Path) -> Callable[..., Run]:
    """A private copy of a run: `altered(position, directory, drop=files, config=updates, evaluation=updates)`."""

    def copy(
        position: int,
        directory: str = "copy",
        drop: tuple[str, ...] = (),
        config: dict[str, Any] | None = None,
        evaluation: dict[str, Any] | None = None,
    ) -> Run:
        path = tmp_path / directory
        shutil.copytree(six_paths[position], path, ignore=shutil.ignore_patterns(*drop))
        for name, updates, read, write in (
            ("config.yaml", config, yaml.safe_load, yaml.safe_dump),
            ("evaluation.json", evaluation, json.loads, json.dumps),
        ):
            if updates:
                file = path / name
                file.write_text(write(read(file.read_text()) | updates))
        return Run(path)

    return copy
