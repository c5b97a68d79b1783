"""The Ray actor of one worker: starts the worker process on its node, and ends with it.

Knows no messages and no engine. Imports no Ray: Ray's own worker process imports this file.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

from dash_runtime.child_process import LARGE_PAGES


class WorkerActor:
    """Owns one worker process, which ends with the actor."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], credentials: bytes) -> None:
        """Runs this node's Python with `arguments`.

        Args:
            environment: added to the node's own.
            credentials: written to the process's standard input.
        """
        # The kernel kills the worker when the thread that started it ends; this one lives as long as the actor.
        assert threading.current_thread() is threading.main_thread()
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**LARGE_PAGES, **os.environ, **environment},
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(credentials)

    def place(self) -> tuple[int, str]:
        """Returns the worker's process id and its node's name."""
        return self._process.pid, socket.gethostname()

    def wait(self) -> int:
        """Waits for the worker's end, ends what it started, and returns its exit status."""
        status = self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return status
