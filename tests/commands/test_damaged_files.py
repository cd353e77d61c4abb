"""A damaged file of a run is named in one line, and nothing else is lost or changed for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from wideberth.cli import main

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


@pytest.fixture(scope="session")
def judged_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished and evaluated run that holds every kind of file; do not write into it."""
    out = tmp_path_factory.mktemp("runs") / "judged"
    assert main(["train", *TRAIN, "--epochs=2", "--out", str(out)]) == 0
    words = ("--norm=linf", "--eps=0.1", "--rows=24", "--suite=pgd", "--progress=false")
    assert main(["evaluate", str(out), *words]) == 0
    assert main(["margins", str(out), "--rows=24"]) == 0
    assert main(["report", str(out)]) == 0
    return out


@pytest.fixture
def copied(judged_run: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(judged_run, tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "noise": lambda content: bytes(byte ^ 0x5A for byte in content),
}
NEEDED = (
    "config.yaml",
    "metrics.csv",
    "radii.parquet",
    "export.json",
    "checkpoints/last.ckpt",
    "checkpoints/best.ckpt",
)


@pytest.mark.parametrize("damage", ["empty", "noise"])
@pytest.mark.parametrize("file", NEEDED)
def test_resume_reads_what_it_needs_before_it_removes_anything(file: str, damage: str, copied: Path, wideberth) -> None:
    (copied / file).write_bytes(DAMAGE[damage]((copied / file).read_bytes()))
    before = contents(copied)
    code, out, err = wideberth("train", *TRAIN, "--epochs=3", "--out", copied, "--resume")
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1, err
    assert str(copied / file) in err
    assert err.isascii() or "\ufffd" in err
    assert contents(copied) == before


@pytest.mark.parametrize("change", [(b"epoch", b"apoch"), (b"\n0,", b"\nx,"), (b"loss", b"\xffoss")])
def test_one_bad_byte_in_the_metrics(change: tuple[bytes, bytes], copied: Path, wideberth) -> None:
    content = (copied / "metrics.csv").read_bytes()
    assert change[0] in content
    (copied / "metrics.csv").write_bytes(content.replace(*change, 1))
    before = contents(copied)
    code, _, err = wideberth("train", *TRAIN, "--epochs=3", "--out", copied, "--resume")
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert str(copied / "metrics.csv") in err
    assert contents(copied) == before
