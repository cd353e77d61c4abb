"""Every shipped recipe says what it is, parses, and trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import wideberth as wb
from wideberth import recipes
from wideberth.checks import InputError
from wideberth.commands.parsing import load_yaml
from wideberth.commands.train import parser, train_from
from wideberth.configuration import import_object

torch.set_num_threads(1)

FILES = sorted(recipes.ROOT.rglob("*.yaml"))
NAMES = [file.relative_to(recipes.ROOT).with_suffix("").as_posix() for file in FILES]


def test_all_are_listed() -> None:
    assert len(FILES) > 0
    assert recipes.recipe_names() == sorted(NAMES)
    assert [recipes.find_recipe(name) for name in NAMES] == FILES
    assert not list(recipes.ROOT.rglob("*.yml"))


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(InputError, match=r"--config nowhere/land: neither a file nor a shipped recipe \(.*digits/iaat"):
        recipes.find_recipe("nowhere/land")


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is(name: str) -> None:
    lines = recipes.find_recipe(name).read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len(recipes.about(name)) > 20
    recipe = load_yaml("\n".join(lines))
    assert recipe["out"] == f"runs/{name}"
    # What a schedule promises happens before the end.
    milestones = recipe.get("scheduler", {}).get("init_args", {}).get("milestones", [])
    assert all(milestone < recipe["epochs"] for milestone in milestones)
    assert recipe.get("radius", {}).get("init_args", {}).get("warmup", 0) < recipe["epochs"]


@pytest.mark.parametrize("name", NAMES)
def test_it_parses_and_is_what_it_says(name: str) -> None:
    recipe = load_yaml(recipes.find_recipe(name).read_text())
    made = parser()
    config = made.parse_args(["--config", str(recipes.find_recipe(name))])
    for key, value in recipe.items():
        if isinstance(value, int | float | str):
            assert config[key] == value
    built = made.instantiate_classes(config)
    for key, value in recipe.items():
        if isinstance(value, dict) and key not in ("optimizer", "scheduler"):
            assert isinstance(built[key], import_object(value["class_path"]))
    logits = built.model.eval()(torch.rand(1, *built.data.shape))
    assert logits.shape == (1, built.data.classes)
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    optimizer = (built.optimizer or torch.optim.SGD)(parameters)
    if built.scheduler is not None:
        built.scheduler(optimizer)


def shrunk(name: str) -> list[str]:
    """Words that make the recipe small, and put random images in the place of its data."""
    recipe: dict[str, Any] = load_yaml(recipes.find_recipe(name).read_text())
    data = import_object(recipe["data"]["class_path"])
    words = ["--config", name, "--epochs", "1", "--batch_size", "2", "--probe", "2", "--progress", "false"]
    words += ["--data", "synthetic_data.Synthetic", "--data.init_args.shape", json.dumps(list(data.shape))]
    words += ["--data.init_args.classes", str(data.classes), "--data.init_args.validation", "2"]
    words += ["--data.init_args.train_rows", "null", "--data.init_args.test_rows", "null"]
    words += ["--trainer", json.dumps({"accelerator": "cpu", "limit_train_batches": 2, "limit_val_batches": 1})]
    model = recipe["model"]["class_path"].rpartition(".")[2]
    if model == "WideResNet":
        words += ["--model.init_args.depth", "10", "--model.init_args.factor", "1"]
    if "attack" in recipe:
        words += ["--attack.init_args.steps", "1" if model.endswith("18") else "2"]
    if recipe["radius"]["class_path"].endswith("InstanceAdaptive"):
        words += ["--radius.init_args.warmup", "0"]  # what comes after is the method
    return words


@pytest.mark.parametrize("name", NAMES)
def test_it_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = train_from([*shrunk(name), "--out", str(tmp_path / "run")])
    assert run.finished
    assert run.metrics is not None
    assert run.metrics["step"].tolist() == [2]
    assert torch.isfinite(torch.tensor(run.metrics["loss"])).all()
    assert "validation_clean" in run.metrics
    recipe = load_yaml(recipes.find_recipe(name).read_text())
    for key in ("model", "attack", "radius", "objective"):
        assert (run.config.get(key) or {}).get("class_path", "").rpartition(".")[2] == (
            recipe.get(key, {}).get("class_path", "").rpartition(".")[2]
        )
    assert isinstance(wb.load_model(str(run.path)), torch.nn.Module)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
