"""For processes that have no business without the one that started them. Knows nothing of what they do."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Has the kernel end this process when its parent ends, however that ends, and whatever this one is busy with.

    On Linux only; elsewhere the process must find out by itself. Exits at once where the parent is gone already.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)
