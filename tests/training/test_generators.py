"""Layers that draw from the global generators: a resumed run repeats their draws, and the caller's are left alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_tools import batch_of, fit, module_of, plain_sgd, seeded, tensors

import wideberth as wb
from wideberth.randomness import own_generators
from wideberth.training.averaging import SWA
from wideberth.training.perturbation import AWP
from wideberth.training.radii import Fixed
from wideberth.training.stopping import OverfittingGuard


class Draws(nn.Module):
    """Multiplies its input by noise of all three generators, in eval mode too, and remembers what it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[float, float, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        each = (float(torch.rand(())), random.random(), float(np.random.rand()))  # noqa: NPY002
        self.drawn.append(each)
        return x * (1 + 0.1 * sum(each))


def network(middle: nn.Module) -> nn.Module:
    made: nn.Module = seeded(
        lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), middle, nn.Linear(8, 3))
    )
    return made


def state() -> list[Any]:
    """Where all three generators are."""
    return [torch.random.get_rng_state().tolist(), random.getstate(), [str(v) for v in np.random.get_state()]]  # noqa: NPY002


def module_with(model: nn.Module) -> wb.RobustTraining:
    return module_of(model, radius=Fixed(0.1), optimizer=plain_sgd)


def trained(folder: Path, epochs: int, resume: Path | None = None) -> tuple[nn.Module, Path]:
    """Dropout in a trainer of one's own, none of our callbacks; the model and the checkpoint."""
    model, data = network(nn.Dropout(0.5)), tensors()
    module = module_with(model)
    for name in ("log", "log_dict", "_trainer"):  # what `module_of` put there
        vars(module).pop(name, None)
    module._trainer = None
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(module, wb.data.loader(data.train(), 4, shuffle=True), ckpt_path=resume, weights_only=True)
    checkpoint = folder / f"{epochs}.ckpt"
    trainer.save_checkpoint(checkpoint)
    return model, checkpoint


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_dropout_in_a_trainer_of_ones_own_resumes_exactly(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole, _ = trained(tmp_path, 2)
    torch.manual_seed(2)
    _, checkpoint = trained(tmp_path, 1)
    torch.manual_seed(3)
    resumed, _ = trained(tmp_path, 2, resume=checkpoint)
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))


def test_each_step_draws_anew_and_a_step_done_again_draws_the_same() -> None:
    layer = Draws()
    module = module_with(network(layer))
    drawn = []
    for epoch, place in ((0, 0), (0, 1), (1, 0), (0, 0)):
        module._trainer.current_epoch = epoch  # type: ignore[union-attr]
        layer.drawn.clear()
        module.training_step(batch_of(tensors(), [0, 1, 2, 3]), place)
        drawn.append(list(layer.drawn))
    assert drawn[0] == drawn[3]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert all(a != b for pair in zip(drawn[one], drawn[two], strict=True) for a, b in zip(*pair, strict=True))


def test_a_step_leaves_the_generators_alone() -> None:
    module, before = module_with(network(Draws())), state()
    module.training_step(batch_of(tensors(), [0, 1, 2, 3]), 0)
    module.validation_step(batch_of(tensors(), [0, 1, 2, 3]), 0)
    assert state() == before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_whole_run_leaves_the_generators_alone(tmp_path: Path, workers: int) -> None:
    torch.manual_seed(5)
    before = state()
    around: dict[str, Any] = {"averaging": SWA(0), "guard": OverfittingGuard(1.0), "perturbation": AWP(0.01)}
    fit(network(Draws()), tensors(12, validation=4), tmp_path / "run", radius=Fixed(0.1), workers=workers, **around)
    assert state() == before


def test_generators_are_put_back_after_an_error() -> None:
    def fail() -> None:
        with own_generators(3):
            Draws()(torch.rand(1))
            raise KeyError

    before = state()
    with pytest.raises(KeyError):
        fail()
    assert state() == before


def test_without_a_seed_the_draws_go_on_and_are_taken_back() -> None:
    torch.manual_seed(4)
    with own_generators(None):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), first)
