"""Damages policy, GGUF, configuration, tokenizer and weight files in many ways, and counts the outcomes.

    python -m benchmarks.soak.corrupt_files [--number 1000] [--seed 1] [--kind KIND] [--case KIND/NUMBER]

The cases run in a watched child process, so that a crash or a hang counts as one broken case and the rest goes on.
Prints a table by kind of file, the accepted damages with their reasons, and every broken case. Exits with 1 if there is
one.
"""

import argparse
import asyncio
import json
import os
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.soak.corruptible_files import KINDS, make_originals
from benchmarks.soak.corruption_cases import HANG_SECONDS, Case, CorruptionRun, Outcome, Result, cases, reason_to_accept
from benchmarks.soak.report import Finding, finding

_ROOT = Path(__file__).resolve().parent.parent.parent
_START_SECONDS = 120.0
_GRACE_SECONDS = 2.0
_MAX_ADDRESS_BYTES = 6 * 2**30
"""More than the child has at its start. A larger allocation fails instead of exhausting the machine."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.soak.corrupt_files", description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=1000, help="of corruptions (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="which ones (%(default)s)")
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], help="files of this kind only")
    parser.add_argument("--case", help="one case only, as the list of broken ones names it")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    parser.add_argument("--batch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.batch is not None:
        return _run_batch(options.batch)
    if options.case is not None:
        kind, number = options.case.rsplit("/", 1)
        chosen = [Case(kind, int(number), options.seed)]
    else:
        chosen = cases(options.number, options.seed, [kind for kind in KINDS if options.kind in (None, kind.name)])
    results = _results(chosen, is_verbose=options.verbose or options.case is not None)
    print(report(results))
    return 1 if any(result.outcome is Outcome.BROKEN for result in results) else 0


async def run(number: int = 1000, seed: int = 1) -> list[Finding]:
    """Runs the cases as a part of `make soak`, and prints the table too."""
    results = await asyncio.to_thread(_results, cases(number, seed))
    print(report(results))
    num_broken = sum(result.outcome is Outcome.BROKEN for result in results)
    return [
        finding("corrupted files judged", str(number), len(results), len(results) == number),
        finding("neither refused in one line nor accepted for a reason", "0", num_broken, not num_broken),
    ]


def _results(chosen: Sequence[Case], is_verbose: bool = False) -> list[Result]:
    """Runs the cases and returns their results. Prints the broken ones as they come, or all."""
    results = []
    with tempfile.TemporaryDirectory(prefix="dash-corrupt-") as folder:
        make_originals(Path(folder) / "originals")
        for result in _run_watched(chosen, Path(folder)):
            results.append(result)
            if is_verbose or result.outcome is Outcome.BROKEN:
                line = f"{result.outcome:10} {result.case.label}: {result.damage}: {result.detail}"
                print(ascii(line)[1:-1], flush=True)  # some of it is not printable text
    return results


def report(results: Sequence[Result]) -> str:
    """Prints the table by kind of file, and the accepted damages."""
    counts = Counter((result.case.kind, result.outcome) for result in results)
    lines = [f"{'kind of file':28}{'corruptions':>12}" + "".join(f"{outcome:>12}" for outcome in Outcome)]
    for kind in (kind.name for kind in KINDS):
        row = [counts[kind, outcome] for outcome in Outcome]
        if sum(row):
            lines.append(f"{kind:28}{sum(row):12}" + "".join(f"{count:12}" for count in row))
    totals = [sum(result.outcome is outcome for result in results) for outcome in Outcome]
    lines.append(f"{'all':28}{len(results):12}" + "".join(f"{total:12}" for total in totals))
    accepted = Counter(
        (result.case.kind, difference)
        for result in results
        if result.outcome is Outcome.ACCEPTED
        for difference in result.differences or ("",)
    )
    lines += ["", "accepted, by what then differs (one file may differ in several):"]
    kinds = {kind.name: kind for kind in KINDS}
    for (name, part), count in sorted(accepted.items()):
        reason = reason_to_accept(kinds[name], part) if part else "nothing that is read differs"
        lines.append(f"{name:28}{count:6}  {part or '-'}: {reason}")
    return "\n".join(lines)


def _run_watched(chosen: Sequence[Case], folder: Path) -> Iterator[Result]:
    """Yields the results in order, whatever happens to the processes that run the cases."""
    waiting = list(chosen)
    while waiting:
        batch = folder / "batch.json"
        batch.write_text(json.dumps([[case.kind, case.number, case.seed] for case in waiting]))
        num_done = 0
        for result in _run_child(waiting, batch):
            num_done += 1
            yield result
        waiting = waiting[num_done:]


def _run_child(waiting: Sequence[Case], batch: Path) -> Iterator[Result]:
    """Yields results until the child ends. If it ends too early, the last result says so."""
    command = [sys.executable, "-m", "benchmarks.soak.corrupt_files", "--batch", str(batch)]
    with (
        (batch.parent / "stderr").open("wb+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=_ROOT) as child,
    ):
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read_lines, args=(child, lines), daemon=True)
        reader.start()
        seconds = _START_SECONDS
        for case in waiting:
            try:
                line = lines.get(timeout=seconds)
            except queue.Empty:
                child.kill()
                reader.join()
                yield Result(case, "?", Outcome.BROKEN, f"it hung for {seconds:.0f} s and was ended")
                return
            if line is None:
                errors.seek(0)
                said = errors.read()[-500:].decode("utf-8", "replace")
                yield Result(case, "?", Outcome.BROKEN, f"the process ended with {child.wait()}: {said}")
                return
            yield Result.from_json(json.loads(line))
            seconds = 2 * HANG_SECONDS + _GRACE_SECONDS  # the damage itself takes time too


def _read_lines(child: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):
            lines.put(line)
    lines.put(None)


def _run_batch(batch: Path) -> int:
    """Runs in the child: every case of the batch, one line each."""
    import torch

    torch.set_num_threads(1)
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MAX_ADDRESS_BYTES,) * 2)
    run = CorruptionRun(batch.parent / "originals", batch.parent / "scratch")
    for kind, number, seed in json.loads(batch.read_text()):
        print(json.dumps(run.run(Case(kind, number, seed)).to_json()), flush=True)
    return 0


if __name__ == "__main__":
    started = time.monotonic()
    code = main()
    if "--batch" not in sys.argv:
        print(f"\n{time.monotonic() - started:.0f} s")
    sys.exit(code)
