"""A damaged file of a run is named in one line: never another result in silence, and nothing else is lost for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import wideberth as wb
from wideberth import runs
from wideberth.checksums import SEAL
from wideberth.cli import main
from wideberth.evaluation import Evaluation
from wideberth.runs import Run

TRAIN = (
    "--config=digits/iaat",
    "--radius.warmup=0",
    "--attack.steps=1",
    "--model.width=4",
    "--data.train_rows=160",
    "--data.validation=32",
    "--keep=best",
    "--progress=false",
)
EVALUATE = ("--data=Digits", "--norm=linf", "--eps=0.1", "--rows=4", "--suite=pgd", "--progress=false")
PLACES = (0, 0.01, 0.25, 0.5, 0.75, 0.99, 1)
NEEDED = ("metrics.csv", "radii.parquet", "export.json", "checkpoints/best.ckpt")
"""What `train --resume` needs beside config.yaml and last.ckpt."""
RECORDS = {**runs.RECORDS, "evaluation.json": "evaluation", "evaluation.parquet": "evaluation_samples"}
"""The records that reports read, and the properties of `Run` that read them."""
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "noise": lambda content: bytes(byte ^ 0x5A for byte in content),
}


@pytest.fixture(scope="session")
def judged_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished and evaluated run that holds every kind of file; do not write into it."""
    out = tmp_path_factory.mktemp("runs") / "judged"
    assert main(["train", *TRAIN, "--epochs=2", "--out", str(out)]) == 0
    data = wb.data.Digits(test_rows=24)
    wb.evaluate(wb.load_model(str(out)), data, eps=0.1, suite="pgd", examined=False).save(out)
    return out


@pytest.fixture
def copied(judged_run: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(judged_run, tmp_path / "run")
    return tmp_path / "run"


def path_of(run: Path, record: str) -> Path:
    """Where a record is: those of the one evaluation are in a folder of their own."""
    return next((run / "evaluations").glob(f"*/{record}")) if record.startswith("evaluation") else run / record


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def flip(file: Path, place: float) -> None:
    """Change one bit, at a share of the file's length."""
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x01
    file.write_bytes(content)


def names(err: str, file: Path) -> None:
    """What was printed is one line, and names the file."""
    assert len(err.strip().splitlines()) == 1, err
    assert str(file) in err
    assert len(err) < 420


# ---- what resume needs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["config.yaml", *NEEDED, "checkpoints/last.ckpt"])
def test_resume_reads_what_it_needs_before_it_removes_anything(file: str, damage: str, copied: Path, wideberth) -> None:
    if file.endswith("last.ckpt"):  # else the run goes on from another
        for other in ("previous", "best"):
            (copied / "checkpoints" / f"{other}.ckpt").unlink(missing_ok=True)
    (copied / file).write_bytes(DAMAGE[damage]((copied / file).read_bytes()))
    before = contents(copied)
    code, out, err = wideberth("train", *TRAIN, "--epochs=3", "--out", copied, "--resume")
    assert (code, out) == (2, "")
    names(err, copied / file)
    assert contents(copied) == before


@pytest.mark.parametrize("change", [(b"epoch", b"apoch"), (b"\n0,", b"\nx,"), (b"loss", b"\xffoss")])
def test_one_bad_byte_in_the_metrics(change: tuple[bytes, bytes], copied: Path, wideberth) -> None:
    content = (copied / "metrics.csv").read_bytes()
    assert change[0] in content
    (copied / "metrics.csv").write_bytes(content.replace(*change, 1))
    (copied / "checksums.txt").unlink(missing_ok=True)  # a run of version 0.1 has none
    before = contents(copied)
    code, _, err = wideberth("train", *TRAIN, "--epochs=3", "--out", copied, "--resume")
    assert code == 2
    names(err, copied / "metrics.csv")
    assert contents(copied) == before


@pytest.mark.parametrize("file", NEEDED)
def test_resume_refuses_a_bit_that_changed(file: str, copied: Path, wideberth) -> None:
    whole = (copied / file).read_bytes()
    for place in PLACES:
        flip(copied / file, place)
        code, out, err = wideberth("train", *TRAIN, "--epochs=3", "--out", copied, "--resume")
        assert (code, out) == (2, ""), place
        names(err, copied / file)
        (copied / file).write_bytes(whole)


@pytest.mark.parametrize("place", [0, 0.3, 0.6, 1])
def test_a_damaged_last_checkpoint_is_said_and_the_one_before_taken(place: float, copied: Path, wideberth) -> None:
    straight = copied.with_name("straight")
    shutil.copytree(copied, straight)
    flip(copied / "checkpoints" / "last.ckpt", place)
    code, _, err = wideberth("train", *TRAIN, "--epochs=3", "--out", copied, "--resume")
    assert code == 0, err
    names(err, copied / "checkpoints" / "last.ckpt")
    assert "training goes on from" in err
    assert wideberth("train", *TRAIN, "--epochs=3", "--out", straight, "--resume")[0] == 0
    for file in ("model.safetensors", "samples.parquet"):
        assert (copied / file).read_bytes() == (straight / file).read_bytes()


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["model.safetensors", *(f"checkpoints/{name}.ckpt" for name in ("last", "previous", "best"))]
)
def test_damaged_weights_are_not_judged(file: str, copied: Path, wideberth) -> None:
    whole = (copied / file).read_bytes()
    model = copied if file == "model.safetensors" else copied / file
    before = contents(copied)
    for place in PLACES:
        flip(copied / file, place)
        for command, options in (("evaluate", EVALUATE), ("margins", ("--data=Digits", "--rows=4"))):
            code, out, err = wideberth(command, model, *options)
            assert (code, out) == (2, ""), place
            names(err, copied / file)
        (copied / file).write_bytes(whole)
    assert contents(copied) == before


