"""Measures how far what answers say they cost is from what they took, served, mode by mode.

As a program it does the same after a first start beside a busy process: `python -m benchmarks.cost_error --busy`.
Knows a server and its clients; knows no engine.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.busy import endless_loop
from benchmarks.contenders import require_cached
from benchmarks.figures import Report, machine
from benchmarks.rounds import FULL, QUICK, Effort, progress
from benchmarks.server_process import DEADLINE_SECONDS, RunningServer, running_server
from dash_client import DashClient, GenerationOptions
from dash_runtime.checkpoints import default_cache_folder

MODES: Mapping[str, GenerationOptions] = {
    "full": {"mode": "full_depth"},
    "int8": {"mode": "fixed", "fixed_action": "int8"},
    "int4": {"mode": "fixed", "fixed_action": "int4"},
    "skip": {"mode": "fixed", "fixed_action": "skip"},
    "adaptive": {"mode": "adaptive"},
}
_PROMPT = list(range(1000, 1200))
_SETTLING_SECONDS = 60.0


@dataclass(slots=True)
class Taken:
    """One mode's answers: what they said a token cost, and the seconds that it took."""

    said: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def cost_errors(taken: Mapping[str, Taken]) -> dict[str, tuple[float, float]]:
    """Returns by mode what a token said it cost, and what it took, in full depth's tokens of the same rounds."""
    full = taken["full"].seconds
    return {
        mode: (
            statistics.median(own.said),
            statistics.median(seconds / whole for seconds, whole in zip(own.seconds, full, strict=True)),
        )
        for mode, own in taken.items()
    }


def measure_cost_error(report: Report, effort: Effort, server: RunningServer) -> None:
    """Adds the mean error over all modes, and what each said and took."""
    taken = {mode: Taken() for mode in MODES}
    for number in range(effort.rounds + 1):
        progress(f"cost error: {f'round {number} of {effort.rounds}' if number else 'warming up'}")
        for mode, (said, seconds) in _round(server.client, effort.num_tokens).items():
            if number:  # the first round warms up
                taken[mode].said.append(said)
                taken[mode].seconds.append(seconds)
    errors = cost_errors(taken)
    report.add("cost_error", [statistics.mean(abs(said - took) for said, took in errors.values())], "≤ 0.04")
    for mode, (said, took) in errors.items():
        report.add(f"cost_said_{mode}", [said])
        report.add(f"cost_took_{mode}", [took])
    report.note(
        f"cost_error: mean of |said − took| over {', '.join(MODES)}, one stream served, {effort.rounds} rounds of "
        f"{effort.num_tokens} tokens in turn; took: median of a token's seconds over full depth's in the same round"
    )


def _round(client: DashClient, num_tokens: int) -> dict[str, tuple[float, float]]:
    """Returns by mode what an answer said a token cost, and the seconds of one."""
    found: dict[str, tuple[float, float]] = {}
    for mode, options in MODES.items():
        answer = client.generate(
            _PROMPT, max_new_tokens=num_tokens, ignore_eos=True, timeout=DEADLINE_SECONDS, **options
        )
        require_cached(answer.usage.cached_prompt_token_count, 0)
        assert answer.depth.mean_cost is not None
        found[mode] = answer.depth.mean_cost, answer.usage.decode_seconds / (num_tokens - 1)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost_error", description=__doc__)
    parser.add_argument("--busy", action="store_true", help="after a first start beside an endless loop, and a minute")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and tokens; wider spread")
    options = parser.parse_args(arguments)
    effort = QUICK if options.quick else FULL
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        variables: dict[str, str] = {}
        if options.busy:
            # Everything that takes minutes is there, except what a first start measures.
            shutil.copytree(
                default_cache_folder(os.environ),
                folder,
                ignore=shutil.ignore_patterns("calibration"),
                dirs_exist_ok=True,
            )
            variables = {"DASH_CACHE_FOLDER": str(Path(folder))}
        with ExitStack() as running:
            with endless_loop() if options.busy else nullcontext():
                server = running.enter_context(running_server(**variables))
            report.add("start_seconds", [server.start_seconds])
            ends_at = time.monotonic() + (_SETTLING_SECONDS if options.busy else 0.0)
            while time.monotonic() < ends_at:
                _round(server.client, 48)
                time.sleep(1.0)
            measure_cost_error(report, effort, server)
    print(f"\n{machine()}\n")
    for figure in report.figures:
        print(figure.line())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
