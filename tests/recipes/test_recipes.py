"""Every shipped recipe says what it is, parses, and trains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import wideberth as wb
from wideberth import recipes
from wideberth.checks import InputError
from wideberth.cli import main
from wideberth.commands.recipes import Listing
from wideberth.commands.train import parser, train_from
from wideberth.configuration import import_object
from wideberth.yaml_files import load_yaml

torch.set_num_threads(1)

FILES = sorted(recipes.ROOT.rglob("*.yaml"))
NAMES = [file.relative_to(recipes.ROOT).with_suffix("").as_posix() for file in FILES]
ROWS = {"cifar10": 50_000, "cifar100": 50_000, "mnist": 60_000, "imagenet": 1_281_167, "digits": 1437}


def read(name: str) -> dict[str, Any]:
    """A recipe as it stands in its file."""
    recipe: dict[str, Any] = load_yaml(recipes.find_recipe(name).read_text())
    return recipe


def arguments(part: dict[str, Any] | None) -> dict[str, Any]:
    """What a recipe gives to one of its objects."""
    return (part or {}).get("init_args", {})


def kind(part: dict[str, Any] | None) -> str:
    """The class of one of its objects."""
    return (part or {}).get("class_path", "").rpartition(".")[2]


def steps_an_epoch(recipe: dict[str, Any]) -> int:
    """Batches of an epoch, of the rows that are trained on."""
    data = arguments(recipe["data"])
    rows = data.get("train_rows") or ROWS[recipe["out"].split("/")[1]]
    return ceil((rows - data.get("validation", 0)) / recipe["batch_size"])


def needs(name: str) -> None:
    """Skip a recipe whose network is of a library that is not here."""
    if kind(read(name)["model"]) == "Timm":
        pytest.importorskip("timm")


# ---- what they say ------------------------------------------------------------------------------------------------


def test_all_are_listed() -> None:
    assert len(FILES) > 50
    assert recipes.recipe_names() == sorted(NAMES)
    assert [recipes.find_recipe(name) for name in NAMES] == FILES
    assert not list(recipes.ROOT.rglob("*.yml"))


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(
        InputError, match=r"digits/iat: no such file, and no recipe of that name but such as .*digits/iaat"
    ):
        recipes.find_recipe("digits/iat")


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is(name: str) -> None:
    lines = recipes.find_recipe(name).read_text().splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert all(line.startswith("# ") and len(line) <= 120 for line in comment)
    # First the title, then what was reported, then the rest.
    reported = [line.startswith("# reported: ") for line in comment]
    assert reported[0] is False
    assert reported[1:] == sorted(reported[1:], reverse=True)
    assert any(reported)
    assert not any("[memory]" in line for line in lines)
    about = recipes.about(name)
    assert len(about.title) > 20
    assert len(about.comment) > 20
    for figures in about.reported:
        assert any(value is not None for value in (figures.clean, figures.pgd, figures.autoattack))
        assert all(0 <= value <= 100 for value in (figures.clean, figures.pgd, figures.autoattack) if value is not None)
        assert (figures.pgd is None) == (figures.attack is None)
        assert figures.source
    assert bool(about.reported) != ("# reported: none known" in lines)


@pytest.mark.parametrize("name", NAMES)
def test_what_it_plans_happens_before_the_end(name: str) -> None:
    recipe = read(name)
    assert recipe["out"] == f"runs/{name}"
    end = recipe["epochs"] * (steps_an_epoch(recipe) if recipe.get("scheduler_interval") == "step" else 1)
    schedule = arguments(recipe.get("scheduler"))
    levels = arguments(schedule.get("lr_lambda"))
    assert all(milestone < end for milestone in (*schedule.get("milestones", []), *levels.get("starts", [])))
    if kind(recipe.get("scheduler")) == "CyclicLR":  # one triangle, over exactly the steps there are
        assert schedule["step_size_up"] + schedule["step_size_down"] == end
    if kind(recipe.get("scheduler")) == "CosineAnnealingLR":
        assert schedule["T_max"] == end
    assert arguments(recipe["radius"]).get("warmup", 0) < recipe["epochs"]
    assert arguments(recipe.get("weighting")).get("start", 0) < recipe["epochs"]
    assert arguments(recipe.get("perturbation")).get("warmup", 0) < recipe["epochs"]
    for regularizer in recipe.get("regularizers", []):
        weight = arguments(regularizer)["weight"]
        epochs = arguments(weight)["epochs"] if isinstance(weight, dict) else []
        assert all(epoch < recipe["epochs"] for epoch in (epochs if isinstance(epochs, list) else [epochs]))
    if recipe.get("keep") == "best":
        assert arguments(recipe["data"])["validation"] > 0


def test_figures_are_read_in_one_form_alone() -> None:
    read_reported = recipes.read_reported
    all_three = read_reported("clean 84.92, PGD-20 56.61, AutoAttack 53.08 (TRADES README; board)")
    assert all_three == recipes.Reported(84.92, 56.61, "PGD-20", 53.08, "TRADES README; board")
    assert read_reported("PGD 58 (here)") == recipes.Reported(None, 58, "PGD", None, "here")
    assert read_reported("clean 84 (a (b))").source == "a (b)"
    for line in ("none", "clean 84.92", "84.92 (README)", "clean 84.92 / 53.08 (README)", "clean 84.92, FGSM 3 (x)"):
        with pytest.raises(InputError, match="must be such as"):
            read_reported(line)


def test_figures_and_settings_of_some_by_hand() -> None:
    trades = recipes.about("cifar10/trades")
    assert (trades.network, trades.eps, trades.epochs) == ("WideResNet-34-10", "linf 0.031", 76)
    first = trades.reported[0]
    assert (first.clean, first.pgd, first.attack, first.autoattack) == (84.92, 56.61, "PGD-20", 53.08)
    assert arguments(read("cifar10/trades")["attack"])["step_size"] == 0.007
    assert arguments(read("cifar10/trades")["optimizer"])["weight_decay"] == 2e-4
    best, last, *_ = recipes.about("cifar10/pgd-at").reported
    assert ((best.clean, best.pgd), (last.clean, last.pgd)) == ((82.92, 53.49), (84.93, 45.59))
    assert recipes.about("cifar10/he-pgd").reported[0].autoattack == 53.74
    assert recipes.about("cifar10/mmc-at").reported[0].autoattack == 43.48
    assert recipes.about("cifar10/gairat").reported[0].pgd == 57.81
    assert recipes.about("cifar100/at-awp").reported[0].autoattack == 25.34
    assert recipes.about("mnist/madry").reported[0].autoattack == 88.50
    assert recipes.about("cifar10/mma-linf").eps == "linf to 12/255"
    assert recipes.about("cifar10/standard").eps == "none"
    assert recipes.about("cifar10/mail-at").reported == ()  # the paper's table is not at hand
    emr = arguments(read("cifar10/at-emr")["regularizers"][0])
    assert (emr["temperature"], arguments(emr["weight"])["value"]) == (40, 3 / 128)
    assert arguments(read("cifar10/trades-emr")["objective"])["beta"] == 12
    assert arguments(read("cifar10/mail-at-emr")["weighting"]) == {"slope": 30, "bias": -0.07, "start": 74}
    assert arguments(read("cifar10/mail-at")["weighting"]) == {"slope": 10, "bias": -0.5, "start": 76}
    assert arguments(read("cifar10/fgsm-rs")["attack"])["step_size"] == 10 / 255
    assert arguments(read("cifar10/trades-awp")["perturbation"]) == {"gamma": 0.005, "warmup": 10}


def test_steps_become_epochs() -> None:
    for name, steps in (
        ("cifar10/madry", 80_000),
        ("cifar10/mma-linf", 50_000),
        ("cifar10/llr", 100_000),
        ("mnist/madry", 100_000),
        ("mnist/mma-linf", 100_000),
    ):
        recipe = read(name)
        assert recipe["epochs"] == ceil(steps / steps_an_epoch(recipe))


def test_levels() -> None:
    levels = wb.schedules.Levels([1, 0.3, 0.1], [0, 20, 30])
    assert [levels(epoch) for epoch in (0, 19, 20, 29, 30, 99)] == [1, 1, 0.3, 0.3, 0.1, 0.1]
    for factors, starts in (([1, 2], [0]), ([1, 2], [1, 2]), ([1, 2], [0, 0]), ([], [])):
        with pytest.raises(InputError, match="starts"):
            wb.schedules.Levels(factors, starts)


@pytest.mark.parametrize("width", [40, 80, 100, 140, 250])
def test_the_listing_fits_its_terminal(width: int) -> None:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(Listing([recipes.about(name) for name in NAMES]))
    text = capture.get()
    assert max(len(line) for line in text.splitlines()) <= width
    assert all(name in text for name in NAMES)
    assert "53.08" in text
    assert ("reported by" in text) == (width >= 100)


def test_one_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "cifar10/trades"]) == 0
    assert capsys.readouterr().out == recipes.find_recipe("cifar10/trades").read_text()
    assert main(["recipes", "cifar10/trade"]) == 2
    assert "such as cifar10/trades" in capsys.readouterr().err


# ---- what they do -------------------------------------------------------------------------------------------------


def elsewhere(shape: Sequence[int], classes: int) -> list[str]:
    """Words that put random images in the place of a recipe's data."""
    words = ["--data", "synthetic_data.Synthetic", "--data.init_args.shape", json.dumps(list(shape))]
    words += ["--data.init_args.classes", str(classes), "--data.init_args.validation", "2"]
    return [*words, "--data.init_args.train_rows", "null", "--data.init_args.test_rows", "null"]


