"""The catalogue of policies: what is exported is complete, keeps the promises of its kind, and goes by its name."""

from __future__ import annotations

import inspect
import pkgutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from examples import examples
from test_composition import DIGITS, network, stepped
from torch import Tensor, nn
from training_tools import context_of, module_of, plain_sgd, seeded

import wideberth as wb
from wideberth.commands import train as train_command
from wideberth.commands.parsing import prepared
from wideberth.randomness import Noise
from wideberth.training.catalogue import KINDS, MODULES, ROOMS, exported
from wideberth.training.regularizers import Regularizer

OWN = '''
import torch
from torch import Tensor, nn
import wideberth as wb
from wideberth.randomness import Noise

class Flat(wb.regularizers.Regularizer):
    """Mean squared logit."""

    def compute(self, model: nn.Module, point: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """One value per sample, (B,)."""
        return model(point).square().mean(1)
'''


def test_every_kind_is_there() -> None:
    """Each is an option of `train`, has a public room, and exports something."""
    parameters = inspect.signature(wb.train).parameters
    for kind in KINDS:
        assert kind.option in parameters
        assert getattr(wb, kind.room) is import_module(kind.module)
        assert exported(kind.option)
    assert ROOMS.keys() <= set(wb.__all__)
    assert {kind.option for kind in KINDS} == MODULES.keys()


@pytest.mark.parametrize("option", ["attack", "radius", "objective", "weighting", "regularizers", "averaging"])
def test_every_class_is_exported(option: str) -> None:
    """What the files of a kind define is among what its module exports: a missing line fails here."""
    module = import_module(MODULES[option])
    base = getattr(module, next(kind.base for kind in KINDS if kind.option == option))
    files = [module] + [
        import_module(f"{module.__name__}.{m.name}") for m in pkgutil.iter_modules(getattr(module, "__path__", []))
    ]
    defined = {
        name
        for file in files
        for name, value in vars(file).items()
        if inspect.isclass(value) and issubclass(value, base) and value.__module__ == file.__name__
        if not name.startswith("_") and not inspect.isabstract(value)
    }
    assert defined == exported(option).keys()


def test_every_option_finds_its_classes_by_name() -> None:
    for option, module in MODULES.items():
        for name in exported(option):
            assert prepared([f"--{option}={name}"]) == [f"--{option}={module}.{name}"]


# ---- conformance ----------------------------------------------------------------------------------------------------


def smooth() -> nn.Module:
    """A small network in float64 with a batch norm and dropout, in train mode, for inputs (B, 6)."""
    layers = lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    made: nn.Module = seeded(layers)
    return made.double()


def values(regularizer: Regularizer, model: nn.Module, rows: list[int]) -> Tensor:
    x = torch.rand(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y, index = torch.tensor([0, 1, 2, 0, 1]), torch.arange(10, 15)
    return regularizer(model, x[rows], y[rows], Noise(index[rows], 4))


def check_regularizer(make: Any) -> None:
    """What every regularizer promises."""
    regularizer, model = make(), smooth()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generators = torch.random.get_rng_state()
    whole = values(regularizer, model, [0, 1, 2, 3, 4])
    assert whole.shape == (5,)
    assert whole.dtype == torch.float64
    assert whole.isfinite().all()
    gradients = torch.autograd.grad(whole.mean(), list(model.parameters()), allow_unused=True)
    assert any(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients)
    # The model is as it was, and so are the generators.
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), generators)
    # A value belongs to its row, whatever else is in the batch.
    torch.testing.assert_close(values(regularizer, model, [3, 0, 4]), whole[[3, 0, 4]])
    torch.testing.assert_close(values(regularizer, model, [2]), whole[[2]])


@pytest.mark.parametrize("name", exported("regularizers"))
def test_regularizers_keep_their_promises(name: str) -> None:
    check_regularizer(examples("regularizers")[name])


@pytest.mark.parametrize("name", exported("radius"))
def test_radius_policies_keep_their_promises(name: str) -> None:
    policy, model = examples("radius")[name](), seeded(lambda: nn.Linear(6, 10))
    policy.allocate(20)
    x, y = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 9, 3, 3])
    batch = context_of(model, x, y, index=torch.tensor([19, 0, 7, 3]))
    others = torch.tensor([place for place in range(20) if place not in (19, 0, 7, 3)])
    before = {state: value.clone() for state, value in policy.sample_states.items()}
    eps = policy.propose(batch)
    assert eps.shape == (4,)
    assert bool((eps >= 0).all())
    points = policy.adjust(batch, batch.attack(eps))
    assert points.x.shape == x.shape
    assert points.x.dtype == x.dtype
    assert torch.equal(points.x, points.x.clamp(0, 1))
    assert torch.equal(points.x[eps == 0], x[eps == 0])
    policy.observe(batch, model(points.x))
    for state, value in policy.sample_states.items():
        assert value.shape == (20,)
        assert torch.equal(value[others], before[state][others])
    assert policy.eval_eps() >= 0


# ---- one file and one row -------------------------------------------------------------------------------------------


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A regularizer in a file of its own, and what the one import line in `regularizers/__init__.py` would do."""
    (tmp_path / "flat_added.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = import_module("flat_added")
    monkeypatch.setattr(module.Flat, "__module__", "wideberth.training.regularizers.flat_added")
    monkeypatch.setattr(wb.regularizers, "Flat", module.Flat, raising=False)
    monkeypatch.setitem(sys.modules, "wideberth.training.regularizers.flat_added", module)
    return "Flat"


def test_a_regularizer_is_one_file_and_one_row(added: str) -> None:
    assert added in exported("regularizers")
    make = examples("regularizers")[added]
    check_regularizer(make)
    module = module_of(network(), len(DIGITS.train()), regularizers=[make()])
    assert torch.isfinite(stepped(module, plain_sgd(module.parameters()), 0))
    words = ["--model=MLP", "--data=Digits", f"--regularizers+={added}", "--regularizers.weight=0.5"]
    config = train_command.parser().parse_args(prepared([*words, "--model.shape=[1,8,8]", "--model.classes=10"]))
    chosen = yaml.safe_load(train_command.parser().dump(config, skip_none=False))["regularizers"]
    assert [each["init_args"]["weight"] for each in chosen] == [0.5]
    assert chosen[0]["class_path"].endswith(f".{added}")
