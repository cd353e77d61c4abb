"""Weights to files and back, models from configurations and from words; each form and each mistake."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from safetensors.torch import save_file
from torch import Tensor, nn

from wideberth.checks import InputError
from wideberth.configuration import describe
from wideberth.models import (
    MLP,
    ConvNet,
    MadryMNIST,
    Normalize,
    PreActResNet18,
    SmallCNN,
    Timm,
    Torchvision,
    WideResNet,
    build,
    load_model,
    load_weights,
    save_weights,
)
from wideberth.models.libraries import IMAGENET_MEAN, LibraryModel
from wideberth.trust import NotTrusted

TINY: dict[str, Any] = {
    "class_path": "wideberth.models.ConvNet",
    "init_args": {"shape": [3, 8, 8], "width": 4, "depth": 1, "batch_norm": True},
}
X = torch.rand(2, 3, 8, 8)


class Tied(nn.Module):
    """Two names for one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(self.first(x))
        return logits


class Wrapped(nn.Module):
    """A model that holds another."""

    def __init__(self, inner: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.scale * self.inner(x)
        return logits


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def trained() -> nn.Module:
    """A tiny net whose weights and running statistics are not those of a fresh one."""
    model = build(TINY)
    model(X)
    return model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    save_weights(trained(), folder / "model.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0, "model": TINY}))
    return folder


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: MLP((4,), hidden=(3,), batch_norm=True),
        lambda: ConvNet((3, 8, 8), width=4, mean=(0.5,) * 3, std=(0.2,) * 3),
        lambda: PreActResNet18((3, 8, 8), width=2).to(memory_format=torch.channels_last),
        lambda: WideResNet(10, 1).to(torch.bfloat16),
        lambda: ConvNet((3, 8, 8), width=4, activation="smooth_relu", head="mahalanobis"),
        Tied,
    ],
)
def test_weights_make_the_round_trip(make: Any, tmp_path: Path) -> None:
    saved, loaded = make(), make()
    if isinstance(saved, ConvNet) and isinstance(saved.normalize, Normalize):
        saved.normalize.mean.fill_(0.25)
    assert not same(saved, loaded)
    save_weights(saved, tmp_path / "deep" / "model.safetensors")
    load_weights(loaded, tmp_path / "deep" / "model.safetensors")
    assert same(saved, loaded)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "model.module."])
@pytest.mark.parametrize("entry", [None, "state_dict", "model"])
def test_checkpoints_of_other_scripts_load(prefix: str, entry: str | None, tmp_path: Path) -> None:
    model = trained()
    state = OrderedDict((prefix + key, value) for key, value in model.state_dict().items())
    torch.save(state if entry is None else {entry: state, "epoch": 3}, tmp_path / "a.pt")
    fresh = build(TINY)
    load_weights(fresh, tmp_path / "a.pt")
    assert same(fresh, model)


def test_what_a_training_module_holds_beside_the_model_is_dropped(tmp_path: Path) -> None:
    model = trained()
    state = {f"model.{key}": value for key, value in model.state_dict().items()} | {"radii": torch.zeros(5)}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    fresh = build(TINY)
    load_weights(fresh, tmp_path / "last.ckpt")
    assert same(fresh, model)


def test_a_library_network_takes_its_librarys_own_file(tmp_path: Path) -> None:
    model, fresh = Torchvision("squeezenet1_1", 4), Torchvision("squeezenet1_1", 4)
    torch.save(model.net.state_dict(), tmp_path / "own.pth")
    load_weights(fresh, tmp_path / "own.pth")
    assert same(model, fresh)
    save_weights(model, tmp_path / "ours.safetensors")
    ours = load_model("torchvision/squeezenet1_1", classes=4, weights=str(tmp_path / "ours.safetensors"))
    assert same(ours, model)


