"""`python -m benchmarks.neighbours`: compares ways for the engine's threads to wait, alone and beside busy processes.

torch's threads come from libgomp. A thread that is done spins before it sleeps: GOMP_SPINCOUNT times, or as
OMP_WAIT_POLICY says. A spinning thread reaches the next barrier soonest, but on a busy processor it takes time from
the thread that it waits for. libgomp reads both variables once, when it is loaded, so every run is a new process.
Knows processes and speeds; knows nothing of the server.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

from benchmarks.contenders import EngineContender
from benchmarks.figures import RESULTS_FOLDER, Report
from benchmarks.prompts import Prompts
from benchmarks.rounds import Work, interleaved
from benchmarks.setting import FULL_DEPTH, INT4
from dash_runtime.checkpoints import EMBEDDED, default_cache_folder, resolve_checkpoint, tokenizer_file
from dash_runtime.config import EngineConfig
from dash_runtime.startup.build import BuildOptions, build_engine

RESULTS_FILE = RESULTS_FOLDER / "neighbours.json"
MODES = {"int4": INT4, "full_depth": FULL_DEPTH}
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SETTINGS: dict[str, dict[str, str]] = {
    "unset": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "active": {"OMP_WAIT_POLICY": "active"},
    **{f"spin_{count}": {"GOMP_SPINCOUNT": str(count)} for count in (100, 1000, 10_000, 100_000)},
}
# They print a line when they are busy, and end with the process that started them.
_NEIGHBOURS: dict[str, str | None] = {
    "alone": None,
    "beside_loop": """
import os
parent = os.getppid()
print(flush=True)
while os.getppid() == parent:
    sum(range(100_000))
""",
    "beside_products": """
import os, torch
parent = os.getppid()
torch.set_num_threads(2)
matrix = torch.randn(512, 512)
matrix @ matrix
print(flush=True)
while os.getppid() == parent:
    matrix @ matrix
""",
}
NOTES = (
    "tokens per second of one stream of the embedded model after its first token, in a process of its own, by mode, "
    "neighbour and setting; _over_unset: over that of the same round where neither variable is set",
    "unset: libgomp's own 300,000 spins; active: 30 billion; passive: none",
    "beside_loop: one process that never waits; beside_products: one with two threads that multiply float32 matrices, "
    "neither variable set",
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.neighbours", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds (default %(default)s); one more warms up")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each run (default %(default)s)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    parser.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.decode:
        decode_when_asked(given.tokens)
        return 0
    report = measure(given.settings, given.rounds, given.tokens)
    report.print()
    RESULTS_FILE.parent.mkdir(exist_ok=True)
    content = json.dumps(report.to_json(), indent=2, ensure_ascii=False)
    RESULTS_FILE.write_text(content + "\n", encoding="utf-8")
    return 0 if report.figures else 1


def measure(settings: Sequence[str], rounds: int, num_tokens: int) -> Report:
    """Measures all settings, interleaved."""
    report = Report()
    works: dict[str, Work] = {setting: partial(speeds, setting, num_tokens) for setting in settings}
    values = interleaved(report, "neighbours", works, rounds)
    for mode in MODES:
        for neighbour in _NEIGHBOURS:
            names = {setting: f"{mode}_{neighbour}_{setting}" for setting in settings}
            for name in names.values():
                report.add(name, values.get(name, ()))
            for setting, name in names.items():
                if "unset" in names and setting != "unset":
                    report.add_ratio(f"{name}_over_unset", values, name, names["unset"])
    report.note(f"{rounds} rounds, {num_tokens} tokens")
    for note in NOTES:
        report.note(note)
    return report


def speeds(setting: str, num_tokens: int) -> Mapping[str, float]:
    """Returns tokens per second of every mode beside every neighbour, in a fresh process with that setting."""
    found: dict[str, float] = {}
    command = [sys.executable, "-m", "benchmarks.neighbours", "--decode", "--tokens", str(num_tokens)]
    with _running(command, SETTINGS[setting]) as decoder:
        assert decoder.stdin is not None
        assert decoder.stdout is not None
        for neighbour, program in _NEIGHBOURS.items():
            with nullcontext() if program is None else _running([sys.executable, "-c", program]):
                decoder.stdin.write("\n")
                decoder.stdin.flush()
                line = decoder.stdout.readline()
            if not line:
                raise RuntimeError(f"the engine's process ended with status {decoder.wait()}")
            found |= {f"{mode}_{neighbour}_{setting}": value for mode, value in json.loads(line).items()}
    return found


@contextmanager
def _running(command: Sequence[str], wait: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Starts a process and waits for its first line, which says that it is ready. Ends it afterwards."""
    environment = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES}
    process = subprocess.Popen(
        command,
        env=environment | dict(wait or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # As the server's worker is: Linux may divide its processors between sessions first.
        start_new_session=True,
    )
    with process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError(f"{command[1]} {command[2][:30]!r} ended with status {process.wait()}")
            yield process
        finally:
            process.kill()


def decode_when_asked(num_tokens: int) -> None:
    """Runs the engine's process: answers every input line with a line that has the speed of every mode."""
    cache_folder = default_cache_folder(os.environ)
    log = partial(print, file=sys.stderr, flush=True)
    folder = resolve_checkpoint(EMBEDDED, None, cache_folder, log)
    engine = build_engine(folder, cache_folder, BuildOptions(["cpu"]), EngineConfig(), log)
    prompt = Prompts(tokenizer_file(folder)).single
    contenders = {mode: EngineContender(engine, skip) for mode, skip in MODES.items()}
    # As in the worker: loaded objects live as long as the process, so the collector need not visit them.
    gc.collect()
    gc.freeze()
    for contender in contenders.values():
        contender.run([prompt], num_tokens)
    print(flush=True)
    for _ in sys.stdin:
        found = {mode: contender.run([prompt], num_tokens).tokens_per_second for mode, contender in contenders.items()}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    sys.exit(main())
