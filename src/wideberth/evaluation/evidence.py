"""The adversarial points behind a verdict: kept in a file, read and written a few rows at a time."""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wideberth.checks import InputError
from wideberth.evaluation import shards
from wideberth.runs import write_atomically

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""What a safetensors file calls the dtypes that inputs may have."""
_ROWS_AT_A_TIME = 64
_KIND = "wideberth adversarial points"


class RowFile:
    """Tensors of one shape and dtype in a file, addressed by row number.

    Ordinary reads and writes, not a memory map: pages of a map count as memory of the process. A row that was never
    written takes no room on file systems with sparse files.

    Args:
        file: open for reading (and writing, if rows are to be written), unbuffered.
        shape: of one row.
        dtype: of all rows; float64, float32, float16 or bfloat16.
        offset: bytes before row 0.

    Raises:
        InputError: for another dtype.
    """

    def __init__(self, file: FileIO, shape: Sequence[int], dtype: torch.dtype, offset: int = 0) -> None:
        if dtype not in _DTYPES:
            raise InputError(f"x is {dtype}: adversarial points are stored in {', '.join(map(str, _DTYPES))}")
        self.file, self.shape, self.dtype, self.offset = file, tuple(shape), dtype, offset
        self.row_bytes = math.prod(self.shape) * dtype.itemsize
        weakref.finalize(self, file.close)

    @classmethod
    def temporary(cls, shape: Sequence[int], dtype: torch.dtype) -> RowFile:
        """In a file without a name, which vanishes with the object."""
        handle, name = tempfile.mkstemp(prefix="wideberth-points-")
        Path(name).unlink()
        return cls(FileIO(handle, "r+"), shape, dtype)

    @classmethod
    def at(cls, path: Path, shape: Sequence[int], dtype: torch.dtype) -> RowFile:
        """In a file of this name, with the rows that it holds already; made where there is none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return cls(FileIO(path, "r+"), shape, dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy by content: a pickle holds the bytes of all rows."""
        self.file.seek(self.offset)
        return _from_bytes, (self.file.readall(), self.shape, self.dtype)

    def write(self, rows: Tensor, x: Tensor) -> None:
        """Store x (B, ...) as the rows (B,)."""
        data = as_bytes(x.to(self.dtype))
        for place, row in enumerate(rows.tolist()):
            self.file.seek(self.offset + row * self.row_bytes)
            _write_all(self.file, data[place].numpy().tobytes())

    def read(self, rows: Tensor) -> Tensor:
        """The rows (B,), as a tensor (B, ...) on the CPU.

        Raises:
            InputError: where the file ends before a row.
        """
        data = bytearray(len(rows) * self.row_bytes)
        view = memoryview(data)
        for place, row in enumerate(rows.tolist()):
            self.file.seek(self.offset + row * self.row_bytes)
            _read_all(self.file, view[place * self.row_bytes : (place + 1) * self.row_bytes])
        if not data:
            return torch.zeros((len(rows), *self.shape), dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).view(len(rows), *self.shape)

    def copy_rows(self, other: RowFile, rows: Tensor) -> None:
        """Take these rows (n,) over from another file, a few at a time."""
        for part in rows.split(_ROWS_AT_A_TIME):  # type: ignore[no-untyped-call]
            self.write(part, other.read(part))

    def flush(self) -> None:
        """Have the operating system put on disk what was written."""
        os.fsync(self.file.fileno())


def _from_bytes(data: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> RowFile:
    rows = RowFile.temporary(shape, dtype)
    _write_all(rows.file, data)
    return rows


def as_bytes(x: Tensor) -> Tensor:
    """Rows x (B, ...) as their bytes, (B, n) uint8 on the CPU."""
    return x.detach().cpu().flatten(1).contiguous().view(torch.uint8)


def _write_all(file: FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _read_all(file: FileIO, view: memoryview) -> None:
    while view:
        if not (got := file.readinto(view)):
            raise InputError(f"{str(file.name)!r}: ends before the adversarial points that it should hold")
        view = view[got:]


@dataclass(frozen=True, eq=False)
class AdversarialPoints:
    """One adversarial point for each sample that was found adversarial, in the order of their positions.

    Attributes:
        position: (n,) int64, the samples' positions in the data.
        index: (n,) int64, what the data call them.
        clean_hash: (n,) int64, a hash of each clean input's bytes (see `row_hashes`).
        slot: (n,) int64, the row of the file that holds each point.
        file: where the points are.
    """

    position: Tensor
    index: Tensor
    clean_hash: Tensor
    slot: Tensor
    file: RowFile

    def __len__(self) -> int:
        return len(self.position)

    def __deepcopy__(self, memo: dict[int, Any]) -> AdversarialPoints:
        """Itself: nothing changes it, and an open file cannot be copied."""
        return self

    def x(self, rows: Tensor | None = None) -> Tensor:
        """The points of these rows (default: of all), (B, ...) on the CPU in the dtype of the inputs."""
        return self.file.read(self.slot if rows is None else self.slot[rows])

    def save(self, path: str | Path) -> None:
        """Write a safetensors file of `position`, `index`, `clean_hash` (n,) int64 and `x` (n, ...), atomically.

        The points pass through memory a few at a time.
        """
        write_atomically(Path(path), self._write)

    def _write(self, path: Path) -> None:
        names = {"position": self.position, "index": self.index, "clean_hash": self.clean_hash}
        header: dict[str, Any] = {"__metadata__": {"kind": _KIND, "version": "1"}}
        end = 0
        for name, values in names.items():
            header[name] = {"dtype": "I64", "shape": [len(values)], "data_offsets": [end, end + 8 * len(values)]}
            end += 8 * len(values)
        shape = [len(self), *self.file.shape]
        offsets = [end, end + len(self) * self.file.row_bytes]
        header["x"] = {"dtype": _DTYPES[self.file.dtype], "shape": shape, "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for values in names.values():
                file.write(values.numpy().astype("<i8").tobytes())
            for rows in torch.arange(len(self)).split(_ROWS_AT_A_TIME):  # type: ignore[no-untyped-call]
                file.write(as_bytes(self.x(rows)).numpy().tobytes())

    @classmethod
    def load(cls, path: str | Path) -> AdversarialPoints:
        """Open what `save` wrote; points are read when they are asked for.

        Raises:
            InputError: where the file cannot be read, or holds something else.
        """
        path = Path(path)
        try:
            with safe_open(path, "pt") as file:  # refuses headers that lie about the size
                if (file.metadata() or {}).get("kind") != _KIND:
                    raise InputError(f"{str(path)!r}: holds no adversarial points")
                values = {name: file.get_tensor(name).clone() for name in ("position", "index", "clean_hash")}
            rows = FileIO(path)
            (size,) = struct.unpack("<Q", rows.read(8))
            about = json.loads(rows.read(size))["x"]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{str(path)!r}: cannot be read as adversarial points ({error})") from error
        dtype = next((kind for kind, name in _DTYPES.items() if name == about["dtype"]), None)
        n = len(values["position"])
        if dtype is None or about["shape"][:1] != [n] or any(v.shape != (n,) for v in values.values()):
            raise InputError(f"{str(path)!r}: holds {about['dtype']} of shape {about['shape']} for {n} positions")
        points = RowFile(rows, about["shape"][1:], dtype, 8 + size + about["data_offsets"][0])
        return cls(**values, slot=torch.arange(n), file=points)


def gather_points(mine: AdversarialPoints) -> AdversarialPoints:
    """The points of all processes, in the order of their positions; every process gets them all, a few at a time."""
    if shards.mine()[1] == 1:
        return mine
    about = shards.gathered((mine.position, mine.index, mine.clean_hash))
    position, index, clean_hash = (torch.cat(parts) for parts in zip(*about, strict=True))
    firsts = [0, *torch.tensor([len(part[0]) for part in about]).cumsum(0).tolist()]
    together = RowFile.temporary(mine.file.shape, mine.file.dtype)
    for begin in range(0, max(len(part[0]) for part in about), _ROWS_AT_A_TIME):
        rows = torch.arange(begin, max(begin, min(begin + _ROWS_AT_A_TIME, len(mine))))
        for first, points in zip(firsts, shards.gathered(mine.x(rows)), strict=False):
            together.write(torch.arange(first + begin, first + begin + len(points)), points)
    order = position.argsort(stable=True)
    return AdversarialPoints(position[order], index[order], clean_hash[order], order, together)
