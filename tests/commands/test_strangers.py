"""Whoever only looks at the files of a stranger runs none of the stranger's code, however it is named there."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from wideberth import InputError
from wideberth.data import CIFAR10, MNIST
from wideberth.models import MLP, save_weights
from wideberth.recipes import find_recipe

MARK = "code-has-run"
COMMAND = f"touch {MARK}"
SHELL = {"class_path": "os.system", "init_args": {"command": COMMAND}}
EVIL = f"""
from pathlib import Path
Path({str(MARK)!r}).touch()
from torch import nn
class Net(nn.Linear): pass
def loss(logits, y): return logits.sum(1)
def make(*given): return nn.Linear(2, 2)
"""
WORD = f"os.system({COMMAND!r})"
SPECS: dict[str, Any] = {
    "os.system": SHELL,
    "subprocess.Popen": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", MARK]}},
    "by way of torch": {**SHELL, "class_path": "torch:os.system"},
    "by way of torch, dotted": {**SHELL, "class_path": "torch.os.system"},
    "by way of torch.nn": {**SHELL, "class_path": "torch.nn.functional:importlib.sys.modules"},
    "by way of this library": {**SHELL, "class_path": "wideberth.configuration:importlib.import_module"},
    "a module beside": {"class_path": "evil.Net", "init_args": {"in_features": 64, "out_features": 10}},
    "a module beside, by a colon": {"class_path": "evil:make"},
    "unpickling": {"class_path": "torch.load", "init_args": {"f": "bomb.pt", "weights_only": False}},
    "torch.hub": {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": ".", "model": "m", "source": "local"}},
    "a function of this library that loads": {
        "class_path": "wideberth.models.load_model",
        "init_args": {"spec": f"os:system({COMMAND!r})"},
    },
    "a function that downloads": {"class_path": "torchvision.models.resnet18", "init_args": {"weights": "DEFAULT"}},
    "functools.partial": {"class_path": "functools.partial", "init_args": {"func": "os.system"}},
    "a private name": {"class_path": "torch.nn.modules.module._global_forward_hooks"},
    "a dunder name": {"class_path": "torch.nn.Linear.__subclasses__"},
    "another kind of class": {"class_path": "wideberth.attacks.PGD"},
}
INSIDE: dict[str, Any] = {
    "an argument": {"head": SHELL},
    "a word with arguments": {"activation": WORD},
    "a name with a colon": {"activation": f"evil.x:system({COMMAND!r})"},
    "a module beside": {"activation": "evil.make"},
    "a word within a word": {"activation": f"wideberth.models.MLP(activation={WORD!r})"},
    "YAML in a word": {"activation": yaml.safe_dump(SHELL)},
    "a list": {"hidden": [SHELL]},
    "deep down": {"head": {"class_path": "wideberth.models.MLP", "init_args": {"activation": SHELL}}},
    "an option of torchvision": {"mean": {"norm_layer": SHELL}},
}


def run_of(folder: Path, like: Path, **entries: Any) -> Path:
    """A finished, evaluated run with these entries in its configuration, and a module beside it."""
    shutil.copytree(like, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, **entries}))
    for place in (folder, Path()):
        (place / "evil.py").write_text(EVIL)
    return folder


@pytest.fixture(autouse=True)
def _no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the current directory are forgotten after a test; as for the program, it is not on the path."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    monkeypatch.delitem(sys.modules, "evil", raising=False)


def asks_for_trust(answer: tuple[int, str, str], *named: str) -> None:
    """Nothing ran, and one line says what was named and what would let it run."""
    code, out, err = answer
    assert not Path(MARK).exists(), "code ran"
    assert "evil" not in sys.modules
    assert str(Path.cwd()) not in sys.path
    assert (code, out) == (2, ""), err
    (line,) = err.strip().splitlines()
    assert "--trust" in line
    assert len(line) < 420
    assert [word for word in named if word not in line] == []


@pytest.mark.parametrize("command", ["evaluate", "margins"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_model_or_data_set_that_a_run_names(
    spec: dict[str, Any], command: str, digits_run: Path, wideberth, tmp_path: Path
) -> None:
    for entry in ("model", "data"):
        run = run_of(tmp_path / entry, digits_run, **{entry: spec})
        asks_for_trust(wideberth(command, run), f"{run.name}/config.yaml", f"{entry} names", spec["class_path"])


@pytest.mark.parametrize("arguments", INSIDE.values(), ids=INSIDE.keys())
@pytest.mark.parametrize("part", ["init_args", "dict_kwargs"])
def test_what_stands_among_the_arguments_of_a_model(
    arguments: dict[str, Any], part: str, digits_run: Path, wideberth, tmp_path: Path
) -> None:
    spec = {"class_path": "wideberth.models.MLP", part: arguments}
    asks_for_trust(wideberth("evaluate", run_of(tmp_path / "run", digits_run, model=spec)), "model.")
    if part == "init_args":
        asks_for_trust(wideberth("evaluate", tmp_path / "run/model.safetensors", "--data", "Digits"), "config.yaml")


@pytest.mark.parametrize(
    "data",
    [
        {"class_path": "wideberth.data.FromDatasets", "init_args": {"train": SHELL, "test": SHELL, "classes": 2}},
        {
            "class_path": "wideberth.data.FromDatasets",
            "init_args": {"train": {"class_path": "torchvision.datasets.LSUN", "init_args": {"root": "."}}},
        },
        {"class_path": "wideberth.data.HuggingFace", "init_args": {"path": "pandas", "options": {"data_files": "x"}}},
    ],
)
def test_what_stands_among_the_arguments_of_a_data_set(
    data: dict[str, Any], digits_run: Path, wideberth, tmp_path: Path
) -> None:
    asks_for_trust(wideberth("evaluate", run_of(tmp_path / "run", digits_run, data=data)), "data")


@pytest.mark.parametrize("given", ["file", "words", "run"])
@pytest.mark.parametrize("spec", [SHELL, {"class_path": "MLP", "init_args": {"head": SHELL}}], ids=["spec", "inside"])
def test_an_architecture_that_came_with_a_file_of_weights(given: str, spec: dict[str, Any], wideberth) -> None:
    save_weights(MLP((8,)), "alone.safetensors")
    Path("a.yaml").write_text(yaml.safe_dump({"model": spec} if given == "run" else spec))
    words = str(spec) if given == "words" else "a.yaml"
    for command in ("evaluate", "margins"):
        answer = wideberth(command, "alone.safetensors", "--data", "Digits", "--architecture", words)
        asks_for_trust(answer, "os.system")


def test_an_architecture_from_a_file_is_used(wideberth) -> None:
    save_weights(MLP((1, 8, 8), 10, (5,)), "alone.safetensors")
    Path("a.yaml").write_text("{class_path: MLP, init_args: {shape: [1, 8, 8], hidden: [5]}}")
    words = ("margins", "alone.safetensors", "--data", "Digits", "--rows", "8", "--out", "m.csv", "--architecture")
    assert wideberth(*words, "a.yaml")[0] == 0
    assert wideberth(*words, Path("a.yaml").read_text())[0] == 0
    for bad in ("nope.yaml", "{class_path: [", "[class_path]", "x" * 5000):
        code, _, err = wideberth(*words, bad)
        assert (code, len(err.strip().splitlines())) == (2, 1), err


ENTRIES: dict[str, Any] = {
    "optimizer": {"optimizer": SHELL},
    "optimizer that Popen makes": {"optimizer": SPECS["subprocess.Popen"]},
    "optimizer of a module beside": {"optimizer": "evil.make"},
    "optimizer in YAML": {"optimizer": yaml.safe_dump(SHELL)},
    "model": {"model": SHELL},
    "model of a module beside": {"model": SPECS["a module beside"]},
    "class by a word": {"model": "evil.Net"},
    "loss of the attack": {"attack": {"class_path": "wideberth.attacks.PGD", "init_args": {"loss": "evil.loss"}}},
    "arguments without a class": {"attack": {"init_args": {"loss": "evil.loss"}}},
    "arguments alone": {"attack": {"loss": "evil.loss"}},
    "one of a list": {"regularizers": [SHELL]},
    "one more of a list": {"regularizers+": SHELL},
    "schedule": {"scheduler": {"class_path": "LambdaLR", "init_args": {"lr_lambda": SHELL}}},
    "Lightning's options": {"trainer": {"callbacks": [SHELL]}},
    "Lightning's options, deep": {"trainer": {"a": {"b": [[SHELL]]}}},
    "dotted key": {"optimizer.class_path": "os.system", "optimizer.init_args.command": COMMAND},
    "dotted key inside": {"model": {"class_path": "wideberth.models.MLP", "init_args.activation": WORD}},
    "another file": {"config": "other.yaml"},
    "another file, without an ending": {"config": "other"},
    "YAML as another file": {"config": yaml.safe_dump({"optimizer": SHELL})},
    "file where a class belongs": {"augment": "./other"},
    "an unknown entry": {"nope": SHELL},
}


@pytest.mark.parametrize("entries", ENTRIES.values(), ids=ENTRIES.keys())
def test_a_configuration_to_train_by(entries: dict[str, Any], wideberth) -> None:
    for other in ("other.yaml", "other"):
        Path(other).write_text(yaml.safe_dump({"optimizer": SHELL}))
    Path("evil.py").write_text(EVIL)
    Path("sent.yaml").write_text(
        yaml.safe_dump({**yaml.safe_load(find_recipe("digits/pgd-at").read_text()), **entries})
    )
    for words in (
        ("--config", "sent.yaml"),
        ("--config=sent.yaml",),
        ("--config", "digits/iaat", "--config=sent.yaml"),
    ):
        asks_for_trust(wideberth("train", *words, "--out", "new", "--progress=false"))
        asks_for_trust(wideberth("train", *words, "--print_config"))
    assert not Path("new").exists()


def test_report_and_compare_build_nothing_and_verify_what_it_needs(digits_run: Path, wideberth, tmp_path: Path) -> None:
    words = ("--rows", 20, "--progress=false", "--suite=pgd", "--overwrite")
    assert wideberth("evaluate", digits_run, *words)[0] == 0
    run = run_of(tmp_path / "run", digits_run, model=SHELL, data=SPECS["a module beside"], optimizer=SHELL)
    for command in ("report", "compare"):
        code, _, err = wideberth(command, run)
        assert code == 0, err
        assert not Path(MARK).exists()
        assert "evil" not in sys.modules
        assert str(Path.cwd()) not in sys.path, "libraries would find the modules of a stranger's folder"
    for entries in ({"model": SHELL}, {"data": SPECS["a module beside"]}):
        shutil.rmtree(run)
        asks_for_trust(wideberth("verify", run_of(run, digits_run, **entries)), "config.yaml")
    shutil.rmtree(run)
    code, _, err = wideberth("verify", run_of(run, digits_run, optimizer=SHELL))
    assert code == 0, err  # which needs model and data alone


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.check_call, (["touch", MARK],)


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        (
            CIFAR10,
            [f"cifar-10-batches-py/{name}" for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6)))],
        ),
        (MNIST, [f"MNIST/{name}" for name in ("processed/training.pt", "processed/test.pt")] + list(MNIST._files)),
    ],
)
def test_data_sets_do_not_unpickle_what_lies_in_their_folder(
    kind: type, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in files:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(InputError, match="cannot read"):
        kind(str(tmp_path), download=False).test()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(files[0], weights_only=True)
    assert not Path(MARK).exists()
    with open(files[0], "rb") as file:  # noqa: PTH123
        pickle.load(file)
    assert Path(MARK).exists(), "the bomb is a dud"


OWN = """
from wideberth.models import MLP
class Net(MLP):
    '''A class of one's own.'''
