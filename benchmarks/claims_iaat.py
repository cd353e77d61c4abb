"""The IAAT claim on CIFAR-10: at equal robust accuracy, is clean accuracy above what fixed radii give?

PGD-AT at several fixed radii traces a curve of clean against robust accuracy (at 8/255). Each IAAT setting is one
point; its gain is the height of that point above the curve, interpolated at the same robust accuracy along the
undominated fixed radii. Same network, rows, epochs, optimizer and attack steps for all; lookahead spends three attacks
a step instead of one. In the warm-up, fixed radii ramp up linearly (a large radius from the first step may not train
at all), IAAT attacks at 8/255 what is already classified correctly.

    uv run python benchmarks/claims_iaat.py --data DATA --out runs/claims_iaat

Finished runs are kept in OUT/results.jsonl, so an interrupted benchmark continues where it was.
"""

from __future__ import annotations

import argparse
import logging
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ledger import results

FIXED = (2, 4, 6, 8)
ADAPTIVE: dict[str, dict[str, Any]] = {
    "simple, gamma 1.9": {"rule": "simple", "gamma": 1.9 / 255},
    "lookahead, beta 0.5": {"rule": "lookahead", "gamma": 1.9 / 255, "beta": 0.5},
}
# What may move the result, run after the above: gamma, warm-up, smoothing, what becomes of misclassified samples.
ABLATIONS: dict[str, dict[str, Any]] = {
    "simple, gamma 0.6": {"rule": "simple", "gamma": 0.6 / 255},
    "simple, gamma 1.9, decay 0.1": {"rule": "simple", "gamma": 1.9 / 255, "misclassified": "decay"},
    "simple, gamma 1.9, no warm-up": {"rule": "simple", "gamma": 1.9 / 255, "warmup": 0},
    "lookahead, beta 0.1, decay (authors)": {
        "rule": "lookahead",
        "gamma": 1.9 / 255,
        "beta": 0.1,
        "misclassified": "decay",
    },
}


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and judge one setting."""
    import torch

    import wideberth as wb

    logging.getLogger("lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = wb.data.ParquetImages(
        train=f"{options.data}/train.parquet",
        test=f"{options.data}/test.parquet",
        train_rows=options.rows,
        test_rows=options.test_rows,
    )
    model = wb.models.ConvNet(shape=(3, 32, 32), classes=10, width=options.width, batch_norm=True)
    step: Any = wb.attacks.ScaledStep(2, floor=2 / 255) if "authors" in name else wb.attacks.ScaledStep(2.5)
    if name.startswith("fixed"):
        radius: Any = wb.radii.Fixed(float(name.split()[1]) / 255, warmup=options.warmup)
    else:
        radius = wb.radii.InstanceAdaptive(8 / 255, **({"warmup": options.warmup} | (ADAPTIVE | ABLATIONS)[name]))
    began = time.monotonic()
    trained = wb.train(
        model,
        data,
        options.out / f"{name.replace(' ', '_').replace(',', '')}-{seed}",
        attack=wb.attacks.PGD(steps=options.steps, step_size=step),
        radius=radius,
        augment=wb.data.CropFlip(),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs),
        epochs=options.epochs,
        seed=seed,
        probe=0,
        channels_last=True,
        progress=False,
        overwrite=True,
    )
    seconds = time.monotonic() - began
    found = wb.evaluate(model, data, eps=8 / 255, suite="pgd", margin=False)
    learned = trained.samples.get("radius") if trained.samples is not None else None
    spread = [] if learned is None else [255 * float(learned.quantile(q)) for q in (0, 0.25, 0.5, 0.75, 1)]
    return {
        "clean": 100 * found.clean_accuracy,
        "robust": 100 * found.robust_accuracy,
        "radius_quantiles": [round(q, 2) for q in spread],
        "train_seconds": seconds,
    }


def gains(found: pd.DataFrame) -> pd.DataFrame:
    """Per setting: accuracies, height above the fixed-radius curve of its seed, radii min/q1/median/q3/max."""
    rows = []
    for name, group in found.groupby("name", sort=False):
        heights = []
        for entry in group.itertuples():
            curve = found[(found.seed == entry.seed) & found.name.str.startswith("fixed")].sort_values("robust")
            # A radius that another beats on both accounts is no reference: it would pull the curve down.
            curve = curve[curve.clean[::-1].cummax()[::-1] == curve.clean]
            inside = len(curve) > 1 and curve.robust.min() <= entry.robust <= curve.robust.max()
            heights.append(entry.clean - np.interp(entry.robust, curve.robust, curve.clean) if inside else np.nan)
        shown = ["outside" if np.isnan(height) else f"{height:+.1f}" for height in heights]
        radii = np.array([entry for entry in group.radius_quantiles if entry])
        rows.append(
            {
                "setting": name,
                "seeds": len(group),
                "clean": f"{group.clean.mean():.1f}",
                "robust": f"{group.robust.mean():.1f}",
                "gain over curve, by seed": "" if str(name).startswith("fixed") else ", ".join(shown),
                "radii (x255)": " / ".join(f"{r:.1f}" for r in radii.mean(0)) if len(radii) else "",
                "train s": f"{group.train_seconds.mean():.0f}",
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.parquet and test.parquet of CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("runs/claims_iaat"))
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--test-rows", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--only", default="", help="only settings whose name contains this")
    options = parser.parse_args()
    curve = [*(f"fixed {radius}" for radius in FIXED), *ADAPTIVE]
    # Both rules for every seed before the ablations: an interrupted benchmark still answers its question.
    order = [(name, seed) for part in (curve, [*ABLATIONS]) for seed in range(options.seeds) for name in part]
    found = results(run, order, options)
    print(
        f"\n{options.rows} rows, {options.epochs} epochs, width {options.width}, PGD-{options.steps} training; "
        f"judged on {options.test_rows} test rows at 8/255 by PGD-20 margin and cross-entropy, 2 restarts each"
    )
    error = 100 * (0.25 / options.test_rows) ** 0.5
    print(f"standard error of one accuracy: up to {error:.1f} points; torch {version('torch')}")
    print(gains(found).to_string(index=False))


if __name__ == "__main__":
    main()
