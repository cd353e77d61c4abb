"""The EMR claim on MNIST: does keeping the effective weight small widen the margin and buy robustness, at what cost?

Standard training of an MLP 784-300-100 without batch norm on the first 10,000 training rows, 20 epochs; tested on the
first 1,000 test rows by PGD-20 in linf 0.1 on margin and cross-entropy. One row per regularizer: mean over the seeds,
the spread from lowest to highest in brackets.

    uv run python benchmarks/claims_emr.py --data DATA --out runs/claims_emr
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import wideberth as wb

EPS = 0.1


def settings(weight: float) -> dict[str, dict[str, Any]]:
    """The regularizers compared, by name; one weight each, set by hand on seed 0 of EMR projection, not swept."""
    emr = wb.regularizers.EffectiveMargin
    return {
        "none": {},
        "weight decay 0.1": {"weight_decay": 0.1},
        "weight decay 1": {"weight_decay": 1.0},
        "input gradient": {"regularizers": [wb.regularizers.InputGradient(10 * weight)]},
        "EMR projection": {"regularizers": [emr(weight, "projection")]},
        "EMR exact": {"regularizers": [emr(weight, "exact")]},
        "EMR softmax T=1": {"regularizers": [emr(10 * weight, "softmax", temperature=1.0)]},
    }


def run(name: str, setting: dict[str, Any], seed: int, data: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Train, judge and measure one setting."""
    torch.manual_seed(seed)
    model = wb.models.MLP(shape=(1, 28, 28), classes=10, hidden=(300, 100))
    # Decoupled (AdamW), so that decay is a shrinkage of the weights whatever Adam's scaling of the gradient.
    decay = setting.get("weight_decay", 0.0)
    wb.train(
        model,
        data,
        options.out / f"{name.replace(' ', '_')}-{seed}",
        regularizers=setting.get("regularizers", ()),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3, weight_decay=decay),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs),
        epochs=options.epochs,
        seed=seed,
        probe=0,
        progress=False,
        overwrite=True,
    )
    found = wb.evaluate(model, data, norm="linf", eps=EPS, suite="pgd")
    x, y, _ = data.test().tensors()
    return {
        "regularizer": name,
        "seed": seed,
        "clean": found.clean_accuracy,
        "robust": found.robust_accuracy,
        "effective margin (linf)": float(wb.margins.effective_margin(model, x, y, norm="linf").median()),
        "weight norm (l2)": float(wb.margins.effective_weight_norm(model, x, y, norm="l2").median()),
        "logit margin": float(wb.margins.logit_margin(model, x, y).median()),
    }


def table(results: list[dict[str, Any]]) -> pd.DataFrame:
    """Mean over the seeds, lowest and highest in brackets."""
    frame = pd.DataFrame(results)
    grouped = frame.drop(columns="seed").groupby("regularizer", sort=False)
    return grouped.agg(lambda v: f"{v.mean():.3f} [{v.min():.3f}, {v.max():.3f}]").reset_index()


def main() -> None:
    """Run all settings and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="root of torchvision's MNIST")
    parser.add_argument("--out", type=Path, default=Path("runs/claims_emr"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--weight", type=float, default=0.01, help="of ||J||_F^2; the others are scaled beside it")
    parser.add_argument("--only", default="", help="only settings whose name contains this")
    options = parser.parse_args()
    logging.getLogger("lightning").setLevel(logging.ERROR)
    data = wb.data.MNIST(root=options.data, download=False, train_rows=10_000, test_rows=1_000)
    results = []
    for name, setting in settings(options.weight).items():
        if options.only not in name:
            continue
        for seed in range(options.seeds):
            results.append(run(name, setting, seed, data, options))
            print(json.dumps(results[-1]), flush=True)
    print(f"\ntorch {torch.__version__}, {platform.machine()}, EMR weight {options.weight}, {options.epochs} epochs")
    print(table(results).to_string(index=False))


if __name__ == "__main__":
    main()
