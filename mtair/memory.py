"""How the C library treats memory that comes and goes in blocks of megabytes."""

import ctypes
import sys


def keep_freed_memory(most: int = 512 << 20) -> None:
    """Let glibc keep up to `most` bytes (below 2 GiB) of what is freed for whatever comes next.

    Before the thread of the network starts. By default glibc returns blocks of megabytes to the
    kernel, and threads beside the first one allocate from small heaps of their own that come and
    go: every layer of every tile, and every step of a training, then faults its pages in anew
    (https://man7.org/linux/man-pages/man3/mallopt.3.html).
    """
    if sys.platform != "linux":
        return
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is not None:
        mallopt(arena_max, 1)
        # One of these two alone would fix the other at its 128 KiB.
        mallopt(trim_threshold, most)
        mallopt(mmap_threshold, 32 << 20)  # the largest that it takes