"""


def test_a_model_of_ones_own_is_trained_by_name_and_looked_at_with_trust(wideberth) -> None:
    Path("my_own_nets.py").write_text(OWN)
    words = ("--config", "digits/standard", "--model", "my_own_nets.Net", "--model.shape=[1,8,8]", "--progress=false")
    code, _, err = wideberth("train", *words, "--epochs=1", "--data.train_rows=64", "--out", "own")
    assert code == 0, err
    for command in (
        ("evaluate", "own", "--suite=pgd"),
        ("margins", "own"),
        ("train", "--config=own/config.yaml", "--resume"),
    ):
        more = ("--epochs=2", "--progress=false") if command[0] == "train" else ("--rows=8",)
        sys.path[:] = [entry for entry in sys.path if entry != str(Path.cwd())]
        sys.modules.pop("my_own_nets", None)
        asks_for_trust(wideberth(*command, *more), "own/config.yaml", "model", "'my_own_nets.Net'")
        assert "my_own_nets" not in sys.modules
        code, _, err = wideberth(*command, *more, "--trust")
        assert code == 0, err
    recorded = yaml.safe_load(Path("own/config.yaml").read_text())
    assert (recorded["epochs"], "trust" in recorded) == (2, False)
    sys.modules.pop("my_own_nets", None)
    # What is typed is never questioned.
    typed = ("my_own_nets:Net((1,8,8))", "--weights", "own/model.safetensors", "--data", "Digits", "--rows=8")
    assert wideberth("evaluate", *typed, "--suite=pgd")[0] == 0
