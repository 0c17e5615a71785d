"""glibc's allocator for work on a CPU: freed memory is kept for the next step and not given back to the kernel.

A training step allocates the same large tensors every time, and by default each of them is mapped, zeroed page by page
and unmapped again: DIN over 512 rows spent more time in the kernel than in arithmetic (88 s against 39 s, one thread).
A service's forwards are such steps too.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of malloc.h
_KEPT_BYTES, _STEP_BYTES = 2**31 - 1, 2**28


def keep_freed_memory() -> bool:
    """Tell the allocator of this process; true if it listened. Does nothing where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl has none
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_TOP_PAD, _STEP_BYTES))
    return all(mallopt(option, value) == 1 for option, value in settings)
