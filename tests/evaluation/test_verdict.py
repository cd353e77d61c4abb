"""One verdict, however it is reached: any batch, any order, any number of processes, any number of interruptions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import Tensor, nn

from wideberth import losses
from wideberth.attacks import PGD, PMA, Attack, Square, Stage
from wideberth.attacks.schedule import DueJobs, Schedule
from wideberth.attacks.state import AttackInputs
from wideberth.checks import InputError
from wideberth.evaluation import Evaluation, evaluate
from wideberth.randomness import Noise

EPS = 0.12
TARGETED = PGD(steps=1, targets=2, restarts=2, step_size=0.03, loss=losses.margin_loss, keep="worst")
LINE_UP: dict[str, Attack | Stage] = {
    "PGD targeted": Stage(TARGETED, parallel_restarts=3),
    "PGD": PGD(steps=2, restarts=3, step_size=0.04, keep="worst"),
    "PMA, near": Stage(PMA(steps=4, diverse=2, restarts=2), margin_threshold=-0.5),
    "Square": Square(queries=20, rescaled=True),
    "Square, side by side": Stage(Square(queries=20, rescaled=True, restarts=2), parallel_restarts=2),
}


def problem(rows: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    """A small net in float64, with samples of which most are right and some near the boundary."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 4)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.7)
    x = torch.rand(rows, 6, generator=generator, dtype=torch.float64)
    y = model(x).argmax(1)
    y[::9] = (y[::9] + 1) % 4
    return model, x, y


def verdict(**options: Any) -> pd.DataFrame:
    model, x, y = problem()
    return evaluate(model, (x, y), **{"eps": EPS, "suite": LINE_UP, "margin": False} | options).samples


@pytest.fixture(scope="module")
def whole() -> pd.DataFrame:
    return verdict(batch_size=40)


def test_every_stage_breaks_some_and_some_hold(whole: pd.DataFrame) -> None:
    """Without this, the tests below would compare little."""
    won = whole["attack"].value_counts()
    assert won.get("PGD targeted", 0) >= 3
    assert won.get("PGD", 0) + won.get("PMA, near", 0) >= 1
    assert whole["robust"].sum() >= 5
    assert set(whole["job"].dropna()) >= {0, 1}


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_changes_nothing(whole: pd.DataFrame, batch_size: int) -> None:
    assert_frame_equal(verdict(batch_size=batch_size), whole, rtol=1e-9)


@pytest.mark.parametrize("parallel_restarts", [1, 2, 9])
def test_runs_side_by_side_find_what_they_find_one_after_the_other(whole: pd.DataFrame, parallel_restarts: int) -> None:
    """The first run that breaks a sample is the same, at the same step; what holds has cost the same."""
    found = verdict(
        suite=LINE_UP | {"PGD targeted": Stage(TARGETED, parallel_restarts=parallel_restarts)}, batch_size=16
    )
    held = whole["robust"]
    assert_frame_equal(found.drop(columns="evaluations"), whole.drop(columns="evaluations"), rtol=1e-9)
    assert_frame_equal(found[held], whole[held], rtol=1e-9)
    more = found["evaluations"] - whole["evaluations"]
    assert (more != 0).any()
    if parallel_restarts != 2:  # windows of two end elsewhere than those of three
        assert (more <= 0).all() if parallel_restarts == 1 else (more >= 0).all()


class Shuffled(torch.utils.data.Dataset[Any]):
    """The same samples in another order, each with its index."""

    def __init__(self) -> None:
        _, self.x, self.y = problem()
        self.order = torch.randperm(len(self.y), generator=torch.Generator().manual_seed(1)).tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> tuple[Tensor, int, int]:
        row = self.order[place]
        return self.x[row], int(self.y[row]), row


def test_order_changes_nothing(whole: pd.DataFrame) -> None:
    found = evaluate(problem()[0], Shuffled(), eps=EPS, suite=LINE_UP, margin=False, batch_size=9).samples
    assert found["index"].tolist() != whole["index"].tolist()
    found = found.sort_values("index", ignore_index=True).drop(columns="position")
    assert_frame_equal(found, whole.drop(columns="position"), rtol=1e-9)


def test_a_near_stage_leaves_the_others_alone() -> None:
    """Those that no attack brought near a mistake are not attacked again: they have spent less."""
    short: Mapping[str, Attack | Stage] = {name: LINE_UP[name] for name in ("PGD targeted", "PGD")}
    before, after = verdict(suite=short), verdict(suite=short | {"PMA, near": LINE_UP["PMA, near"]})
    held = before["robust"]
    more = after["evaluations"] > before["evaluations"]
    assert (more == (held & (before["max_probability_margin"] >= -0.5))).all()
    assert 0 < more.sum() < held.sum()


class Stopped(Exception):
    """What interrupts."""


class Fragile(nn.Module):
    """A model that stops the evaluation after so many batches."""

    def __init__(self, model: nn.Module, batches: int) -> None:
        super().__init__()
        self.model, self.left = model, batches

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise Stopped
        logits: Tensor = self.model(x)
        return logits


def test_an_interrupted_evaluation_goes_on_to_the_same_verdict(whole: pd.DataFrame, tmp_path: Path) -> None:
    state = tmp_path / "evaluation.state"
    model, x, y = problem()
    stops = 0
    for batches in (1, 9, 17, 5, 40, 28, 10_000):
        fragile = Fragile(model, batches)
        try:
            record = evaluate(fragile, (x, y), eps=EPS, suite=LINE_UP, margin=False, batch_size=8, state=state)
        except Stopped:
            stops += 1
            continue
        break
    assert stops == 6
    found = record.samples
    assert state.exists()  # until the record is safe
    record.save(tmp_path)
    assert not state.exists()
    spent = whole["evaluations"]
    assert_frame_equal(found.drop(columns="evaluations"), whole.drop(columns="evaluations"), rtol=1e-9)
    assert (found["evaluations"] == spent).all()  # what was under way and lost is not counted twice