def test_weights_that_do_not_fit_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    model = build(TINY)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    state["head.weight"] = torch.zeros(7, 4)
    del state["head.bias"]
    state |= {f"extra{n}": torch.zeros(1) for n in range(5)}
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(InputError) as refusal:
        load_weights(model, tmp_path / "bad.safetensors")
    message = str(refusal.value)
    assert "do not fit ConvNet" in message
    assert "missing head.bias" in message
    assert "unexpected extra0, extra1, extra2 and 2 more" in message
    assert "mis-shaped head.weight (7, 4) for (10, 4)" in message
    assert "\n" not in message
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_another_normalisation_does_not_load_silently(tmp_path: Path) -> None:
    save_weights(ConvNet((3, 8, 8), width=4, mean=(0.5,) * 3, std=(0.2,) * 3), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"unexpected normalize\.mean"):
        load_weights(ConvNet((3, 8, 8), width=4), tmp_path / "a.safetensors")


class Payload:
    """An object, which a file of weights has no business to hold."""


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    model = build(TINY)
    (tmp_path / "broken.safetensors").write_bytes(b"not tensors")
    (tmp_path / "broken.pth").write_bytes(b"not tensors")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save({"model": Payload()}, tmp_path / "object.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    (tmp_path / "weights.npy").write_bytes(b"x")
    for name, says in {
        "broken.safetensors": "cannot be read",
        "broken.pth": "holds more than tensors|cannot be read",
        "empty.ckpt": "cannot be read",
        "object.pt": "unpickling objects could run any code",
        "none.pt": "no named tensors",
        "list.pt": "no named tensors",
        "weights.npy": r"must be \.safetensors",
        "absent.pt": "no such file",
    }.items():
        with pytest.raises(InputError, match=says) as refusal:
            load_weights(model, tmp_path / name)
        assert "\n" not in str(refusal.value)


# --- configurations ----------------------------------------------------------------------------------------------


def test_build_finds_bare_names_paths_and_nested_models(monkeypatch: pytest.MonkeyPatch) -> None:
    users: Any = ModuleType("users")
    users.Wrapped = Wrapped
    monkeypatch.setitem(sys.modules, "users", users)
    assert isinstance(build({"class_path": "MLP"}), MLP)
    assert isinstance(build({"class_path": "WideResNet", "init_args": {"depth": 10, "factor": 1}}), WideResNet)
    sequence = build({"class_path": "torch.nn.Linear", "init_args": {"in_features": 3, "out_features": 2}})
    assert isinstance(sequence, nn.Linear)
    nested = build({"class_path": "users.Wrapped", "init_args": {"inner": TINY, "scale": 2.0}}, trust=True)
    assert isinstance(nested, Wrapped)
    assert isinstance(nested.inner, ConvNet)


@pytest.mark.parametrize(
    ("class_path", "arguments"),
    [
        ("MLP", {"shape": [1, 8, 8], "hidden": [5, 4], "activation": "silu"}),
        ("ConvNet", {"shape": [3, 8, 8], "width": 4, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}),
        ("PreActResNet18", {"shape": [1, 8, 8], "width": 2, "activation": "torch.nn.Softplus(beta=10)"}),
        ("WideResNet", {"depth": 10, "factor": 1, "classes": 3}),
        ("Torchvision", {"name": "squeezenet1_1", "classes": 3}),
        ("MLP", {"shape": [8], "head": "cosine", "hidden": [4]}),
        ("ConvNet", {"shape": [3, 8, 8], "width": 4, "head": "wideberth.models.CosineHead(scale=10)"}),
        ("PreActResNet18", {"shape": [1, 8, 8], "width": 2, "head": "mahalanobis(radius=5)"}),
        ("MLP", {"head": {"class_path": "wideberth.models.CosineHead", "init_args": {"scale": 3}}}),
        ("MLP", {"activation": {"class_path": "torch.nn.Softplus", "init_args": {"beta": 3}}}),
        ("WideResNet", {"depth": 10, "factor": 1, "shortcut": "pool", "activation": "leaky_relu"}),
        ("IAATWideResNet", {"depth": 8, "factor": 1, "shape": [3, 8, 8]}),
        ("MadryMNIST", {"shape": [1, 8, 8], "width": 2, "hidden": 12, "head": "cosine"}),
        ("SmallCNN", {"shape": [1, 16, 16], "width": 2, "hidden": 12, "dropout": 0.1}),
        ("Torchvision", {"name": "resnet18", "classes": 3, "small_images": True, "channels": 1, "head": "cosine"}),
    ],
)
def test_the_command_line_builds_what_its_written_configuration_rebuilds(
    class_path: str, arguments: dict[str, Any]
) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=nn.Module)
    spec = {"class_path": f"wideberth.models.{class_path}", "init_args": arguments}
    written = yaml.safe_load(parser.dump(parser.parse_object({"model": spec})))["model"]
    torch.manual_seed(0)
    direct = build(spec)
    torch.manual_seed(0)
    assert same(direct, build(written))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({}, "must be {'class_path'"),
        ({"class_path": 3}, "must be {'class_path'"),
        ({"class_path": "MLP", "args": {}}, "must be {'class_path'"),
        ({"class_path": "MLP", "init_args": [3]}, "must be a mapping"),
        ({"class_path": "ResNet"}, "wideberth.models has MLP, ConvNet"),
        ({"class_path": "load_model"}, "wideberth.models has MLP, ConvNet"),
        ({"class_path": "no.such.Thing"}, "No module named 'no'"),
        ({"class_path": "torch.nn.Lineal"}, "no 'Lineal' in"),
        ({"class_path": "MLP", "init_args": {"widths": 3}}, "unexpected keyword argument 'widths'.*hidden"),
        ({"class_path": "torch.nn.Linear"}, "missing a required argument: 'in_features'"),
        ({"class_path": "MLP", "init_args": {"shape": "wide"}}, "cannot be built"),
        ({"class_path": "MLP", "init_args": {"classes": 1}}, "classes=1"),
        ({"class_path": "pathlib.Path"}, "must give an nn.Module"),
        ({"class_path": "math.pi"}, "must be a class or a function"),
    ],
)
def test_build_refuses(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as refusal:
        build(spec, trust=True)
    assert "\n" not in str(refusal.value)


def test_what_a_file_names_is_built_only_if_it_is_trusted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "not_ours.py").write_text("from wideberth.models import ConvNet as Base\nclass Net(Base): pass\n")
    own = TINY | {"class_path": "not_ours.Net"}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": own}))
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / "model.safetensors").read_bytes())
    ways: list[tuple[Callable[..., nn.Module], str]] = [
        (partial(build, own), "model: model names"),
        (partial(load_model, str(run)), rf"^{run}/config\.yaml: model names"),
        (partial(load_model, str(run / "model.safetensors")), rf"^{run}/config\.yaml: model names"),
        (partial(load_model, str(alone), architecture=own), "^architecture: model names"),
    ]
    for way, where in ways:
        with pytest.raises(NotTrusted, match=rf"{where} 'not_ours\.Net', .*--trust \(in Python trust=True\)"):
            way()
        assert "not_ours" not in sys.modules
    for way, _ in ways:
        assert type(way(trust=True)).__name__ == "Net"
    sys.modules.pop("not_ours")
    assert type(load_model("not_ours:Net((3, 8, 8))")).__name__ == "Net"  # what is typed is not questioned


