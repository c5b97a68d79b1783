"""Runs the command as a process of its own, with pipes or at a terminal. The fixture `command` runs it in the test."""

import contextlib
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

# A session leader gets Ctrl-C as a signal only after it makes standard input its controlling terminal.
_AT_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from dash_client.cli import main
sys.exit(main())
"""

_ESCAPES = re.compile(r"\x1b\[\?[0-9]+[hl]")
"""Removes the escape sequences of line editing."""


class Written(NamedTuple):
    """What a command wrote to standard output and error."""

    out: str
    err: str


Command = Callable[..., Written]
"""Runs the words of a line, and more words, and checks the exit code `code`."""


@contextlib.contextmanager
def run_command(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "dash_client.cli", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    with subprocess.Popen(command, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


class Terminal:
    """A command at a terminal of its own; `text` is all its output so far."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._master, slave = os.openpty()
        self.text = ""
        self._position = 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", _AT_TERMINAL, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm-256color"} | environment,
        )
        os.close(slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def type(self, keys: str) -> None:
        """Types keys: "\\n" is Enter, "\\x04" Ctrl-D."""
        os.write(self._master, keys.encode())

    def press_ctrl_c(self) -> None:
        """Presses Ctrl-C once the command is waiting.

        Between its prompt and its wait for keys, readline takes a signal and acts on it only at the next key.
        """
        waiting_checks = 0
        end = time.monotonic() + 15
        while waiting_checks < 3:
            assert time.monotonic() < end, "it does not come to rest"
            time.sleep(0.01)
            status = Path(f"/proc/{self._process.pid}/stat").read_text()
            waiting_checks = waiting_checks + 1 if status.rpartition(")")[2].split()[0] == "S" else 0
        self.type("\x03")

    def read_until(self, expected: str, seconds: float = 15) -> None:
        """Reads until this text appears after the text of the previous wait."""
        end = time.monotonic() + seconds
        while (found := self.text.find(expected, self._position)) < 0:
            left = end - time.monotonic()
            rest = self.text[self._position :]
            assert left > 0, f"{expected!r} is not in {rest!r}"
            assert self._read(left), f"{expected!r} is not in {rest!r}"
        self._position = found + len(expected)

    def wait(self, seconds: float = 15) -> int:
        """Reads to its end; returns its exit code."""
        end = time.monotonic() + seconds
        while self._read(max(end - time.monotonic(), 0)):
            pass
        return self._process.wait(max(end - time.monotonic(), 0.1))

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        # On Linux, reading a terminal whose other end is closed raises an error.
        with contextlib.suppress(OSError):
            if chunk := os.read(self._master, 4096):
                self.text = _ESCAPES.sub("", self.text + chunk.decode(errors="replace"))
                return True
        return False
