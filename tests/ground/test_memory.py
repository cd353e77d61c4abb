"""What the process does with memory that it freed: seen by the page faults of a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_TWENTY_TIMES = """
import ctypes, resource
from wideberth import memory

print(memory.keep() if {keep} else False)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    block = libc.malloc(2**26)
    libc.memset(block, 1, 2**26)
    libc.free(block)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**26)
"""


def fetched(keep: bool, **variables: str) -> tuple[bool, float]:
    """Whether memory is kept, and how often a block that was allocated twenty times was fetched from the kernel."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    code = _TWENTY_TIMES.format(keep=keep)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True, check=True
    )
    kept, times = done.stdout.split()
    return kept == "True", float(times)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told anything")
def test_freed_memory_is_used_again_instead_of_fetched_again() -> None:
    kept, times = fetched(keep=True)
    if not kept:
        pytest.skip("this C library is not glibc")
    assert times < 2
    assert fetched(keep=False)[1] > 15


def test_what_the_user_has_set_stands() -> None:
    assert fetched(keep=True, MALLOC_TOP_PAD_="4096")[0] is False
    assert fetched(keep=True, GLIBC_TUNABLES="glibc.malloc.arena_max=2:glibc.malloc.trim_threshold=4096")[0] is False
    other = fetched(keep=True, MALLOC_ARENA_MAX="2", GLIBC_TUNABLES="glibc.malloc.arena_max=2")
    assert other[0] is fetched(keep=True)[0]  # neither says what becomes of freed memory
