"""What a file may name: everything of ours where it belongs, nothing else, and nothing of that is imported."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import wideberth as wb
from wideberth.configuration import describe
from wideberth.recipes import find_recipe, recipe_names
from wideberth.trust import LARGEST, UNKNOWN, NotTrusted, Place, arguments, check, check_configuration, place

Loss = Callable[[Tensor, Tensor], Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
HINTS = get_type_hints(wb.train)
ROOMS = (
    wb.models,
    wb.data,
    wb.attacks,
    wb.losses,
    wb.radii,
    wb.objectives,
    wb.weightings,
    wb.regularizers,
    wb.schedules,
    wb.stopping,
    wb.averaging,
)


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (int, Place(plain=True)),
        (str | None, Place(plain=True)),
        (Path, Place(plain=True)),
        (Literal["a", "b"], Place(plain=True)),
        (nn.Module, Place((nn.Module,))),
        (nn.Module | None, Place((nn.Module,))),
        (type[nn.Module], Place((nn.Module,))),
        (float | nn.Module, Place((nn.Module,), plain=True)),
        (MakeOptimizer, Place((Optimizer,), callables=True)),
        (Loss, Place((Tensor,), callables=True)),
        (Callable, Place(callables=True)),
        (Sequence[nn.Module], Place(items=(nn.Module,))),
        (tuple[float, ...], Place(items=(float,))),
        (Mapping[str, nn.Module], Place(items=(nn.Module,))),
        (dict[str, Any], Place(items=(Any,))),
        (list, Place(items=(Any,))),
        (Any, UNKNOWN),
        (object, UNKNOWN),
        (type, UNKNOWN),
        ("a word", UNKNOWN),
    ],
)
def test_place(hint: Any, expected: Place) -> None:
    assert place(hint) == expected


def classes() -> list[type]:
    """All public classes of this library that a configuration can name."""
    found = {each for room in ROOMS for each in vars(room).values() if inspect.isclass(each)}
    return sorted((each for each in found if each.__module__.startswith("wideberth.")), key=lambda each: each.__name__)


@pytest.mark.parametrize("made", classes())
def test_constructors_say_what_every_argument_is(made: type) -> None:
    """Where they do not, a file could not be checked there."""
    hints = arguments(made)
    for base in [each for each in made.__mro__ if "__init__" in vars(each)]:
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                assert not place(hints.get(parameter.name, Any)).unknown, parameter.name
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break  # what the classes above take does not come from outside


def test_optimizers_and_schedules_of_torch_say_so_too() -> None:
    for made in (*vars(torch.optim).values(), *vars(torch.optim.lr_scheduler).values()):
        if inspect.isclass(made) and issubclass(made, Optimizer | LRScheduler):
            told = arguments(made)
            assert set(list(inspect.signature(made.__init__).parameters)[1:]) <= told.keys(), made
            assert not any(place(hint).unknown for hint in told.values()), made


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_need_no_trust(name: str) -> None:
    check_configuration(yaml.safe_load(find_recipe(name).read_text()), HINTS, name)


TAKEN: dict[str, Any] = {
    "model": [
        {"class_path": "MLP", "init_args": {"hidden": [8], "activation": "relu", "head": "mahalanobis(radius=5)"}},
        {"class_path": "wideberth.models:MLP", "init_args": {"head": "wideberth.models.CosineHead(scale=10)"}},
        {"class_path": "wideberth.models.MLP", "init_args": {"activation": "torch.nn.Softplus(beta=10)"}},
        {"class_path": "wideberth.models.MLP", "init_args": {"activation": {"class_path": "torch.nn.GELU"}}},
        {
            "class_path": "wideberth.models.Torchvision",
            "init_args": {"name": "vit_b_16", "options": {"image_size": 32}},
        },
        {"class_path": "torchvision.models.SqueezeNet", "init_args": {"version": "1_1"}},
        {"class_path": "torchvision.ops.MLP", "init_args": {"in_channels": 3, "hidden_channels": [4]}},
        "wideberth.models.MLP",
    ],
    "data": [
        {"class_path": "CIFAR10", "init_args": {"root": "my.data", "validation": 10, "train_rows": None}},
        {"class_path": "wideberth.data.ImageFolders", "init_args": {"root": "os.system", "size": 64}},
        {"class_path": "wideberth.data.Tensors", "init_args": {"x_train": [[0.5]], "box": [0, 1]}},
    ],
    "attack": [
        {"class_path": "PGD", "init_args": {"loss": "wideberth.losses.margin_loss", "step_size": {"ratio": 2}}},
        {"init_args": {"loss": "wideberth.losses.margin_loss", "norm": "l2"}},
        {"steps": 20, "step_size": "2/255"},
        "{class_path: PGD, init_args: {steps: 3}}",
        None,
    ],
    "objective": [
        {"class_path": "TRADES", "init_args": {"beta": 6, "loss": {"class_path": "wideberth.losses.LabelSmoothing"}}},
        {"class_path": "LBGAT", "init_args": {"teacher": {"class_path": "wideberth.models.MLP"}}},
    ],
    "regularizers+": [
        {"class_path": "EffectiveMargin", "init_args": {"weight": {"class_path": "Ramp", "init_args": {"value": 1}}}},
        [{"class_path": "EffectiveMargin", "init_args": {"weight": "1/128"}}],
    ],
    "optimizer": [
        describe(inspect.signature(wb.train).parameters["optimizer"].default),
        "torch.optim.Adam",
        "Adam",
        {"class_path": "torch.optim.sgd.SGD", "init_args": {"lr": 0.1}},
    ],
    "scheduler": [
        {"class_path": "torch.optim.lr_scheduler.MultiStepLR", "init_args": {"milestones": [3], "gamma": 0.1}},
        {
            "class_path": "torch.optim.lr_scheduler.LambdaLR",
            "init_args": {"lr_lambda": {"class_path": "wideberth.training.schedules.Levels"}},
        },
    ],
    "trainer": [{"precision": "bf16-mixed", "devices": 2, "strategy": "ddp", "default_root_dir": "a/b.c"}],
    "out": ["os.system", "runs/a.b"],
}
WRONG: dict[str, list[Any]] = {
    "model": [
        "os.system",
        "evil",
        "evil/model.yaml",
        {"class_path": "wideberth.training.train.train"},
        {"class_path": "wideberth.cli.main"},
        {"class_path": "wideberth.models.build"},
        {"class_path": "wideberth.models.heads.import_object"},
        {"class_path": "wideberth.trust.sys.exit"},
        {"class_path": "wideberth.models.MLP.__init__.__globals__"},
        {"class_path": "torch.nn.init.torch.hub.load"},
        {"class_path": "torch.nn.functional.relu"},
        {"class_path": "torchvision.models.resnet18"},
        {"class_path": "torchvision.datasets.utils.download_url"},
        {"class_path": "torch.utils.cpp_extension.load"},
        {"class_path": "torch.serialization.load"},
        {"class_path": "timm.create_model", "init_args": {"model_name": "m", "checkpoint_path": "bomb.pt"}},
        {"class_path": "wideberth_evil.Net"},
        {"class_path": "torch.nnevil.Net"},
        {"class_path": "wideberth.models.Torchvision", "init_args": {"options": {"norm_layer": "evil.Norm"}}},
        {"class_path": "wideberth.models.MLP", "init_args": {"head": {"class_path": "wideberth.models.load_model"}}},
        {"class_path": "wideberth.models.MLP", "__path__": "evil.yaml"},
        {"class_path": ["evil.Net"], "init_args": {"x": {"class_path": "evil.Net"}}},
    ],
    "data": [
        {"class_path": "wideberth.models.MLP"},
        {"class_path": "wideberth.data.HuggingFace", "init_args": {"path": "uoft-cs/cifar10"}},
        {"class_path": "HuggingFace", "init_args": {"path": "uoft-cs/cifar10"}},
        {"class_path": "torchvision.datasets.CIFAR10"},
    ],
    "attack": [
        {"class_path": "PGD", "init_args": {"loss": "wideberth.models.load_weights"}},
        {"class_path": "PGD", "init_args": {"loss": "os.system"}},
        {"init_args": {"other": {"class_path": "wideberth.data.HuggingFace"}}},
    ],
    "optimizer": [
        "wideberth.models.build",
        "torch.nn.functional.importlib.import_module",
        {"class_path": "wideberth.training.policies.sgd", "init_args": {}},
        {
            "class_path": "torch.distributed.optim.ZeroRedundancyOptimizer",
            "init_args": {"optimizer_class": "evil.Make"},
        },
    ],
    "trainer": [{"callbacks": [{"class_path": "lightning.pytorch.callbacks.Timer"}]}, {"logger": "evil.Logger"}],
    "no_such_option": ["evil.fn", {"class_path": "wideberth.models.MLP", "init_args": {"head": "evil.fn"}}],
}


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that the import system was asked for."""
    asked: list[str] = []

    class Watch:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            asked.append(name)

    monkeypatch.setattr(sys, "meta_path", [Watch(), *sys.meta_path])
    return asked


