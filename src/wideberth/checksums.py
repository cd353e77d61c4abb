"""Checksums of the files of a run: what was damaged is refused by name, and never read as something else.

Every directory with such files holds a checksums.txt with lines as `sha256sum` writes them, "digest  name". A line is
appended *before* its file is moved into place, and lines are never changed: so whatever is killed when, and whichever
processes write at once, the file that is there has its line. Several lines of one name are its versions; a file is
sound where its digest stands in any line, since files are also copied and renamed (last.ckpt becomes previous.ckpt).

Safetensors files carry their checksum in their header instead, so that it goes where they go.

Files without a checksum, as those that version 0.1 wrote or that come from elsewhere, are read unchecked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

from wideberth.checks import InputError

NAME = "checksums.txt"
SEAL = "wideberth.sha256"
"""The entry of a safetensors file's metadata that holds its checksum."""
UNSEALED = {SEAL: "0" * 64}
"""What that entry is while the file is written: room for what `seal` puts there."""
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def note(file: Path, known: str) -> None:
    """Append the digest of what is about to be moved to `file`, and have it on the disk before that is."""
    if (known, file.name) in _noted(file):
        return
    with file.with_name(NAME).open("a+b") as log:
        if log.tell():
            log.seek(-1, os.SEEK_END)
        # A line that was cut short by a full disk must not spoil this one.
        gap = b"" if log.read(1) in (b"", b"\n") else b"\n"
        log.write(gap + f"{known}  {file.name}\n".encode())
        log.flush()
        os.fsync(log.fileno())


def verified(file: Path) -> str | None:
    """The digest of a file that is as it was written; None where it has no checksum.

    Raises:
        InputError: where it has one, and is not as it was written.
    """
    if file.name not in (name for _, name in _noted(file)):
        return None
    found = digest(file)
    # Read again: another process may have written the file in between.
    if found not in (known for known, _ in _noted(file)):
        raise InputError(f"{str(file)!r}: is damaged, or was changed since it was written ({NAME} beside it tells)")
    return found


def _noted(file: Path) -> list[tuple[str, str]]:
    """The digests and names in the directory of a file."""
    log = file.with_name(NAME)
    if not log.is_file():
        return []
    lines = (_LINE.fullmatch(line) for line in log.read_text(errors="replace").splitlines())
    return [(line[1], line[2]) for line in lines if line]


def seal(file: Path) -> None:
    """Put the checksum into a safetensors file that was written with `UNSEALED` in its metadata, in place."""
    with file.open("r+b") as opened:
        header, size = _header(opened)
        header["__metadata__"][SEAL] = _content(header, opened)
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the library writes its header as compactly"
        opened.seek(8)
        opened.write(text.ljust(size))


def sound(file: Path) -> bool:
    """Whether a safetensors file is as it was sealed; True where it was not, and where its header cannot be read."""
    with file.open("rb") as opened:
        try:
            header, _ = _header(opened)
        except ValueError:  # for the library to refuse
            return True
        metadata = header.get("__metadata__")
        known = metadata.get(SEAL) if isinstance(metadata, dict) else None
        return known is None or known == _content(header, opened)


def _header(opened: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and its size in bytes; the tensors come next.

    Raises:
        ValueError: where it cannot be read.
    """
    size = int.from_bytes(opened.read(8), "little")
    if size > os.fstat(opened.fileno()).st_size:
        raise ValueError("the header is longer than the file")
    header = json.loads(opened.read(size))
    if not isinstance(header, dict):
        raise ValueError("the header holds no names")
    return header, size


def _content(header: dict[str, Any], opened: BinaryIO) -> str:
    """The digest of names, shapes, types and metadata but the checksum, and of all tensors, which come next."""
    metadata = {name: value for name, value in header["__metadata__"].items() if name != SEAL}
    parts = hashlib.sha256(json.dumps(header | {"__metadata__": metadata}, sort_keys=True).encode())
    while chunk := opened.read(1 << 20):
        parts.update(chunk)
    return parts.hexdigest()
