"""A process that is stopped except while it is asked for something. Knows signals; knows nothing of what it runs."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self


class PeerProcess:
    """A peer's process and its children, stopped unless `awake`: threads that spin as they wait take time from others.

    It runs from the start until `awake` ends for the first time, and ends with the block.
    """

    def __init__(self, name: str, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, closed with the process
        # A group of its own, so that its children stop with it. A session would get its own share of the processors.
        self.process = subprocess.Popen(
            command,
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            process_group=0,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signal(signal.SIGKILL)
        self.process.communicate()
        self._errors.close()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Lets the processes run inside the block."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def failure(self, what: str) -> RuntimeError:
        """Returns the error to raise, with how the process ended and its last line of standard error."""
        status = self.process.poll()
        end = "" if status is None else f", and ended with status {status}"
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return RuntimeError(f"{self.name} {what}{end}: {lines[-1].strip() if lines else 'no message'}")

    def has_ended(self, seconds: float = 0) -> bool:
        """Waits up to `seconds` for its end."""
        ends_at = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < ends_at:
            time.sleep(0.01)
        return self.process.poll() is not None

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
