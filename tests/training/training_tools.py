"""What the tests of training share: tiny data, tiny nets, one step without a trainer, one run with few words."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import wideberth as wb
from wideberth.randomness import Noise
from wideberth.training.batch import BatchContext, TrainingPoints
from wideberth.training.module import Batch
from wideberth.training.policies import Optimization, Policies


def tensors(rows: int = 12, shape: tuple[int, ...] = (5,), classes: int = 3, **limits: Any) -> wb.data.Tensors:
    """Random inputs in the unit box; the first entries tell the class."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.rand(rows + 4, *shape, generator=generator)
    y = x.flatten(1)[:, :classes].argmax(1)
    return wb.data.Tensors(x[:rows], y[:rows], x[rows:], y[rows:], classes=classes, **limits)


def seeded(make: Any, seed: int = 0) -> Any:
    """What `make` makes with the global generator seeded, and the generator left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def mlp(features: int = 5, classes: int = 3, width: int = 8, **options: Any) -> nn.Module:
    made: nn.Module = seeded(lambda: wb.models.MLP((features,), classes, (width,), **options))
    return made


def halves() -> nn.Module:
    """Logits (x - 1/2, 1/2 - x) of inputs (B, 1): an input of class 0 is |x - 1/2| away from the boundary, exactly."""
    model = nn.Linear(1, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model.bias.copy_(torch.tensor([-0.5, 0.5]))
    return model


def context_of(model: nn.Module, x: Tensor, y: Tensor, *, epoch: int = 0, **options: Any) -> BatchContext:
    """A batch as the policies see it, attacked by FGSM from the clean input unless said otherwise."""
    attack = options.pop("attack", wb.attacks.FGSM())
    index = options.pop("index", torch.arange(len(y)))
    given = {"progress": float(epoch)} | options
    noise = Noise(index, 7, epoch)
    return BatchContext(model, x, y, index, epoch=epoch, noise=noise, training_attack=attack, **given)


def points_at(x: Tensor, near_boundary: Tensor | None = None) -> TrainingPoints:
    """Points of training without an attack's result."""
    return TrainingPoints(x, near_boundary=near_boundary)


def module_of(model: nn.Module, samples: int = 12, **policies: Any) -> wb.RobustTraining:
    """A training module that thinks it stands at the first of four batches of epoch 0, and logs nothing."""
    policies = {"attack": wb.attacks.PGD(steps=2)} | policies
    how = {name: policies.pop(name) for name in ("optimizer", "scheduler") if name in policies}
    module = wb.RobustTraining(model, samples, Policies(**policies), Optimization(**how))
    trainer = SimpleNamespace(num_training_batches=4, current_epoch=0, global_step=0, global_rank=0, world_size=1)
    module._trainer = trainer  # type: ignore[assignment]
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    return module.train()


def batch_of(data: wb.data.Data, rows: list[int]) -> Batch:
    return data.train().__getitems__(rows)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def plain_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def fit(model: nn.Module, data: wb.data.Data, out: Path, **options: Any) -> wb.Run:
    """`wideberth.train` with small defaults, on the CPU."""
    given = {
        "attack": wb.attacks.PGD(steps=2),
        "optimizer": plain_sgd,
        "epochs": 2,
        "batch_size": 4,
        "probe": 4,
        "progress": False,
    }
    trainer = {"accelerator": "cpu"} | options.pop("trainer", {})
    return wb.train(model, data, out, **(given | options), trainer=trainer)