@pytest.mark.parametrize("name", NAMES)
def test_it_parses_and_is_what_it_says(name: str) -> None:
    needs(name)
    recipe = read(name)
    made = parser()
    config = made.parse_args(["--config", str(recipes.find_recipe(name))])
    for key, value in recipe.items():
        if isinstance(value, int | float | str):
            assert config[key] == value
    if name.startswith("imagenet/"):  # whose folder would have to be there
        config = made.parse_args(["--config", str(recipes.find_recipe(name)), *elsewhere((3, 64, 64), 1000)])
        recipe["data"]["class_path"] = "synthetic_data.Synthetic"
    with torch.device("meta"):  # sizes without numbers: the networks are large
        built = made.instantiate_classes(config)
        for key, value in recipe.items():
            if isinstance(value, dict) and key not in ("optimizer", "scheduler"):
                assert isinstance(built[key], import_object(value["class_path"]))
        logits = built.model.eval()(torch.rand(2, *built.data.shape))
        assert logits.shape == (2, built.data.classes)
    optimizer = (built.optimizer or torch.optim.SGD)([torch.nn.Parameter(torch.zeros(2))])
    if built.scheduler is not None:
        schedule = built.scheduler(optimizer)
        for _ in range(built.epochs if built.scheduler_interval == "epoch" else 3):
            optimizer.step()
            schedule.step()