@pytest.mark.parametrize(("entry", "value"), [(entry, value) for entry in TAKEN for value in TAKEN[entry]])
def test_what_is_ours_and_belongs_there(entry: str, value: Any) -> None:
    check_configuration({entry: value}, HINTS, "a.yaml")


@pytest.mark.parametrize(("entry", "value"), [(entry, value) for entry in WRONG for value in WRONG[entry]])
def test_what_is_not_ours_or_does_not_belong_there(entry: str, value: Any, imported: list[str]) -> None:
    if value == "evil":
        type("evil", (nn.Module,), {"__module__": "elsewhere"})  # known to the parser by its bare name
    with pytest.raises(NotTrusted, match=rf"^a\.yaml: {entry}.*--trust") as refusal:
        check_configuration({entry: value}, HINTS, "a.yaml")
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300
    tops = {name.partition(".")[0] for name in imported}
    assert not tops & {"evil", "wideberth_evil", "lightning", "timm", "os"}


def test_arguments_of_a_name_are_checked_by_position_too() -> None:
    for word in ("wideberth.models.MLP((8,), 2, (), 'evil.fn')", "torch.nn.Sequential(['evil.fn'])"):
        with pytest.raises(NotTrusted, match=r"evil\.fn"):
            check({"class_path": "MLP", "init_args": {"activation": word}}, nn.Module, "a.yaml", "model")


