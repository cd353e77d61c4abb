"""What a run leaves behind, what it refuses to touch, and what survives a full disk."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.fabric.plugins.io.torch_io as torch_io
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import nn
from training_tools import adam, fit, mlp, seeded, tensors

import wideberth as wb
from wideberth import schema
from wideberth.training.radii import Fixed, InstanceAdaptive, ShortestSuccessful
from wideberth.training.regularizers import EffectiveMargin
from wideberth.training.schedules import Steps


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[wb.Run, nn.Module, wb.data.Data]:
    """A run with everything: learned radii and a held-out split, on some rows of a larger source."""
    model, data = mlp(), tensors(60, train_rows=50, validation=8)
    out = tmp_path_factory.mktemp("finished") / "some" / "run"
    return fit(model, data, out, radius=InstanceAdaptive(0.1, gamma=0.02, warmup=0), epochs=3), model, data


# ---- the directory --------------------------------------------------------------------------------------------------


def test_what_is_there(finished: tuple[wb.Run, nn.Module, wb.data.Data]) -> None:
    run = finished[0]
    files = {file.relative_to(run.path).as_posix() for file in run.path.rglob("*") if file.is_file()}
    assert files == {
        "config.yaml",
        "metrics.csv",
        "radii.parquet",
        "samples.parquet",
        "extremes.npz",
        "model.safetensors",
        "export.json",
        "checksums.txt",
        "checkpoints/last.ckpt",
        "checkpoints/previous.ckpt",
        "checkpoints/best.ckpt",
        "checkpoints/checksums.txt",
    }
    assert run.finished
    assert run.export == {"epoch": 2, "keep": "last", "ended": None}
    assert run.name == "run"
    assert run.evaluation is None
    assert run.evaluation_samples is None


def test_a_batch_of_which_nothing_was_moved_was_still_attacked(tmp_path: Path) -> None:
    """MMA moves nothing that is wrong as it is: what is logged at those points is the adversarial accuracy."""
    model = mlp()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # a tie: nothing is right by a soft margin
    policies = {"radius": ShortestSuccessful(0.3, 0.05), "attack": wb.attacks.PGD(steps=1)}
    run = fit(model, tensors(), tmp_path / "run", optimizer=lambda p: torch.optim.SGD(p, lr=0.0), **policies, epochs=1)
    assert run.metrics is not None
    assert "accuracy_adversarial" in run.metrics
    assert "accuracy_clean" not in run.metrics


@pytest.mark.parametrize(
    ("radius", "norm", "said"),
    [
        (InstanceAdaptive(0.6, gamma=0.02, warmup=0), "linf", "note: 100% of the learned radii are beyond 0.5, half"),
        (InstanceAdaptive(0.6, gamma=0.02, warmup=0), "l2", ""),
        (InstanceAdaptive(0.3, gamma=0.5, warmup=0, maximum=0.5), "linf", ""),
        (Fixed(0.6), "linf", ""),
    ],
    ids=["too far", "in l2 a pixel may go anywhere", "limited", "asked for"],
)
def test_radii_that_grow_beyond_half_of_the_box_are_noted_once(
    radius: Any, norm: Any, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(mlp(), tensors(), tmp_path / "run", radius=radius, attack=wb.attacks.PGD(norm=norm, steps=1), epochs=2)
    assert [message.startswith("note: ") for message in caplog.messages] == [True] * bool(said)
    assert said in "".join(caplog.messages)


def test_metrics(finished: tuple[wb.Run, nn.Module, wb.data.Data]) -> None:
    metrics = finished[0].metrics
    assert metrics is not None
    assert metrics["epoch"].tolist() == [0, 1, 2]
    assert metrics["step"].tolist() == [11, 22, 33]  # 42 rows in fours
    assert metrics.notna().all().all()
    assert (metrics["validation_robust"] <= metrics["validation_clean"]).all()
    assert {"loss", "penalty", "accuracy_adversarial", "radius_mean", "effective_margin", "seconds"} <= set(metrics)
    assert (metrics["radius_q0"] <= metrics["radius_mean"]).all()


def test_samples(finished: tuple[wb.Run, nn.Module, wb.data.Data]) -> None:
    run, _, data = finished
    split, samples = data.train(), run.samples
    assert samples is not None
    assert samples["index"].tolist() == split.rows.tolist()
    assert samples["label"].tolist() == split.labels.tolist()
    assert len(samples) == 42
    assert samples["index"].max() < 50
    assert samples["radius"].between(0, 0.1 + 3 * 0.02 + 1e-6).all()
    steps = (samples["radius"] - 0.1) / 0.02
    assert np.allclose(steps, steps.round(), atol=1e-4)
    assert (steps.abs().round() % 2 == 1).all()  # every row was visited, three times
    assert run.metrics is not None
    assert run.metrics["radius_mean"].iloc[-1] == pytest.approx(samples["radius"].mean(), rel=1e-6)


def test_histograms_and_extremes(finished: tuple[wb.Run, nn.Module, wb.data.Data]) -> None:
    run, _, data = finished
    radii, samples, extremes = run.radii, run.samples, run.extremes
    assert radii is not None
    assert samples is not None
    assert extremes is not None
    assert radii.groupby("epoch")["count"].sum().tolist() == [42] * 3
    last = radii[radii["epoch"] == 2]
    counts, _ = np.histogram(samples["radius"].astype(np.float32), bins=[*last["low"], last["high"].iloc[-1]])
    assert counts.tolist() == last["count"].tolist()
    for end, best in (("small", samples["radius"].min()), ("large", samples["radius"].max())):
        assert extremes[f"{end}_radius"][0] == pytest.approx(best)
        assert len(extremes[f"{end}_index"]) == 16
        table = samples.set_index("index").loc[extremes[f"{end}_index"]]
        assert np.array_equal(table["label"], extremes[f"{end}_label"])
        assert np.array_equal(table["radius"].astype(np.float32), extremes[f"{end}_radius"])
        x, _ = data.train().source.fetch(torch.as_tensor(extremes[f"{end}_index"]))
        assert np.array_equal(x.numpy(), extremes[f"{end}_x"])
    assert extremes["small_radius"].max() <= extremes["large_radius"].min()


def test_without_learned_radii(tmp_path: Path) -> None:
    run = fit(mlp(), tensors(), tmp_path / "run", radius=Fixed(0.1), probe=0)
    assert run.samples is not None
    assert list(run.samples) == ["index", "label"]
    assert (run.extremes, run.radii) == (None, None)
    assert run.metrics is not None
    assert not {"radius_mean", "effective_margin", "validation_clean"} & set(run.metrics)
    assert not (run.path / "checkpoints" / "best.ckpt").exists()


def test_held_out_rows_are_not_trained_on(tmp_path: Path) -> None:
    seen: set[int] = set()

    class Look(wb.objectives.AdversarialCrossEntropy):
        def compute(self, batch: Any, points: Any) -> Any:
            seen.update(batch.index.tolist())
            return super().compute(batch, points)

    data = tensors(20, validation=5)
    fit(mlp(), data, tmp_path / "run", objective=Look())
    held_out = data.validation()
    assert held_out is not None
    assert seen == set(data.train().rows.tolist())
    assert not seen & set(held_out.rows.tolist())


def test_the_held_out_scores_and_the_best_checkpoint(tmp_path: Path) -> None:
    """A learning rate that blows up in the last epoch: the best checkpoint is an earlier one."""

    def explode(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 3 else -3e3)

    data, model = tensors(60, validation=20), mlp()
    eps = 0.02
    run = fit(model, data, tmp_path / "run", radius=Fixed(eps), scheduler=explode, optimizer=adam, epochs=4)
    assert run.metrics is not None
    robust = run.metrics["validation_robust"]
    best = int(robust.idxmax())
    assert best < 3
    saved = torch.load(run.path / "checkpoints" / "best.ckpt", weights_only=True)
    assert saved["epoch"] == best
    held_out = data.validation()
    assert held_out is not None
    x, y, index = held_out.tensors()
    again = wb.load_model(str(run.path / "checkpoints" / "best.ckpt"))
    clean = (again(x).argmax(1) == y).float().mean().item()
    assert run.metrics["validation_clean"].iloc[best] == pytest.approx(clean)
    found = wb.attacks.PGD(steps=20, restarts=3)(again, x, y, eps=eps, index=index)
    assert robust.iloc[best] >= (~found.success).float().mean().item() - 1e-6  # type: ignore[operator]
    assert torch.equal(wb.load_model(str(run.path))(x), model.eval()(x))  # the run's model is the last one


# ---- the configuration ----------------------------------------------------------------------------------------------

MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: wb.models.MLP((1, 8, 8), hidden=(12,)),
    "MLP, by position": lambda: wb.models.MLP((1, 8, 8), 10, (6, 5), "silu", True),
    "ConvNet": lambda: wb.models.ConvNet((1, 8, 8), 10, width=2, depth=2, batch_norm=True, mean=(0.3,), std=(0.4,)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_run_says_what_its_model_is(tmp_path: Path, name: str) -> None:
    model = seeded(MODELS[name])
    data = wb.data.Digits(train_rows=40, test_rows=9, validation=8)
    run = fit(model, data, tmp_path / "run", radius=InstanceAdaptive(0.1, warmup=0), batch_size=16, epochs=1)
    x, _, _ = data.test().tensors()
    again = wb.load_model(str(run.path))
    assert type(again) is type(model)
    assert torch.equal(again(x), model.eval()(x))
    for checkpoint in ("last.ckpt", "best.ckpt"):
        assert torch.equal(wb.load_model(str(run.path / "checkpoints" / checkpoint))(x), model(x))
    assert run.config["data"] == {
        "class_path": "wideberth.data.Digits",
        "init_args": {"train_rows": 40, "test_rows": 9, "validation": 8, "validation_seed": 0},
    }


def test_config_names_every_argument(tmp_path: Path) -> None:
    run = fit(
        mlp(),
        tensors(),
        tmp_path / "run",
        attack=wb.attacks.PGD(norm="l2", steps=3, step_size=0.25),
        radius=InstanceAdaptive(0.1, "lookahead", maximum=0.5),
        objective=wb.objectives.TRADES(3.0),
        weighting=wb.weightings.Uniform(),
        regularizers=[EffectiveMargin(Steps(0.1, [1, 2]), "softmax", 40.0)],
        augment=None,
        optimizer=partial(torch.optim.SGD, lr=0.02),
        seed=5,
        trainer={"gradient_clip_val": 1.0},
    )
    config = run.config
    training = "wideberth.training"
    attack = config.pop("attack")
    assert attack["class_path"] == "wideberth.attacks.PGD"
    assert attack["init_args"] == {
        "norm": "l2",
        "box": [0.0, 1.0],
        "steps": 3,
        "step_size": 0.25,
        "start": "uniform",
        "restarts": 1,
        "targets": 0,
        "draws": 1,
        "loss": "wideberth.losses.cross_entropy",
        "keep": "last",
    }
    assert config["radius"]["class_path"] == f"{training}.radii.InstanceAdaptive"
    assert config["radius"]["init_args"]["maximum"] == 0.5
    assert config["objective"] == {
        "class_path": f"{training}.objectives.TRADES",
        "init_args": {"beta": 3.0, "inner": "kl", "loss": "wideberth.losses.cross_entropy"},
    }
    assert config["weighting"] == {"class_path": f"{training}.weightings.Uniform", "init_args": {}}
    (regularizer,) = config["regularizers"]
    assert regularizer["init_args"]["weight"] == {
        "class_path": f"{training}.schedules.Steps",
        "init_args": {"value": 0.1, "epochs": [1, 2], "factor": 0.1},
    }
    assert regularizer["init_args"]["temperature"] == 40.0
    assert config["optimizer"]["init_args"] == {"lr": 0.02}
    assert (config["seed"], config["epochs"], config["batch_size"]) == (5, 2, 4)
    assert config["trainer"] == {"accelerator": "cpu", "gradient_clip_val": 1.0}
    assert config["out"] == str(tmp_path / "run")
    assert "resume" not in config
    assert "overwrite" not in config


def test_a_configuration_given_is_the_one_recorded(tmp_path: Path) -> None:
    run = fit(mlp(), tensors(), tmp_path / "run", config={"mine": [1, 2]})
    assert run.config == {"mine": [1, 2]}


# ---- claims on a directory ------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_finished_run_is_not_replaced_unless_told(tmp_path: Path) -> None:
    out = tmp_path / "run"
    fit(mlp(), tensors(), out, radius=InstanceAdaptive(0.1, warmup=0))
    (out / "report.html").write_text("old")
    before = contents(out)
    with pytest.raises(wb.InputError, match=r"holds a finished run; use --overwrite to replace it or --resume"):
        fit(mlp(), tensors(), out)
    assert contents(out) == before
    run = fit(mlp(), tensors(), out, overwrite=True, epochs=1)
    assert run.metrics is not None
    assert len(run.metrics) == 1
    assert (run.radii, run.extremes) == (None, None)
    assert not (out / "report.html").exists()  # it would report on weights that are gone


REFUSED_LATE: dict[str, Callable[[], dict[str, Any]]] = {
    "trainer option": lambda: {"trainer": {"devcies": 1}},
    "workers": lambda: {"workers": -1},
    "probe": lambda: {"probe": -1},
    "epochs": lambda: {"epochs": 0},
    "batch size": lambda: {"batch_size": 0},
    "box": lambda: {"attack": wb.attacks.PGD(box=(-1.0, 1.0))},
    "model": lambda: {"model": mlp(classes=4)},
    "combination": lambda: {"objective": wb.objectives.CleanCrossEntropy(), "radius": Fixed(0.1)},
}


@pytest.mark.parametrize("name", REFUSED_LATE)
def test_what_is_refused_overwrites_nothing(tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    fit(mlp(), tensors(), out, epochs=1)
    before = contents(out)
    with pytest.raises(wb.InputError):
        fit(**({"model": mlp(), "data": tensors(), "out": out, "overwrite": True} | REFUSED_LATE[name]()))
    assert contents(out) == before


def test_an_unfinished_run_is_not_replaced_unless_told(tmp_path: Path) -> None:
    out = tmp_path / "run"
    fit(mlp(), tensors(), out)
    (out / "model.safetensors").unlink()
    with pytest.raises(wb.InputError, match="holds an unfinished run; use --overwrite to replace it or --resume"):
        fit(mlp(), tensors(), out)
    assert fit(mlp(), tensors(), out, overwrite=True).finished


def test_directories_of_others(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("...")
    for overwrite in (False, True):
        with pytest.raises(wb.InputError, match="holds files that are not a run's; choose an empty directory"):
            fit(mlp(), tensors(), tmp_path / "thesis", overwrite=overwrite)
    assert contents(tmp_path / "thesis") == {str(tmp_path / "thesis" / "chapter.tex"): b"..."}
    with pytest.raises(wb.InputError, match="cannot be made a directory"):
        fit(mlp(), tensors(), tmp_path / "thesis" / "chapter.tex")
    with pytest.raises(wb.InputError, match="cannot be made a directory"):
        fit(mlp(), tensors(), tmp_path / "thesis" / "chapter.tex" / "run")
    (tmp_path / "empty").mkdir()
    assert fit(mlp(), tensors(), tmp_path / "empty").finished


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_to_resume(tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "run").mkdir()
    with pytest.raises(wb.InputError, match=r"with resume: holds no checkpoints/last.ckpt to resume from"):
        fit(mlp(), tensors(), tmp_path / "run", resume=True)
    assert (tmp_path / "run").exists() == exists


# ---- models and data that do not fit --------------------------------------------------------------------------------


class Answers(nn.Module):
    """Gives what a function of its input gives."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(1))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x) * self.idle


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: mlp(classes=4), "model: returns 4 logits, the data has 3 classes"),
        (lambda: mlp(features=6), r"model: does not take inputs of shape \(5,\): "),
        (
            lambda: nn.Linear(5, 1),
            r"the model returned shape \(1, 1\) for 1 inputs: must be logits \(1, K\) with K >= 2",
        ),
        (lambda: Answers(lambda x: x[:, 0]), r"the model returned shape \(1,\)"),
        (lambda: Answers(lambda x: x[:, :3] * float("nan")), "NaN or infinite logits"),
        (lambda: nn.Conv2d(1, 3, 3), r"model: does not take inputs of shape \(5,\)"),
        (lambda: nn.Embedding(5, 3), r"model: does not take inputs of shape \(5,\)"),
    ],
)
def test_models_that_do_not_fit(tmp_path: Path, model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(wb.InputError, match=message) as refusal:
        fit(model(), tensors(), tmp_path / "run")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_boxes_must_agree(tmp_path: Path) -> None:
    with pytest.raises(wb.InputError, match=r"attack.box=\(-1.0, 1.0\): the data lies in \(0.0, 1.0\); they must"):
        fit(mlp(), tensors(), tmp_path / "run", attack=wb.attacks.PGD(box=(-1.0, 1.0)))
    x, y = torch.rand(8, 5) * 2 - 1, torch.arange(8) % 3
    data = wb.data.Tensors(x, y, x, y, box=(-1.0, 1.0))
    run = wb.train(mlp(), data, tmp_path / "own", radius=Fixed(0.1), epochs=1, progress=False)  # its default fits
    assert run.config["attack"]["init_args"]["box"] == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0: must be at least 1"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"workers": -1}, "workers=-1: must be at least 0"),
        ({"probe": -2}, "probe=-2: must be at least 0"),
    ],
)
def test_bad_numbers(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(wb.InputError, match=message):
        fit(mlp(), tensors(), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_the_model_is_trained_in_place_and_the_caller_may_go_on(tmp_path: Path) -> None:
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    fit(model, tensors(), tmp_path / "run")
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())
    model(torch.rand(2, 5)).sum().backward()


# ---- a full disk ----------------------------------------------------------------------------------------------------


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the third checkpoint fits: the second one is still there, and the run goes on from it."""
    written: list[Path] = []
    whole = torch_io._atomic_save

    def limited(checkpoint: dict[str, Any], filepath: Any) -> None:
        written.append(Path(filepath))
        if len(written) == 3:
            Path(filepath).write_bytes(b"PK\x03\x04 half of it")
            raise full()
        whole(checkpoint, filepath)

    monkeypatch.setattr(torch_io, "_atomic_save", limited)
    out, data = tmp_path / "run", tensors(12, validation=3)
    with pytest.raises(OSError, match="No space left"):
        fit(mlp(), data, out, epochs=4)
    assert len(written) == 3
    run = wb.Run(out)
    assert run.checkpoint is not None
    assert not run.finished
    left = {"last.ckpt", "previous.ckpt", "best.ckpt", "checksums.txt"}
    assert {file.name for file in (out / "checkpoints").iterdir()} == left
    assert torch.load(run.checkpoint, weights_only=True)["epoch"] == 1
    resumed, straight = mlp(), mlp()
    fit(resumed, data, out, epochs=4, resume=True)
    fit(straight, data, tmp_path / "straight", epochs=4)
    assert all(map(torch.equal, resumed.state_dict().values(), straight.state_dict().values()))
    assert run.metrics is not None
    assert run.metrics["epoch"].tolist() == [0, 1, 2, 3]


def test_the_last_checkpoint_is_moved_into_place_whole(tmp_path: Path) -> None:
    """A reader that held the old file open goes on with the old file."""
    out, data = tmp_path / "run", tensors()
    fit(mlp(), data, out, epochs=1)
    with (out / "checkpoints" / "last.ckpt").open("rb") as held:
        fit(mlp(), data, out, epochs=2, resume=True)
        assert torch.load(held, weights_only=True)["epoch"] == 0
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1


def test_a_full_disk_at_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pd.DataFrame.to_csv

    def limited(self: pd.DataFrame, file: Any, **options: Any) -> None:
        if len(self) == 2:
            Path(file).write_text("epoch,st")
            raise full()
        whole(self, file, **options)

    monkeypatch.setattr(pd.DataFrame, "to_csv", limited)
    with pytest.raises(OSError, match="No space left"):
        fit(mlp(), tensors(), tmp_path / "run", epochs=3)
    run = wb.Run(tmp_path / "run")
    assert run.metrics is not None
    assert run.metrics["epoch"].tolist() == [0]
    assert not [file for file in run.path.rglob(".*") if file.is_file()]


def test_a_full_disk_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is trained but not exported: not finished, and `resume` exports it."""
    with monkeypatch.context() as patch:

        def refuse(*_: Any, **__: Any) -> None:
            raise full()

        patch.setattr(pd.DataFrame, "to_parquet", refuse)
        with pytest.raises(OSError, match="No space left"):
            fit(mlp(), tensors(), tmp_path / "run")
    run = wb.Run(tmp_path / "run")
    assert not run.finished
    model = mlp()
    fit(model, tensors(), tmp_path / "run", resume=True)
    assert run.finished
    assert run.samples is not None
    x = tensors().test().tensors()[0]
    straight = mlp()
    fit(straight, tensors(), tmp_path / "straight")
    assert torch.equal(model.eval()(x), straight.eval()(x))
    assert torch.equal(wb.load_model(str(run.path))(x), straight(x))


def test_what_was_trained_says_so_in_yaml(finished: tuple[wb.Run, nn.Module, wb.data.Data]) -> None:
    text = (finished[0].path / "config.yaml").read_text()
    assert "!!python" not in text
    assert yaml.safe_load(text) == {"schema_version": schema.VERSION} | finished[0].config


def test_a_recorded_run_can_be_repeated_from_its_configuration(tmp_path: Path) -> None:
    """What the Python interface recorded is a configuration of the command line, and gives the same weights."""
    from wideberth.commands.train import train_from

    run = fit(
        seeded(MODELS["ConvNet"], 3),
        wb.data.Digits(train_rows=40, validation=8),
        tmp_path / "run",
        radius=InstanceAdaptive(0.1, "lookahead", warmup=0),
        regularizers=[EffectiveMargin(Steps(0.01, [1]), "softmax")],
        objective=wb.objectives.TRADES(2.0),
        optimizer=adam,
        augment=wb.data.CropFlip(1),
        batch_size=16,
        seed=3,
    )
    words = ["--config", str(run.path / "config.yaml"), "--out", str(tmp_path / "again")]
    with pytest.raises(wb.InputError, match=r"optimizer names 'training_tools\.adam', .*--trust"):  # of these tests
        train_from(words)
    again = train_from([*words, "--trust"])
    assert (again.path / "model.safetensors").read_bytes() == (run.path / "model.safetensors").read_bytes()
    assert run.metrics is not None
    assert again.metrics is not None
    assert again.metrics.drop(columns="seconds").equals(run.metrics.drop(columns="seconds"))
