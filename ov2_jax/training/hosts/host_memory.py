"""Keeps a CPU step's memory with the process."""

import ctypes
import os

# Of mallopt(3): malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Makes malloc reuse freed memory and never return it to the system; needs glibc.

    On a CPU, XLA allocates a step's temporaries anew each time. The system would take these
    gigabytes back and zero them for the next step: a fifth of a small model's step, and up to half
    of it on a virtual machine that returns free memory to its host.
    """
    if os.name != "posix" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    # One arena: that of another thread cannot grow as large, and would map each array separately.
    libc.mallopt(_M_ARENA_MAX, 1)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # as a size: the largest