def shrunk(name: str) -> list[str]:
    """Words that make the recipe small, and put random images in the place of its data."""
    recipe = read(name)
    words = ["--config", name, "--epochs", "1", "--batch_size", "2", "--progress", "false"]
    data = import_object(recipe["data"]["class_path"])
    shape = getattr(data, "shape", (3, 32, 32))
    # Images of a quarter of the area where a network takes them, and ten classes for a thousand.
    shape = (3, 16, 16) if shape == (3, 32, 32) else shape
    classes = getattr(data, "classes", 10)
    words += [
        "--probe",
        "0" if kind(recipe["model"]) in ("Torchvision", "Timm") else "2",
        "--workers",
        "0",
        *elsewhere(shape, classes),
    ]
    words += ["--trainer", json.dumps({"accelerator": "cpu", "limit_train_batches": 2, "limit_val_batches": 1})]
    model, given = kind(recipe["model"]), arguments(recipe["model"])
    if model.endswith("WideResNet"):
        words += ["--model.init_args.depth", "8" if model.startswith("IAAT") else "10", "--model.init_args.factor", "1"]
    elif model == "PreActResNet18":
        words += ["--model.init_args.width", "4"]
    elif model in ("Torchvision", "Timm"):
        words += ["--model.init_args.name", "resnet18", "--model.init_args.classes", str(classes)]
    elif model in ("MadryMNIST", "SmallCNN"):
        words += ["--model.init_args.width", "2", "--model.init_args.hidden", "16"]
    if "attack" in recipe and kind(recipe["attack"]) not in ("FGSM", "NFGSM"):
        words += ["--attack.init_args.steps", "1" if given.get("name") else "2"]
    if kind(recipe["radius"]) == "InstanceAdaptive":
        words += ["--radius.init_args.warmup", "0"]  # what comes after is the method
    if "start" in arguments(recipe.get("weighting")):
        words += ["--weighting.init_args.start", "0"]
    if arguments(recipe.get("perturbation")).get("warmup"):
        words += ["--perturbation.init_args.warmup", "0"]
    return words


@pytest.mark.parametrize("name", NAMES)
def test_it_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(name)
    monkeypatch.chdir(tmp_path)
    run = train_from([*shrunk(name), "--out", str(tmp_path / "run")])
    assert run.finished
    assert run.metrics is not None
    assert run.metrics["step"].tolist() == [2]
    assert torch.isfinite(torch.tensor(run.metrics["loss"])).all()
    assert "validation_clean" in run.metrics
    recipe = read(name)
    policies = ("model", "attack", "radius", "objective", "weighting", "perturbation", "averaging", "guard")
    for key in (*policies, "scheduler"):
        assert kind(run.config.get(key)) == kind(recipe.get(key))
    assert [kind(part) for part in run.config["regularizers"]] == [
        kind(part) for part in recipe.get("regularizers", [])
    ]
    assert isinstance(wb.load_model(str(run.path)), torch.nn.Module)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_a_rate_of_levels_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*shrunk("cifar10/gairat"), "--out", str(tmp_path / "run")]
    train_from(words)
    assert train_from([*words, "--resume", "--epochs", "2"]).metrics["step"].tolist() == [2, 4]