def test_what_this_library_writes_may_be_read_back() -> None:
    for value, hint in (
        (wb.models.MLP((4,), activation=nn.GELU, head="cosine"), nn.Module),
        (wb.models.ConvNet((1, 8, 8), activation="torch.nn.Softplus(beta=3)"), nn.Module),
        (wb.data.Digits(validation=10), wb.data.Data),
        (wb.attacks.PGD(loss=wb.losses.margin_loss), wb.attacks.Attack),
        (wb.radii.Fixed(wb.schedules.Ramp(0.1, 3)), wb.radii.Radius),
        (wb.objectives.AdversarialCrossEntropy(wb.losses.LabelSmoothing(0.2)), wb.objectives.Objective),
        (wb.regularizers.EffectiveMargin(wb.schedules.Steps(0.1, [3])), wb.regularizers.Regularizer),
    ):
        check(describe(value), hint, "a.yaml")


def test_what_is_allowed_but_not_there() -> None:
    for path, says in (
        ("torch.nn.Lineal", "there is no 'Lineal' in torch.nn"),
        ("torch.nn.none.Thing", "there is no 'none' in torch.nn"),
    ):
        with pytest.raises(wb.InputError, match=rf"a\.yaml: model: '{path}': {says}") as refusal:
            check({"class_path": path}, nn.Module, "a.yaml", "model")
        assert not isinstance(refusal.value, NotTrusted)


def test_a_library_that_is_not_installed_is_not_looked_for_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm/__init__.py").write_text("raise SystemExit('evil')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    monkeypatch.setattr(sys, "meta_path", [NoTimm(), *sys.meta_path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(wb.InputError, match=r"cannot be imported: ModuleNotFoundError: No module named 'timm'"):
        check({"class_path": "timm.models.ResNet"}, nn.Module, "a.yaml", "model")
    assert str(tmp_path) not in sys.path


class NoTimm:
    """An import system that finds timm in the current directory alone, if that is on the path."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "timm" and str(Path.cwd()) not in sys.path:
            raise ModuleNotFoundError("No module named 'timm'", name="timm")


def test_size_depth_and_rings_end_in_a_line() -> None:
    ring: list[Any] = []
    ring.append(ring)
    bomb: list[Any] = ["a"] * 10
    for _ in range(8):
        bomb = [bomb] * 10
    deep: Any = "evil.fn"
    for _ in range(5000):
        deep = [deep]
    for value, says in ((ring, "too deeply"), (bomb, str(LARGEST)), (deep, "too deeply"), ("[" * 5000, "too deeply")):
        with pytest.raises(wb.InputError, match=says):
            check_configuration({"trainer": value}, HINTS, "a.yaml")