# --- words -------------------------------------------------------------------------------------------------------


def test_a_run_directory_loads(run: Path) -> None:
    model = load_model(str(run))
    assert not model.training
    assert torch.equal(model(X), model(X))
    fresh = build(TINY)
    load_weights(fresh, run / "model.safetensors")
    assert same(model, fresh)


class Doubled(nn.Linear):
    """A head of one's own."""

    def __init__(self, features: int, classes: int, factor: float = 2.0) -> None:
        super().__init__(features, classes)
        self.factor = factor

    def forward(self, input: Tensor) -> Tensor:
        return self.factor * super().forward(input)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConvNet((3, 8, 8), width=4, depth=1, head="wideberth.models.CosineHead(scale=10)"),
        lambda: PreActResNet18((3, 8, 8), width=4, head="mahalanobis"),
        lambda: WideResNet(10, 1, head=Doubled, activation="smooth_relu"),
        lambda: SmallCNN((1, 16, 16), width=2, head=f"{__name__}.Doubled(factor=3)"),
        lambda: MadryMNIST((1, 8, 8), width=2, hidden=12, head=f"{__name__}:Doubled"),
        lambda: MLP((4,), activation=nn.GELU, head=partial(Doubled, factor=3)),
        lambda: MLP((4,), activation=partial(nn.Softplus, beta=10)),
    ],
)
def test_a_run_rebuilds_a_model_made_in_python_with_its_head(make: Any, tmp_path: Path) -> None:
    model = make().eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    save_weights(model, tmp_path / "model.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": describe(model)}))
    rebuilt = load_model(str(tmp_path), trust="Doubled" in str(describe(model)))
    assert same(model, rebuilt)
    x = torch.rand(2, *model.given_args[0]) if type(model) is not WideResNet else torch.rand(2, 3, 32, 32)
    assert torch.equal(model(x), rebuilt(x))


