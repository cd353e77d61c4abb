"""Memory that the process keeps: what is freed is used again, not given back and fetched anew.

A training step or an attack allocates the same megabytes over and over. glibc gives large ones back to the kernel as
soon as they are free, and the kernel clears every page that it hands out again: where that is dear, it takes a third of
the time of a small network on a CPU, and more of a method whose passes hold much at once than of one that does not.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""What glibc's `mallopt` calls them."""
_TUNED = ("trim_threshold", "top_pad", "mmap_threshold", "mmap_max")
"""What a user may have set: these or one that would take effect beside them."""
_NEVER = -1
_LARGEST = (2**30, 2**25)
"""Bytes up to which a block comes from the memory that is kept; glibc before 2.35 takes no more than the second."""
_AHEAD = 2**26
"""Bytes that are asked for beyond those needed, so that growing is rare; untouched, they take no room."""


def keep() -> bool:
    """Have glibc keep freed memory for the rest of the process; returns whether it took the order.

    The command line calls this. A library has no business to: call it yourself, early, in a script of your own that
    trains or attacks on a CPU. The process then stays about as large as it ever was until it ends, and may become
    larger than it would have: small blocks that live on keep gaps below them.

    Nothing is said where the user has told glibc what to do, by `MALLOC_TOP_PAD_` and its like or by `GLIBC_TUNABLES`.
    Under another allocator that was loaded in glibc's place, it changes nothing.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    told = any(f"MALLOC_{name.upper()}_" in os.environ or f"glibc.malloc.{name}" in tunables for name in _TUNED)
    if told or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    # This first: without it the other two would do harm, since any of them ends glibc's own adapting.
    if not any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _NEVER)) & bool(mallopt(_TOP_PAD, _AHEAD))
