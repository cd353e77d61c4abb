"""Checksums: whatever single bit changes, a file is refused or reads as it was; and a good file is never refused."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from wideberth import InputError, checksums
from wideberth.models import load_weights, save_weights
from wideberth.runs import read_json, write_atomically, write_record

CONTENT = {"epoch": 3, "keep": "best", "ended": None}


def record(file: Path, content: Any = CONTENT) -> None:
    write_record(file, lambda temporary: temporary.write_text(json.dumps(content)))


def one_bit_at_a_time(file: Path, read: Callable[[], Any]) -> tuple[int, int]:
    """Flip every ninth bit of a file in turn; how often it was refused, and how often read as it was."""
    whole, same = file.read_bytes(), 0
    refusals: list[str] = []
    wanted = read()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            assert read() == wanted, f"byte {place} of {len(whole)}: another content was read"
            same += 1
        except InputError as error:
            refusals.append(str(error))
    file.write_bytes(whole)
    assert not [line for line in refusals if "\n" in line or str(file.parent) not in line]
    return len(refusals), same


# ---- records --------------------------------------------------------------------------------------------------------


def test_any_bit_of_a_record_that_changes_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "export.json"
    record(file)
    assert one_bit_at_a_time(file, lambda: read_json(file)) == (len(json.dumps(CONTENT)), 0)


def test_a_damaged_checksum_refuses_a_good_file_at_most(tmp_path: Path) -> None:
    file = tmp_path / "export.json"
    record(file)
    refused, same = one_bit_at_a_time(tmp_path / "checksums.txt", lambda: read_json(file))
    assert refused > 10  # of another digest
    assert same > 10  # of a line that is none


def test_the_form_is_that_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "abc.json").write_bytes(b"")
    record(tmp_path / "other.json", {})
    first = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a  other.json\n"
    assert (tmp_path / "checksums.txt").read_text() == first
    record(tmp_path / "other.json", {})
    assert (tmp_path / "checksums.txt").read_text() == first
    record(tmp_path / "other.json", [])
    assert (tmp_path / "checksums.txt").read_text().count("  other.json\n") == 2


def test_files_without_a_checksum_are_read(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "old.json") == {"a": 1}
    record(tmp_path / "new.json")
    assert read_json(tmp_path / "old.json") == {"a": 1}
    record(tmp_path / "old.json")
    (tmp_path / "old.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match=r"old.json': is damaged, or was changed"):
        read_json(tmp_path / "old.json")


def test_a_file_may_be_copied_over_another_of_the_directory(tmp_path: Path) -> None:
    record(tmp_path / "best.json", {"a": 1})
    record(tmp_path / "last.json", {"a": 2})
    (tmp_path / "last.json").write_bytes((tmp_path / "best.json").read_bytes())
    assert read_json(tmp_path / "last.json") == {"a": 1}


@pytest.mark.parametrize("where", ["replace", "note"])
def test_what_was_there_is_good_if_writing_ends_early(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "export.json"
    record(file, {"a": 1})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*{"replace": (Path, "replace"), "note": (checksums, "note")}[where], full)
        with pytest.raises(OSError, match="No space"):
            record(file, {"a": 2})
    assert read_json(file) == {"a": 1}
    record(file, {"a": 3})
    assert read_json(file) == {"a": 3}


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    record(tmp_path / "a.json")
    with (tmp_path / "checksums.txt").open("a") as log:
        log.write("0123456789abcdef")
    record(tmp_path / "b.json")
    for name in ("a.json", "b.json"):
        assert read_json(tmp_path / name) == CONTENT
        (tmp_path / name).write_text("{}")
        with pytest.raises(InputError, match=name):
            read_json(tmp_path / name)


def test_many_write_and_read_at_once(tmp_path: Path) -> None:
    """The files of two evaluations and of a training, in one directory: none is refused at any time."""
    failures: list[BaseException] = []

    def write(name: str, writer: int) -> None:
        try:
            for turn in range(20):
                file = tmp_path / name
                content = json.dumps([writer, turn])
                # As `write_record`, under a name that two threads of one process do not share.
                temporary = tmp_path / f".{name}.{writer}"
                temporary.write_text(content)
                checksums.note(file, checksums.digest(temporary))
                temporary.replace(file)
                assert checksums.verified(file) is not None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(f"{i % 2}.json", i)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len((tmp_path / "checksums.txt").read_text().splitlines()) == 120


# ---- safetensors ----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two names of one weight, and names beyond ASCII."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.second.bias = self.first.bias
        self.register_buffer("größe", torch.arange(3))


def test_any_bit_of_weights_that_changes_is_seen(tmp_path: Path) -> None:
    file, model, empty = tmp_path / "model.safetensors", Tied(), Tied()
    save_weights(model, file)

    def read() -> list[float]:
        with torch.no_grad():
            for value in empty.state_dict().values():
                value.zero_()
        load_weights(empty, file)
        return [float(number) for value in empty.state_dict().values() for number in value.flatten()]

    assert read() == [float(number) for value in model.state_dict().values() for number in value.flatten()]
    refused, same = one_bit_at_a_time(file, read)
    # Only in spaces, and in the name of the checksum itself, may a bit change nothing that is read.
    assert same <= len(checksums.SEAL) + 8
    assert refused > 400


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    for name in "abcd":
        torch.manual_seed(0)
        save_weights(Tied(), tmp_path / f"{name}.safetensors")
    assert len({file.read_bytes() for file in tmp_path.glob("*.safetensors")}) == 1


def test_a_seal_leaves_the_rest_of_the_file_alone(tmp_path: Path) -> None:
    file, tensors = tmp_path / "state.safetensors", {"b": torch.rand(3, 2), "a": torch.arange(5), "c": torch.zeros(0)}
    write_atomically(file, lambda temporary: save_file(tensors, temporary, {"about": "é\n"} | checksums.UNSEALED))
    assert not checksums.sound(file)  # while it is being written
    checksums.seal(file)
    assert checksums.sound(file)
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(file).items())
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["about"] == "é\n"
    assert len(metadata[checksums.SEAL]) == 64


def test_weights_from_elsewhere_have_no_seal_and_load(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    for name, metadata in (("plain", None), ("other", {"format": "pt"})):
        file = tmp_path / f"{name}.safetensors"
        save_file(dict(model.state_dict()), file, metadata)
        assert checksums.sound(file)
        load_weights(model, file)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"{]"])
def test_what_is_no_safetensors_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"model.safetensors': cannot be read"):
        load_weights(nn.Linear(2, 3), file)
