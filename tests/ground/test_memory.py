"""What the process does with memory that it freed: seen by the page faults of a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="only glibc is told anything"
)

_AGAIN_AND_AGAIN = """
import ctypes, resource
from wideberth import memory

print(memory.keep() if {keep} else False)
libc = ctypes.CDLL(None)
libc.prctl(41, 1, 0, 0, 0)  # no huge pages: what is counted are small ones
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):  # as in a training step, much is held at once and then let go: far more than is asked for ahead
    blocks = [libc.malloc(2**23) for _ in range(32)]
    for block in blocks:
        libc.memset(block, 1, 2**23)
    for block in blocks:
        libc.free(block)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**28)
"""


def fetched(keep: bool, **variables: str) -> tuple[bool, float]:
    """Whether memory is kept, and how often what was allocated ten times was fetched from the kernel."""
    others = ("MALLOC_", "GLIBC_", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    code = _AGAIN_AND_AGAIN.format(keep=keep)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True, check=True
    )
    kept, times = done.stdout.split()
    return kept == "True", float(times)


def test_freed_memory_is_used_again_instead_of_fetched_again() -> None:
    kept, times = fetched(keep=True)
    assert kept
    assert times < 2
    assert fetched(keep=False)[1] > 7


def test_what_the_user_has_set_stands() -> None:
    assert fetched(keep=True, MALLOC_TOP_PAD_="4096")[0] is False
    assert fetched(keep=True, GLIBC_TUNABLES="glibc.malloc.arena_max=2:glibc.malloc.trim_threshold=4096")[0] is False
    # Neither of these says what becomes of freed memory.
    assert fetched(keep=True, MALLOC_ARENA_MAX="2", GLIBC_TUNABLES="glibc.malloc.arena_max=2")[0] is True
