"""Keyed random numbers: (seed, purpose, sample index, draw) -> the same noise whatever the batch, order or rank.

Nothing here reads or writes a global generator. Each row of a batch owns a stream that is addressed, not
consumed, so a result does not depend on batch size, job order or the number of processes, and a resumed run
continues exactly. The generator is SplitMix64 (Steele, Lea, Flood 2014), written in torch so that it runs where
the data is: the row's key is a hash of everything that names it, element j of the row is `mix(key + j * gamma)`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of an int64 tensor (torch's own keeps the sign)."""
    return (value >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    """SplitMix64's finaliser, int64, worked out in place: a start has as many of them as it has entries."""
    value.bitwise_xor_(_shift(value, 30)).mul_(_signed(_MIX_1))
    value.bitwise_xor_(_shift(value, 27)).mul_(_signed(_MIX_2))
    return value.bitwise_xor_(_shift(value, 31))


def _mix_int(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def fold(seed: int, *words: int | str) -> int:
    """Derive a seed from a seed and the words that name what it is for.

    Arguments are any integers and strings, e.g. `fold(seed, "attack", epoch)`; the result is in [0, 2**63).
    """
    key = _mix_int(seed + _GAMMA)
    for word in words:
        value = int.from_bytes(word.encode(), "little") if isinstance(word, str) else word
        while True:
            key = _mix_int((key ^ (value & _MASK)) + _GAMMA)
            value >>= 64
            if value in (0, -1):
                break
    return key >> 1


@contextmanager
def own_generators(seed: int | None, device: torch.device | None = None) -> Iterator[None]:
    """Run a block whose draws from the global generators leave no trace, and are a function of `seed`.

    The generators of torch on the CPU and on `device`, of Python's `random` and of numpy are seeded on entry and put
    back on exit, also after an error. This is for layers that draw from them, such as dropout; everything of this
    library draws from `Noise`.

    Args:
        seed: any integer from `fold`; None: the block continues from where the generators are.
        device: where the model is, if not on the CPU.
    """
    on_device = device is not None and device.type not in ("cpu", "mps")
    kind = device.type if device is not None and on_device else "cuda"
    python, legacy_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the generator that users share)
    try:
        with torch.random.fork_rng([device] if on_device else [], device_type=kind):
            if seed is not None:
                _seed_generators(seed, device if on_device else None)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy_numpy)  # noqa: NPY002


def _seed_generators(seed: int, device: torch.device | None) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    if device is not None:  # that device alone: `torch.manual_seed` would seed the others too, which are not put back
        module = torch.get_device_module(device)
        with module.device(device) if device.index is not None else nullcontext():
            module.manual_seed(seed)


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """The order of an epoch, (size,) int64: a function of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(fold(seed, "order", epoch))
    return torch.randperm(size, generator=generator)


@dataclass(frozen=True)
class Noise:
    """One random stream per row of a batch, addressed by (seed, purpose, index, draw).

    Attributes:
        index: (B,) int64, what names each row (its data-set index, as a rule).
        seed: any integer; use `fold` to derive one per epoch, restart or rank-independent purpose.
        draw: which draw of the row's stream this is: a number, or (B,) int64 where rows stand at different steps.
    """

    index: Tensor
    seed: int = 0
    draw: int | Tensor = 0

    def at(self, draw: int | Tensor) -> Noise:
        """The same streams at another draw."""
        return replace(self, draw=draw)

    def then(self, step: Tensor) -> Noise:
        """The streams of the rows' runs or iterations, (B,) int64 >= 0; those of step 0 are where they stand."""
        draw = torch.as_tensor(self.draw, device=self.index.device)
        further = _mix(draw * _signed(_GAMMA) + step + _signed(_MIX_1))
        return replace(self, draw=torch.where(step == 0, draw, further))

    def rows(self, where: Tensor) -> Noise:
        """The streams of some of the rows (bool or indices)."""
        return Noise(self.index[where], self.seed, self.draw[where] if isinstance(self.draw, Tensor) else self.draw)

    def fold(self, *words: int | str) -> Noise:
        """The streams of another purpose."""
        return replace(self, seed=fold(self.seed, *words))

    def bits(self, shape: Sequence[int]) -> Tensor:
        """(B, *shape) int64, uniform over all 64 bits."""
        count = math.prod(shape)
        key = _mix(self.index.to(torch.int64) * _signed(_GAMMA) + _signed(_mix_int(self.seed)))
        key = _mix((key ^ self.draw) * _signed(_MIX_2) + _signed(_GAMMA))
        counter = torch.arange(1, count + 1, device=key.device, dtype=torch.int64) * _signed(_GAMMA)
        return _mix(key[:, None] + counter).view(len(key), *shape)

    def uniform(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, *shape) in [0, 1), with as many random bits as the dtype holds (53 in float64, 24 in float32)."""
        digits = 1 - int(math.log2(torch.finfo(dtype).eps))
        return _shift(self.bits(shape), 64 - digits).to(dtype).mul_(2.0**-digits)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, *shape) standard normal, by Box and Muller from two uniforms of one draw."""
        working = torch.promote_types(dtype, torch.float32)
        pair = self.uniform((2, *shape), working)
        radius = torch.sqrt(-2 * torch.log1p(-pair[:, 0]))
        return (radius * torch.cos(2 * math.pi * pair[:, 1])).to(dtype)

    def sign(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, *shape) of -1 and +1, each with probability one half."""
        return (_shift(self.bits(shape), 63) * 2 - 1).to(dtype)

    def integer(self, high: int, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) int64, uniform in 0..high-1 (high up to 2**24)."""
        return (self.uniform(shape, torch.float64) * high).to(torch.int64)