def test_a_run_directory_loads_other_weights(run: Path) -> None:
    other = trained()
    (run / "checkpoints").mkdir()
    state = {f"model.{key}": value for key, value in other.state_dict().items()}
    torch.save({"state_dict": state}, run / "checkpoints" / "best.ckpt")
    assert same(load_model(str(run), weights=str(run / "checkpoints" / "best.ckpt")), other)
    assert same(load_model(str(run / "checkpoints" / "best.ckpt")), other)


def test_a_file_of_weights_loads(run: Path, tmp_path: Path) -> None:
    assert same(load_model(str(run / "model.safetensors")), load_model(str(run)))
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / "model.safetensors").read_bytes())
    assert same(load_model(str(alone), architecture=TINY), load_model(str(run)))


def test_library_names_load_with_the_normalisation_they_expect() -> None:
    model = load_model("torchvision/squeezenet1_1", classes=7)
    assert isinstance(model, Torchvision)
    assert not model.training
    assert model.normalize.mean.tolist() == pytest.approx(IMAGENET_MEAN)
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 7)


def test_timm_is_asked_for_a_model_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def create_model(name: str, pretrained: bool, **options: Any) -> nn.Module:
        asked.update(name=name, pretrained=pretrained, **options)
        net = MLP((3, 8, 8), options["num_classes"], hidden=())
        net.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (1, 1, 1)}  # type: ignore[assignment]
        return net

    timm: Any = ModuleType("timm")
    timm.create_model, timm.is_model, timm.list_models = create_model, "tiny".__eq__, lambda: ["tiny"]
    monkeypatch.setitem(sys.modules, "timm", timm)
    model = load_model("timm/tiny", classes=5)
    assert asked == {"name": "tiny", "pretrained": False, "num_classes": 5}
    assert isinstance(model, LibraryModel)
    assert model.normalize.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model(X).shape == (2, 5)
    with pytest.raises(InputError, match="timm/tony: timm has no such classification model; close are tiny"):
        load_model("timm/tony")
    asked.clear()
    for option in ("checkpoint_path", "pretrained", "weights"):
        with pytest.raises(InputError, match=f"options: {option}: weights are loaded afterwards"):
            Timm("tiny", options={option: "weights.pth"})
    assert not asked


@pytest.mark.parametrize(
    "spec",
    [
        "my_nets:tiny(width=4, depth=1)",
        "my_nets.tiny(4, depth=1)",
        " my_nets:tiny ( width=4, depth=1, ) ",
        "my_nets:Family.member(4)",
        "ConvNet(shape=(3, 8, 8), width=4, depth=1)",
        "wideberth.models.ConvNet((3, 8, 8), 10, 4, 1)",
    ],
)
def test_import_paths_load_also_from_the_current_directory(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from wideberth.models import ConvNet\n"
        "def tiny(width=4, depth=1):\n    return ConvNet((3, 8, 8), width=width, depth=depth)\n"
        "class Family:\n    member = staticmethod(tiny)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    model = load_model(spec)
    assert isinstance(model, ConvNet)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == 3 * 4 * 9 + 4 + 4 * 4 * 9 + 4 + 4 * 10 + 10
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)


