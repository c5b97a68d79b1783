"""Gives a child process memory in large pages, and ends it with its parent. Knows nothing of what either does."""

import ctypes
import os
import signal
import sys

LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Environment of a process with a model: glibc, since 2.35, asks for huge pages where it gets much memory, so that
matrices are packed into them, not moved there (`startup/process_memory.py`). Others do not look at it."""
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent ends, for whatever reason.

    On Linux only; elsewhere the process has to find out by itself. Exits at once if the parent is already gone.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)
