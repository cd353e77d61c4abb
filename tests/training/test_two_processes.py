"""Two processes train one model: each sees its share, both know all radii in the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_script import uneven
from training_tools import fit, mlp, tensors

import wideberth as wb
from wideberth.training.averaging import EMA
from wideberth.training.perturbation import AWP
from wideberth.training.radii import Fixed
from wideberth.training.stopping import OverfittingGuard


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the script left its runs, made by two processes that talk through gloo; skips where they cannot talk."""
    folder = tmp_path_factory.mktemp("ranks")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    script = Path(__file__).with_name("rank_script.py")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*words, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    refused = ("Operation not permitted", "Permission denied", "Cannot assign requested address", "Address family")
    if done.returncode and any(reason in done.stderr for reason in refused):
        pytest.skip(f"processes cannot talk here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["simple", "lookahead"])
def test_two_processes(trained: Path, rule: str) -> None:
    folder = trained / rule
    ranks: list[dict[str, Any]] = [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(2)]
    split = tensors(11, validation=2).train()
    assert sorted(ranks[0]["rows"] + ranks[1]["rows"]) == sorted([*split.rows.tolist()] * 2)  # twice: two epochs
    assert ranks[0]["state"].keys() == ranks[1]["state"].keys()
    assert all(torch.equal(value, ranks[1]["state"][name]) for name, value in ranks[0]["state"].items())
    radii = ranks[0]["state"]["radius.radii"]
    steps = (radii - 0.1) / (0.01 if rule == "simple" else 0.001)
    visited = torch.zeros(11, dtype=torch.bool)
    visited[split.rows] = True
    assert steps[~visited].tolist() == [0.0, 0.0]
    assert (steps[visited] != 0).any()
    if rule == "simple":
        # Two visits of one step each, up or down; a sum over ranks, or a rank that was not heard, would leave others.
        assert set(steps[visited].round().int().tolist()) <= {-2, 0, 2}
    assert steps[visited].abs().max() == pytest.approx(2, rel=1e-3)
    run = wb.Run(folder / "run")
    assert run.finished
    assert run.metrics is not None
    assert run.metrics["epoch"].tolist() == [0, 1]
    assert run.metrics["step"].tolist() == [2, 4]  # 9 rows in fours; the one left over joins the batch before it
    assert run.samples is not None
    assert run.samples["radius"].tolist() == pytest.approx(radii[split.rows].tolist())
    saved = torch.load(run.path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["radius.radii"], radii)


@pytest.mark.slow
def test_two_processes_climb_together_and_keep_one_average(trained: Path, tmp_path: Path) -> None:
    """What two processes do is what one does, to the last digits: the climb is the whole batch's."""
    folder = trained / "around"
    ranks: list[dict[str, Any]] = [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(2)]
    assert all(torch.equal(value, ranks[1]["state"][name]) for name, value in ranks[0]["state"].items())
    model = mlp()
    around: dict[str, Any] = {"perturbation": AWP(0.3), "averaging": EMA(0.5), "guard": OverfittingGuard(1.0)}
    alone = fit(model, tensors(10, validation=2), tmp_path / "run", radius=Fixed(0.1), keep="best", **around)
    both = wb.Run(folder / "run")
    assert both.metrics is not None
    assert alone.metrics is not None
    assert both.export == alone.export
    columns = ["validation_robust", "guard_robust", "effective_margin"]
    assert both.metrics[columns].to_numpy() == pytest.approx(alone.metrics[columns].to_numpy(), rel=1e-4)
    together = wb.load_model(str(both.path)).state_dict()
    assert all(torch.allclose(value, together[name], atol=1e-6) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_uneven_shares_train_as_one_process_does(trained: Path, tmp_path: Path) -> None:
    """4 + 3 rows a batch: gradients, the climb, metrics and what policies remember are those of all 7."""
    folder = trained / "uneven"
    ranks: list[dict[str, Any]] = [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(2)]
    assert all(torch.equal(value, ranks[1]["state"][name]) for name, value in ranks[0]["state"].items())
    alone = fit(mlp(), out=tmp_path / "run", **uneven())
    assert alone.checkpoint is not None
    state = torch.load(alone.checkpoint, weights_only=True)["state_dict"]
    for name, value in state.items():
        assert torch.allclose(value, ranks[0]["state"][name], atol=1e-6), name
    visits = ranks[0]["state"]["weighting.visits"]
    assert torch.equal(visits, state["weighting.visits"])
    assert sorted(visits.tolist()) == [1.0] * 3 + [4.0] * 17  # held-out rows are not visited
    both = wb.Run(folder / "run").metrics
    assert both is not None
    assert alone.metrics is not None
    assert list(both) == list(alone.metrics)
    for name in both.drop(columns="seconds"):
        assert both[name].to_numpy() == pytest.approx(alone.metrics[name].to_numpy(), rel=1e-4, abs=1e-6), name
