"""Runs one program that a model has written, in this process, without network and with little of everything else.

`python -I -S program_child.py` reads a JSON object from its input: the program's `source`, the limits, and a `word`
that it writes at the end of a program that ran through. Imports nothing of ours: it has to start quickly.
"""

import ctypes
import json
import os
import resource
import signal
import sys

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG = 1
NO_ISOLATION = 3
"""Exit code where no network namespace can be made."""


def main() -> int:
    """Returns the exit code; an error of the program is its own traceback."""
    task = json.load(sys.stdin)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
        return NO_ISOLATION
    for limit, value in task["limits"].items():
        resource.setrlimit(getattr(resource, limit), (value, value))
    # What the program writes is no answer: only that it came to its end is, which an early exit is not.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    exec(compile(task["source"], "program", "exec"), {"__name__": "__main__"})
    answers.write(task["word"])
    answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
