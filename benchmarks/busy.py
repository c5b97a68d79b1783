"""Measures a service whose processors are not its own: one stream beside a process that never waits."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from benchmarks.contenders import require_cached
from benchmarks.figures import Report
from benchmarks.rounds import Effort, Work, interleaved, progress
from benchmarks.server_process import DEADLINE_SECONDS, RunningServer, running_server
from benchmarks.setting import Setting

_PROMPT_TOKENS, _NEW_TOKENS = 512, 256


def measure_busy(report: Report, _: Setting, effort: Effort) -> None:
    """Adds one stream's speed in INT4, and the time to the first token behind a long prompt, beside an endless loop;
    over those of one thread alone."""
    progress("a busy machine: starting servers")
    with (
        running_server() as usual,
        usual.stopped(),
        running_server(DASH_NUM_THREADS="1") as one,
        one.stopped(),
        endless_loop() as loop,
    ):
        loop.send_signal(signal.SIGSTOP)
        works: dict[str, Work] = {
            "busy": lambda: _speeds("busy", usual, loop),
            "one_thread": lambda: _speeds("one_thread", one),
            "quiet": lambda: _speeds("quiet", usual),
        }
        values = interleaved(report, "a busy machine", works, effort.rounds)
    for name, own in values.items():
        report.add(name, own)
    report.add_ratio("served_busy_vs_quiet", values, "int4_busy", "int4_one_thread", "≥ 0.9")
    report.add_ratio("prompt_busy_vs_quiet", values, "prompt_tokens_busy", "prompt_tokens_one_thread")
    report.note(
        "*_busy: all threads beside an endless loop on the same processors; *_one_thread: one thread alone; *_quiet: "
        "all alone, which may begin with the one thread of the turn before. Served tokens per second: "
        f"{_NEW_TOKENS} in INT4, and those of a prompt of {_PROMPT_TOKENS} until the first new one"
    )


def _speeds(kind: str, server: RunningServer, loop: subprocess.Popen | None = None) -> Mapping[str, float]:
    options = {"mode": "fixed", "fixed_action": "int4", "temperature": 0, "ignore_eos": True}

    def seconds(prompt: list[int], num_tokens: int) -> float:
        started = time.perf_counter()
        answer = server.client.generate(prompt, max_new_tokens=num_tokens, timeout=DEADLINE_SECONDS, **options)
        require_cached(answer.usage.cached_prompt_token_count, 0)
        return time.perf_counter() - started

    prompt = [1000 + 7 * place for place in range(_PROMPT_TOKENS)]
    with server.awake():
        if loop is not None:
            loop.send_signal(signal.SIGCONT)
        try:
            first, whole = seconds(prompt, 1), seconds(prompt[:20], _NEW_TOKENS)
        finally:
            if loop is not None:
                loop.send_signal(signal.SIGSTOP)
    return {f"int4_{kind}": _NEW_TOKENS / whole, f"prompt_tokens_{kind}": _PROMPT_TOKENS / first}


@contextmanager
def endless_loop() -> Iterator[subprocess.Popen]:
    """Runs a process that never waits inside the block."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as loop:
        try:
            yield loop
        finally:
            loop.kill()