def test_a_factory_takes_weights(tmp_path: Path) -> None:
    model = trained()
    save_weights(model, tmp_path / "w.safetensors")
    spec = "ConvNet((3, 8, 8), width=4, depth=1, batch_norm=True)"
    assert same(load_model(spec, weights=str(tmp_path / "w.safetensors")), model)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nothing_here", "no model"),
        ("runs/nothing_here", "no such directory or file"),
        ("nothing.safetensors", "no such file"),
        ("torchvision/resnet81", "close are"),
        ("torchvision/", "no such classification model"),
        ("no_such_module:factory", "No module named"),
        ("torch.nn:NoSuch", "no 'NoSuch'"),
        ("torch.nn.Linear(3)", "missing a required argument"),
        ("torch.nn.Linear(3, 4, 5, 6, 7, 8)", "too many positional"),
        ("torch.nn.Linear(3, os.getcwd())", "must be Python literals"),
        ("torch.nn.Linear(3, __import__('os').getpid())", "must be Python literals"),
        ("torch.nn.Linear(3, 4)(5)", "must be Python literals"),
        ("torch.nn.Linear(3, 4) + 1", "must be Python literals"),
        ("torch.nn.Linear(*[3, 4])", "must be Python literals"),
        ("torch.nn.Linear(**{'in_features': 3})", "must be Python literals"),
        ("torch.nn.Linear(3, 4", "must be Python literals"),
        ("torch.nn.Linear(3, out_features=4, out_features=5)", "must be Python literals"),
        ("math.gcd(4, 6)", "must give an nn.Module, gave int"),
        ("what is this?", "must be an import path"),
        ("", "config.yaml"),
    ],
)
def test_a_word_that_names_no_model_is_refused_with_the_forms_that_do(
    spec: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says) as refusal:
        load_model(spec)
    message = str(refusal.value)
    assert message.startswith(f"model {spec!r}")
    assert "accepted are a run directory, a .safetensors file, timm/NAME" in message
    assert "\n" not in message


def test_timm_is_named_when_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="not installed; pip install"):
        load_model("timm/resnet18")


def test_broken_user_modules_are_blamed_and_not_searched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "faulty.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(InputError, match="No module named 'not_installed_anywhere'"):
        load_model("needy:net")
    with pytest.raises(InputError, match="ZeroDivisionError"):
        load_model("faulty:net")


def test_incomplete_runs_and_contradictions_are_refused(run: Path, tmp_path: Path) -> None:
    weights = str(run / "model.safetensors")
    with pytest.raises(InputError, match="architecture belongs to a file"):
        load_model(str(run), architecture=TINY)
    with pytest.raises(InputError, match="one too many"):
        load_model(weights, weights=weights)
    lonely = tmp_path / "lonely" / "w.safetensors"
    save_weights(trained(), lonely)
    with pytest.raises(InputError, match="needs an architecture"):
        load_model(str(lonely))
    with pytest.raises(InputError, match=r"holds no config\.yaml"):
        load_model(str(lonely.parent))
    with pytest.raises(InputError, match="do not fit MLP"):
        load_model(weights, architecture={"class_path": "MLP"})
    (run / "model.safetensors").unlink()
    with pytest.raises(InputError, match="not finished"):
        load_model(str(run))
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(InputError, match=r"last checkpoint is .*last\.ckpt"):
        load_model(str(run))
    (run / "config.yaml").write_text("model: 3\n")
    with pytest.raises(InputError, match="holds no model with class_path"):
        load_model(str(run))
