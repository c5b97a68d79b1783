"""Checks schemas and grammars in processes of their own, within a time and some memory.

A schema of a kilobyte can make its check take minutes and all memory of a machine (patterns that all must hold, for
example), so no process that serves others may run it. Knows constraints; knows no requests.

`python -m dash_server.grammar_check` is such a process: it answers lines of JSON with lines of JSON.
"""

import contextlib
import json
import os
import queue
import resource
import select
import subprocess
import sys
import time

from dash_runtime.child_process import die_with_parent
from dash_runtime.constraint import Constraint, ConstraintKind
from dash_runtime.errors import InvalidRequest

_SECONDS = 1.0
"""Large honest schemas take a twentieth of a second on an idle machine."""
_START_SECONDS = 20.0
_MOST_BYTES = 1 << 30
"""Address space of a checking process, its libraries included."""
_NICENESS = 5
_COMMAND = (sys.executable, "-m", "dash_server.grammar_check")


class GrammarChecker:
    """A few checking processes, each started when it is first needed and again after it was killed.

    May be used by as many threads as there are processes without one waiting for another.
    """

    def __init__(self, num_processes: int, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._processes: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(num_processes):
            self._processes.put(None)

    def check(self, constraint: Constraint) -> None:
        """Checks all but what needs a tokenizer. Blocks.

        Raises:
            InvalidRequest: it cannot be used; the description says why and, in a schema, where.
        """
        process = self._processes.get()
        try:
            if process is not None and process.is_over:
                process.kill()
                process = None
            process = process or _Process()
            problem = process.ask(constraint, self._seconds)
        except TimeoutError:
            assert process is not None
            process.kill()
            process = None
            raise constraint.refusal("takes too much time or memory to check: it is too complex") from None
        finally:
            self._processes.put(process)
        if problem is not None:
            raise constraint.refusal(problem)

    def close(self) -> None:
        """Ends the processes that are idle; the others end when they next want to answer."""
        with contextlib.suppress(queue.Empty):
            while True:
                if (process := self._processes.get_nowait()) is not None:
                    process.kill()


class _Process:
    """One checking process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._read(_START_SECONDS)

    def ask(self, constraint: Constraint, seconds: float) -> str | None:
        """Returns what is wrong with the constraint. Raises TimeoutError: there is no answer in time, or ever."""
        assert self._process.stdin is not None
        line = json.dumps([constraint.kind.value, constraint.text]).encode() + b"\n"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError:
            raise TimeoutError from None
        problem = self._read(seconds)
        return None if problem is None else str(problem)

    @property
    def is_over(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _read(self, seconds: float) -> object:
        assert self._process.stdout is not None
        ends_at, data, file = time.monotonic() + seconds, b"", self._process.stdout.fileno()
        while not data.endswith(b"\n"):
            ready, _, _ = select.select([file], [], [], max(0.0, ends_at - time.monotonic()))
            piece = os.read(file, 1 << 16) if ready else b""
            if not piece:
                raise TimeoutError
            data += piece
        return json.loads(data)


def main() -> None:
    """Answers until the other end closes."""
    from dash_runtime.grammar import check_grammar

    die_with_parent()  # in the midst of a check it would not see that nobody waits
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(_NICENESS)
    print("null", flush=True)
    for line in sys.stdin:
        problem = None
        try:
            kind, text = json.loads(line)
            check_grammar(Constraint(ConstraintKind(kind), text))
        except InvalidRequest as error:
            problem = error.description
        print(json.dumps(problem), flush=True)


if __name__ == "__main__":
    main()
