"""What each of two processes runs: train, and leave what this rank knows in the end. Started by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from training_tools import fit, mlp, tensors

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


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    around = {"perturbation": AWP(0.3), "averaging": EMA(0.5), "guard": OverfittingGuard(1.0), "keep": "best"}
    fit(
        mlp(),
        tensors(10, validation=2),
        folder / "around" / "run",
        radius=Fixed(0.1),
        trainer={"devices": 2, "strategy": "ddp", "callbacks": [Leave(folder / "around")]},
        **around,
    )
    for rule in ("simple", "lookahead"):
        fit(
            mlp(),
            tensors(11, validation=2),
            folder / rule / "run",
            radius=InstanceAdaptive(0.1, rule, gamma=0.01, warmup=0),
            trainer={"devices": 2, "strategy": "ddp", "callbacks": [Leave(folder / rule)]},
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
