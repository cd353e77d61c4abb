"""The points behind a verdict: stored with the record, checked again without a search, and named where they fail."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pandas.testing import assert_frame_equal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_verdict import EPS, LINE_UP, problem
from torch import Tensor, nn

import wideberth as wb
from wideberth.checks import InputError
from wideberth.cli import main
from wideberth.evaluation import AdversarialPoints, Evaluation, Verification, evaluate
from wideberth.evaluation.evidence import RowFile
from wideberth.verification import verify


def evaluated(evidence: bool = True, **options: object) -> Evaluation:
    model, x, y = problem()
    arguments = {"eps": EPS, "suite": LINE_UP, "margin": False, "examined": False} | options
    return evaluate(model, (x, y), evidence=evidence, **arguments)


def altered(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Evaluation:
    """The saved record with its points changed and written anew, as a valid file."""
    path = folder / "adversarial.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)
    return Evaluation.load(folder)


@pytest.mark.parametrize("radii", [False, True])
def test_there_is_a_point_for_every_adversarial_sample_and_each_holds(radii: bool) -> None:
    model, x, y = problem()
    found = evaluated(radii=radii, batch_size=7)
    table, points = found.samples, found.adversarial
    adversarial = table["clean_correct"] & ~table["robust"]
    assert points is not None
    assert points.position.tolist() == table.index[adversarial].tolist()
    assert 5 < len(points) < len(table)
    rows = points.position
    assert verify(model, x[rows], y[rows], points.x(), EPS, "linf").all()
    distance = (points.x() - x[rows]).abs().amax(1)
    assert distance.tolist() == table["distance"][adversarial].tolist()
    assert model(points.x()).argmax(1).tolist() == table["adversarial_prediction"][adversarial].tolist()


def test_a_record_verifies_when_it_was_loaded(tmp_path: Path) -> None:
    model, x, y = problem()
    found = evaluated()
    folder = found.save(tmp_path)
    loaded = Evaluation.load(folder)
    assert loaded.adversarial is not None
    assert found.adversarial is not None
    assert torch.equal(loaded.adversarial.x(), found.adversarial.x())
    assert set(load_file(folder / "adversarial.safetensors")) == {"position", "index", "clean_hash", "x"}
    verification = loaded.verify(model, (x, y), batch_size=3)
    assert verification == Verification(len(found.adversarial), ())
    assert (
        str(verification)
        == f"{len(found.adversarial)} of {len(found.adversarial)} adversarial points agree with the record"
    )


def test_exactly_the_two_altered_points_are_named(tmp_path: Path) -> None:
    model, x, y = problem()
    found = evaluated()
    folder = found.save(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["x"][3] = x[tensors["position"][3]]  # the clean input: not misclassified
        tensors["x"][5, 0] += 2.5 * EPS * (1 if tensors["x"][5, 0] < 0.5 else -1)

    verification = altered(folder, change).verify(model, (x, y))
    assert found.adversarial is not None
    named = {each.position: each.reason for each in verification.disagreements}
    assert list(named) == found.adversarial.position[[3, 5]].tolist()
    assert named[int(found.adversarial.position[3])] == "classified correctly"
    assert "outside the ball" in named[int(found.adversarial.position[5])]
    assert verification.agreed == verification.checked - 2 == len(found.adversarial) - 2


def test_every_kind_of_disagreement_is_named(tmp_path: Path) -> None:
    model, x, y = problem()
    found = evaluated()
    folder = found.save(tmp_path)
    assert found.adversarial is not None
    robust = int(found.samples.index[found.samples["robust"]][0])
    position = found.adversarial.position.tolist()

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["x"][0, 0] = 1.01
        tensors["position"][1] = robust
        tensors["index"][1] = robust

    other = x.clone()
    other[position[2]] = x[position[2]].flip(0)
    labels = y.clone()
    labels[position[3]] = (y[position[3]] + 1) % 4
    named = {
        each.position: each.reason for each in altered(folder, change).verify(model, (other, labels)).disagreements
    }
    assert "outside the box" in named.pop(position[0])
    assert named.pop(position[1]) == "the point is missing"
    assert "the table does not count the sample as adversarial" in named.pop(robust)
    assert "the clean sample differs" in named.pop(position[2])
    assert "the clean sample differs" in named.pop(position[3])
    assert not named


def test_another_model_disagrees() -> None:
    _, x, y = problem()
    found = evaluated()
    constant = nn.Linear(6, 4).double()
    with torch.no_grad():
        constant.weight.zero_()
        constant.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
    verification = found.verify(constant, (x, y))
    right = [each for each in verification.disagreements if each.reason == "classified correctly"]
    assert len(right) == len(verification.disagreements)
    assert found.adversarial is not None
    assert {each.position for each in right} == {p for p in found.adversarial.position.tolist() if y[p] == 0}


def test_without_evidence_the_record_says_so_and_the_verdict_is_the_same(tmp_path: Path) -> None:
    model, x, y = problem()
    found, whole = evaluated(evidence=False), evaluated()
    assert_frame_equal(found.samples, whole.samples)
    assert (found.adversarial, found.protocol["evidence"], whole.protocol["evidence"]) == (None, False, True)
    folder = found.save(tmp_path)
    assert not (folder / "adversarial.safetensors").exists()
    with pytest.raises(InputError, match="the record holds no adversarial points"):
        Evaluation.load(tmp_path).verify(model, (x, y))


def test_the_data_come_from_the_record_where_they_are_ours() -> None:
    data = wb.data.Digits(test_rows=20)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = wb.models.MLP((1, 8, 8), 10, (16,))
    found = evaluate(model, data, eps=0.3, suite="pgd", margin=False, examined=False)
    assert found.verify(model) == found.verify(model, data)
    hub = {"class_path": "wideberth.data.HuggingFace", "init_args": {"path": "pandas"}}
    strangers = [
        replace(found, protocol=found.protocol | {"data": data})
        for data in (
            {"class_path": "os.system", "init_args": {}},
            hub,
            {"class_path": "wideberth.data.sources:torch.load"},
        )
    ]
    for record in (*strangers, evaluated()):
        with pytest.raises(InputError, match="data: needed, since the record does not describe"):
            record.verify(model)
    with pytest.raises(InputError, match="data: holds 5 samples: the record is about sample 19 too"):
        found.verify(model, wb.data.Digits(test_rows=5))


def test_a_table_of_version_0_1_reads_like_one_of_today(tmp_path: Path) -> None:
    found = evaluated()
    assert found.adversarial is not None
    found.adversarial.save(tmp_path / "adversarial.safetensors")
    (tmp_path / "evaluation.json").write_text(json.dumps(found.summary()))
    old = found.samples.rename(columns={"job": "run", "max_probability_margin": "closest"})
    old.drop(columns=["position", "eps"]).to_parquet(tmp_path / "evaluation.parquet")
    loaded = Evaluation.load(tmp_path)
    assert_frame_equal(loaded.samples, found.samples.drop(columns=["position", "eps"]))
    model, x, y = problem()
    assert not loaded.verify(model, (x, y)).disagreements


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_row_file_gives_back_what_was_written(dtype: torch.dtype) -> None:
    file = RowFile.temporary((2, 3), dtype)
    x = torch.rand(5, 2, 3).to(dtype)
    file.write(torch.tensor([7, 0, 3, 1, 9]), x)
    file.write(torch.tensor([3]), x[:1])
    assert torch.equal(file.read(torch.tensor([9, 3, 7])), x[[4, 0, 0]])
    assert file.read(torch.tensor([], dtype=torch.int64)).shape == (0, 2, 3)
    with pytest.raises(InputError, match="ends before"):
        file.read(torch.tensor([10]))


def test_points_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "adversarial.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(InputError, match="cannot be read as adversarial points"):
        AdversarialPoints.load(path)
    save_file({"x": torch.zeros(2, 3)}, path)
    with pytest.raises(InputError, match="holds no adversarial points"):
        AdversarialPoints.load(path)
    save_file({"position": torch.arange(2), "x": torch.zeros(2, 3)}, path, {"kind": "wideberth adversarial points"})
    with pytest.raises(InputError, match="cannot be read as adversarial points"):
        AdversarialPoints.load(path)


def test_no_adversarial_sample_is_a_record_too(tmp_path: Path) -> None:
    model, x, y = problem()
    found = evaluate(model, (x, y), eps=0, suite=LINE_UP, margin=False, examined=False)
    assert Evaluation.load(found.save(tmp_path)).verify(model, (x, y)) == Verification(0, ())


def test_the_command_names_the_altered_points_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = wb.data.Digits(train_rows=200, test_rows=20)
    run = wb.train(wb.models.MLP((1, 8, 8), 10, (16,)), data, epochs=3, out=tmp_path / "run")
    found = evaluate(wb.models.load_model(str(run.path)), data, eps=0.3, suite="pgd", margin=False, examined=False)
    folder = found.save(run.path)
    assert found.adversarial is not None
    assert main(["verify", str(run.path)]) == 0
    assert capsys.readouterr().out == f"{found.verify(wb.models.load_model(str(run.path)))}\n"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["x"][[0, 2]] = -1.0

    altered(folder, change)
    assert main(["verify", str(run.path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    n = len(found.adversarial)
    assert lines[0] == f"{n - 2} of {n} adversarial points agree with the record"
    assert [line.split()[1] for line in lines[1:]] == [str(p) for p in found.adversarial.position[[0, 2]].tolist()]
    assert main(["verify", str(run.path), "--evaluation", folder.name]) == 1
    capsys.readouterr()
    assert main(["verify", str(tmp_path)]) == 2
    assert "holds no evaluation" in capsys.readouterr().err


def test_a_record_with_its_points_can_be_pickled() -> None:
    x, y = torch.rand(12, 5), torch.arange(12) % 2
    found = evaluate(torch.nn.Linear(5, 2), (x, y), eps=0.3, suite="pgd", margin=False, examined=False)
    again = pickle.loads(pickle.dumps(found))
    assert found.adversarial is not None
    assert len(found.adversarial) > 0
    assert torch.equal(again.adversarial.x(), found.adversarial.x())
