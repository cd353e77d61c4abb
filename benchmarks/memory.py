"""Memory of an evaluation and of margins against the number of samples: each size in a fresh process.

    uv run python benchmarks/memory.py                       2,000 and 20,000 rows of 3x64x64
    uv run python benchmarks/memory.py --rows 500 5000 --out memory.jsonl

The data set makes each row from its index, so that it takes no memory of its own; the network is small and the line-up
one short attack. Shown for each number of rows: the peak of the resident memory, of which the peak before the first
sample is read is a part (libraries, model), the seconds, and at the end how the peaks compare.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import wideberth as wb
from wideberth import margins
from wideberth.attacks import PGD

SHAPE = (3, 64, 64)
EPS = 0.1


class Synthetic(Dataset[Any]):
    """Noise around a grey level that tells the class, made from the index: about half is within `EPS` of the other."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(row)
        distance = 0.2 * torch.rand((), generator=generator)
        side = 2 * (row % 2) - 1
        return (0.5 + side * distance + 0.05 * torch.randn(SHAPE, generator=generator)).clamp_(0, 1), row % 2


class Net(nn.Module):
    """Convolutions whose mean over the image tells dark from bright."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU())
        self.head = nn.Linear(1, 2)
        with torch.no_grad():
            for layer in (self.body[0], self.body[2]):
                layer.weight.fill_(1 / layer.weight[0].numel())
                layer.bias.zero_()
            self.head.weight.copy_(torch.tensor([[-10.0], [10.0]]))
            self.head.bias.copy_(torch.tensor([5.0, -5.0]))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 2)."""
        logits: Tensor = self.head(self.body(x).mean((1, 2, 3), keepdim=False)[:, None])
        return logits


def peak() -> float:
    """Of this process's resident memory, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(what: str, rows: int, batch_size: int) -> dict[str, Any]:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    model, data = Net().eval(), Synthetic(rows)
    before, began = peak(), time.monotonic()
    entry: dict[str, Any] = {"what": what, "rows": rows}
    if what == "margins":
        margins.table(model, data, "linf", batch_size=batch_size)
    else:
        suite = {"PGD": PGD(steps=3, keep="worst", loss=wb.losses.margin_loss)}
        found = wb.evaluate(
            model, data, eps=EPS, suite=suite, batch_size=batch_size, margin=False, evidence=what == "evaluate"
        )
        entry |= {"clean": found.clean_accuracy, "robust": found.robust_accuracy}
    return entry | {"before_mb": before, "peak_mb": peak(), "seconds": time.monotonic() - began}


def main() -> None:
    """Measure each size in a fresh process, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000, 20_000])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--what", nargs="+", default=["evaluate", "margins"], choices=["evaluate", "without evidence", "margins"]
    )
    parser.add_argument("--out", type=Path, help="append results here, as JSON lines")
    parser.add_argument("--alone", nargs=2, metavar=("WHAT", "ROWS"), help="measure this in this process")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measured(options.alone[0], int(options.alone[1]), options.batch_size)))
        return
    print(f"torch {torch.__version__}, 1 thread of {os.cpu_count()} cores, {platform.machine()}")
    for what in options.what:
        peaks = []
        for rows in options.rows:
            words = [sys.executable, __file__, "--batch-size", str(options.batch_size), "--alone", what, str(rows)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            entry = json.loads(done.stdout.splitlines()[-1])
            peaks.append(entry["peak_mb"])
            print(entry, flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
        print(f"{what}: largest over smallest peak {max(peaks) / min(peaks):.3f}")


if __name__ == "__main__":
    main()