def test_the_state_of_another_evaluation_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "evaluation.state"
    model, x, y = problem()
    with pytest.raises(Stopped):
        evaluate(Fragile(model, 12), (x, y), eps=EPS, suite=LINE_UP, margin=False, state=state)
    assert state.exists()
    with pytest.raises(InputError, match="the state belongs to a different evaluation"):
        evaluate(Fragile(model, 99), (x, y), eps=2 * EPS, suite=LINE_UP, margin=False, state=state)
    with pytest.raises(InputError, match="the state belongs to a different evaluation"):
        evaluate(Fragile(problem()[0].float(), 99), (x.float(), y), eps=EPS, suite=LINE_UP, margin=False, state=state)
    state.write_bytes(b"not a state")
    with pytest.raises(InputError, match="cannot be read as a state to resume"):
        evaluate(Fragile(model, 99), (x, y), eps=EPS, suite=LINE_UP, margin=False, state=state)


@pytest.mark.parametrize("place", [0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1])
def test_a_damaged_state_is_not_gone_on_from(place: float, tmp_path: Path) -> None:
    state = tmp_path / "evaluation.state"
    model, x, y = problem()
    with pytest.raises(Stopped):
        evaluate(Fragile(model, 12), (x, y), eps=EPS, suite=LINE_UP, margin=False, state=state)
    content = bytearray(state.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x01
    state.write_bytes(content)
    with pytest.raises(InputError, match=r"evaluation.state': cannot be read as a state to resume") as refusal:
        evaluate(model, (x, y), eps=EPS, suite=LINE_UP, margin=False, state=state)
    assert "\n" not in str(refusal.value)


SHARE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_verdict import radii_of_each, LINE_UP, problem
from wideberth.evaluation import evaluate, shards
model, x, y = problem()
found = evaluate(model, (x, y), eps=radii_of_each(), suite=LINE_UP, radii=True, batch_size=8)
if shards.mine()[0] == 0:
    found.save(sys.argv[2])
else:
    assert found.verify(model, (x, y)).agreed == len(found.adversarial) > 5
"""


def radii_of_each() -> Tensor:
    """Different radii for the samples, none of them 0."""
    return EPS * torch.linspace(0.5, 1.5, 40, dtype=torch.float64)


@pytest.fixture(scope="module")
def alone() -> Evaluation:
    model, x, y = problem()
    return evaluate(model, (x, y), eps=radii_of_each(), suite=LINE_UP, radii=True, batch_size=8)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_reach_the_same_verdict_and_the_same_grade(
    processes: int, alone: Evaluation, tmp_path: Path
) -> None:
    script, out = tmp_path / "share.py", tmp_path / "record"
    script.write_text(SHARE)
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    run = subprocess.run(
        [sys.executable, *words, str(script), str(Path(__file__).parent), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = Evaluation.load(out)
    assert found.protocol["processes"] == processes
    assert_frame_equal(found.samples, alone.samples, rtol=1e-9, check_dtype=False)
    assert found.protocol["grade"] == alone.protocol["grade"]
    assert found.protocol["findings"] == json.loads(json.dumps(alone.protocol["findings"]))
    assert sum(bool(finding["measured"]) for finding in found.protocol["findings"]) > 10
    assert found.adversarial is not None
    assert alone.adversarial is not None
    assert torch.equal(found.adversarial.position, alone.adversarial.position)
    assert torch.allclose(found.adversarial.x(), alone.adversarial.x(), rtol=1e-9)
    model, x, y = problem()
    assert not found.verify(model, (x, y)).disagreements


def test_the_grade_does_not_depend_on_the_order_of_the_data() -> None:
    """Samples are examined by what the data call them, wherever they stand."""
    model, x, y = problem()
    records = [evaluate(model, data, eps=EPS, suite=LINE_UP, margin=False) for data in ((x, y), Shuffled())]
    assert records[0].protocol["findings"] == records[1].protocol["findings"]


@pytest.mark.parametrize("parallel_restarts", [1, 2])
def test_success_that_the_judge_does_not_confirm_ends_no_run(parallel_restarts: int) -> None:
    """A search that took for success what is none goes on where it was, and in the end reports all that it spent."""
    model, x, y = problem(6)
    y = model(x).argmax(1)
    attack = PGD(steps=8, step_size=0.05, keep="worst", start="none", loss=losses.margin_loss)
    eps = torch.full((6,), 0.5, dtype=torch.float64)
    inputs = AttackInputs(x, y, eps, Noise(torch.arange(6)))
    schedule = Schedule(
        model,
        attack,
        DueJobs(inputs.rows, torch.zeros(6, dtype=torch.int64), 2),
        batch_size=4,
        parallel_restarts=parallel_restarts,
    )
    spent, settled, leaves = (torch.zeros(6, dtype=torch.int64) for _ in range(3))
    while schedule.busy:
        for ended in schedule.step():
            spent[ended.sample] += ended.state.evaluations
            leaves[ended.sample] += 1
            settled[ended.sample] += schedule.confirm(ended, torch.ones_like(ended.sample) > 0)
    assert leaves.max() > 3, "some succeed early, and again after every refusal"
    assert (spent == 2 * 2 * attack.num_steps).all(), "two runs of a forward and a gradient a step, each counted once"
    assert torch.equal(settled, spent + leaves), "and a forward of the judge each time that a run left"
