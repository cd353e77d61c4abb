"""What each of two processes runs: train, and leave what this rank knows in the end. Started by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from training_tools import fit, mlp, tensors

import wideberth as wb
from wideberth.training.averaging import EMA
from wideberth.training.perturbation import AWP
from wideberth.training.radii import Fixed, InstanceAdaptive
from wideberth.training.stopping import OverfittingGuard


class Leave(L.Callback):
    """Writes weights, radii and the rows this rank was given, at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, _: int) -> None:
        self.rows += batch[2].tolist()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        torch.save({"state": module.state_dict(), "rows": self.rows}, self.folder / f"rank{trainer.global_rank}.pt")


def two_processes(folder: Path) -> dict[str, Any]:
    """The options of a trainer in two processes, which leave what they know in `folder`."""
    return {"devices": 2, "strategy": "ddp", "callbacks": [Leave(folder)]}


class Counting(wb.SampleState, wb.weightings.Weighting):
    """Counts how often each sample was visited, in a state of its own; the weight grows with it."""

    def __init__(self) -> None:
        super().__init__()
        self.add_sample_state("visits", fill=1)
        self.visits: Tensor

    def compute(self, batch: Any, points: Any, terms: Any) -> Tensor:
        self.visits[batch.index] += 1
        return self.visits[batch.index] / 2


def uneven() -> dict[str, Any]:
    """A run whose batches of 7 and, at the end, 6 rows do not divide evenly."""
    return {
        "data": tensors(20, validation=3),
        "radius": InstanceAdaptive(0.1, gamma=0.01, warmup=0),
        "weighting": Counting(),
        "regularizers": [wb.regularizers.EffectiveMargin(0.1)],
        "perturbation": AWP(0.3),
        "batch_size": 7,
        "epochs": 3,
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    fit(mlp(), out=folder / "uneven" / "run", **uneven(), trainer=two_processes(folder / "uneven"))
    around = {"perturbation": AWP(0.3), "averaging": EMA(0.5), "guard": OverfittingGuard(1.0), "keep": "best"}
    fit(
        mlp(),
        tensors(10, validation=2),
        folder / "around" / "run",
        radius=Fixed(0.1),
        trainer=two_processes(folder / "around"),
        **around,
    )
    for rule in ("simple", "lookahead"):
        fit(
            mlp(),
            tensors(11, validation=2),
            folder / rule / "run",
            radius=InstanceAdaptive(0.1, rule, gamma=0.01, warmup=0),
            trainer=two_processes(folder / rule),
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
