"""Robust overfitting, and what keeping the best held-out epoch recovers (Rice, Wong and Kolter 2020), on a small scale.

The network and attack of the recipe `cifar10/small-pgd-at` on few rows for many epochs at a constant learning rate:
robust accuracy on held-out rows rises, and then falls while the training loss goes on falling. The checkpoint of the
last epoch and the one that the held-out rows chose are judged by the `fast` suite on test rows that chose nothing.
With `--emr` the same is done with effective margin regularisation, at each of the weights given (0: without).

    uv run python benchmarks/overfitting.py --data FOLDER_WITH_PARQUET_FILES --out runs/overfitting --emr 0 0.001 0.01
"""

from __future__ import annotations

import argparse
import logging
from itertools import product
from pathlib import Path
from typing import Any

import torch

import wideberth as wb


def main() -> None:
    """Train, judge both checkpoints of every seed, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.parquet and test.parquet of CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("runs/overfitting"))
    parser.add_argument("--rows", type=int, default=2500, help="training rows, of which 500 are held out")
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--emr", type=float, nargs="+", default=[0.0], help="weights of EffectiveMargin")
    parser.add_argument("--threads", type=int, help="torch's own choice if not given")
    options = parser.parse_args()
    logging.getLogger("lightning").setLevel(logging.ERROR)
    if options.threads:
        torch.set_num_threads(options.threads)
    for seed, weight in product(range(options.seeds), options.emr):
        torch.manual_seed(seed)
        data = wb.data.ParquetImages(
            train=f"{options.data}/train.parquet",
            test=f"{options.data}/test.parquet",
            train_rows=options.rows,
            test_rows=options.test_rows,
            validation=500,
        )
        model = wb.models.ConvNet(shape=(3, 32, 32), classes=10, width=options.width, batch_norm=True)
        run = wb.train(
            model,
            data,
            options.out / f"emr-{weight:g}-{seed}",
            attack=wb.attacks.PGD(steps=5),
            radius=wb.radii.Fixed(8 / 255, warmup=2),
            regularizers=[wb.regularizers.EffectiveMargin(weight)] if weight else [],
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
            epochs=options.epochs,
            keep="best",
            seed=seed,
            probe=0,
            channels_last=True,
            overwrite=True,
        )
        assert run.metrics is not None
        curve = run.metrics["validation_robust"]
        print("held-out robust accuracy, %, by epoch:", " ".join(f"{100 * value:.0f}" for value in curve))
        for name in ("best", "last"):
            saved = torch.load(run.path / "checkpoints" / f"{name}.ckpt", weights_only=True)
            weights = {key[6:]: value for key, value in saved["state_dict"].items() if key.startswith("model.")}
            model.load_state_dict(weights)
            told = f"EMR {weight:g}, seed {seed}, {name} (epoch {saved['epoch'] + 1})"
            print(f"{told}: {judged(model, data)}", flush=True)


def judged(model: torch.nn.Module, data: Any) -> str:
    """Clean and robust accuracy on the test rows, the latter with its exact interval, and the median margin."""
    found = wb.evaluate(model, data, eps=8 / 255, suite="fast", examined=False)
    low, high = found.interval("robust")
    robust = f"robust {found.robust_accuracy:.1%} [{low:.1%}, {high:.1%}]"
    margin = found.samples["effective_margin"].median()
    return f"clean {found.clean_accuracy:.1%}, {robust}, effective margin x 255 {255 * margin:.2f}"


if __name__ == "__main__":
    main()