def test_weights_are_checked_wherever_they_were_copied(copied: Path, wideberth) -> None:
    copy = Path("copy.safetensors")
    words = ("margins", "ConvNet(shape=(1, 8, 8), width=4)", "--data=Digits", "--rows=4", "--weights", copy)
    for place in PLACES:
        shutil.copyfile(copied / "model.safetensors", copy)
        flip(copy, place)
        code, out, err = wideberth(*words)
        assert (code, out) == (2, ""), place
        names(err, copy)
    shutil.copyfile(copied / "model.safetensors", copy)
    code, _, err = wideberth(*words)
    assert code == 0, err
    assert SEAL.encode() in copy.read_bytes()


# ---- reports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", RECORDS)
def test_a_record_is_not_read_with_a_bit_that_changed(file: str, copied: Path) -> None:
    whole = (path_of(copied, file)).read_bytes()
    run = Run(copied)
    for place in PLACES:
        flip(path_of(copied, file), place)
        with pytest.raises(wb.InputError, match=file):
            getattr(run, RECORDS[file])
        if file.startswith("evaluation"):
            with pytest.raises(wb.InputError, match=file):
                Evaluation.load(copied)
        (path_of(copied, file)).write_bytes(whole)
    assert run.leave_out_damaged() == []
    assert getattr(run, RECORDS[file]) is not None


def test_reports_name_damaged_records_and_go_on_without_them(copied: Path, wideberth) -> None:
    for file in RECORDS:
        if file != "evaluation.json":
            flip(path_of(copied, file), 0.5)
    without = copied.with_name("without") / "run"
    shutil.copytree(copied, without)
    for command, *options in (("report", "--out", "report.html"), ("compare", "--out", "plot.png")):
        code, _, err = wideberth(command, copied, *options)
        assert code == 0, err
        for line, file in zip(err.splitlines(), [file for file in RECORDS if file != "evaluation.json"], strict=True):
            assert line.startswith("left out: ")
            names(line, path_of(copied, file))
        assert Path(options[1]).stat().st_size > 1000
    page = Path("report.html").read_text()
    for file in RECORDS:
        if file != "evaluation.json":
            (path_of(without, file)).unlink()
    assert wideberth("report", without, "--out", "report.html")[2] == ""
    assert Path("report.html").read_text() == page
    # Without a verdict there is a report and nothing to compare.
    flip(path_of(copied, "evaluation.json"), 0.5)
    assert wideberth("report", copied)[0] == 0
    code, out, err = wideberth("compare", copied)
    assert (code, out) == (2, "")
    names(err, path_of(copied, "evaluation.json"))


def test_what_people_may_edit_is_not_called_damaged(copied: Path, wideberth) -> None:
    config, metrics = copied / "config.yaml", copied / "metrics.csv"
    config.write_text("# my best run\n" + config.read_text())
    metrics.write_bytes(metrics.read_bytes().replace(b"\n", b"\r\n"))
    (line,) = Run(copied).leave_out_damaged()
    names(line, metrics)
    # Taken as it is when its lines are removed.
    log = copied / "checksums.txt"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if "metrics.csv" not in line))
    assert len(Run(copied).metrics) == 2
    code, _, err = wideberth("train", *TRAIN, "--epochs=3", "--out", copied, "--resume")
    assert code == 0, err
