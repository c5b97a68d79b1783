"""`make bench`: measures everything in one run, prints it, and keeps it in `benchmarks/results/`.

Run it alone on the machine: threads that wait for each other stall beside any busy process.
"""

import argparse
import gc
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks.batches import measure_batches
from benchmarks.busy import measure_busy
from benchmarks.constraints import measure_constraints
from benchmarks.context import measure_long_context
from benchmarks.cost_error import measure_cost_error
from benchmarks.decode import measure_decode, measure_prefill
from benchmarks.divergence import measure_divergence
from benchmarks.exact import measure_exact
from benchmarks.figures import RESULTS_FOLDER, Report, machine
from benchmarks.first_tokens import measure_first_tokens
from benchmarks.lookup import measure_lookup
from benchmarks.peers.install import DEFAULT_FOLDER as PEERS_FOLDER
from benchmarks.peers.section import measure_peers
from benchmarks.plots import write_plots
from benchmarks.rounds import FULL, QUICK, Effort, progress
from benchmarks.rpc import measure_rpc
from benchmarks.server_process import running_server
from benchmarks.service import measure_service
from benchmarks.setting import Setting, load_setting
from benchmarks.skips import measure_skips
from benchmarks.split import measure_split
from dash_runtime.checkpoints import EMBEDDED, default_cache_folder
from dash_runtime.devices.triton import leave_triton_out

_WITH_SERVERS = ("engine and server", "busy", "peers")
"""Sections whose servers have the embedded model."""
_SECTIONS: dict[str, Callable[[Report, Setting, Effort], None]] = {
    "decoding": measure_decode,
    "prefill": measure_prefill,
    "divergence": measure_divergence,
    "exact": measure_exact,
    "constraints": measure_constraints,
    "skips": measure_skips,
    "streams": measure_batches,
    "lookup": measure_lookup,
    "long context": measure_long_context,
    "engine and server": measure_rpc,
    "busy": measure_busy,
    "split": measure_split,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and tokens; wider spread")
    parser.add_argument(
        "--only", choices=[*_SECTIONS, "prompts", "peers"], help="one section, which is printed and not kept"
    )
    parser.add_argument(
        "--peers",
        type=Path,
        default=PEERS_FOLDER,
        metavar="FOLDER",
        help="made by `make peers` (default %(default)s)",
    )
    parser.add_argument(
        "--model",
        default=EMBEDDED,
        help="a .gguf file, for --only one of the sections without servers (default: the embedded model)",
    )
    options = parser.parse_args()
    if options.model != EMBEDDED and options.only in (None, *_WITH_SERVERS):
        parser.error("--model needs --only, with a section without servers")
    leave_triton_out()
    is_quick: bool = options.quick
    report = measure(QUICK if is_quick else FULL, only=options.only, peers_folder=options.peers, model=options.model)
    if is_quick:
        report.note("a quick run: few rounds and tokens")
    print(f"\n{machine()}\n")
    changes = report.changes(RESULTS_FOLDER) if options.model == EMBEDDED else []
    if options.only is None:
        write_plots(report, RESULTS_FOLDER)
        report.write(RESULTS_FOLDER)
    for figure in report.figures:
        print(figure.line())
    print()
    for note in report.notes:
        print(f"- {note}")
    for line in changes:
        print(line)
    if report.failures:
        raise SystemExit(f"failed: {', '.join(report.failures)}")


def measure(
    effort: Effort,
    cache_folder: Path | None = None,
    only: str | None = None,
    peers_folder: Path = PEERS_FOLDER,
    model: str = EMBEDDED,
) -> Report:
    """Measures all sections in turn, or `only` one. A section that fails is left out with a note."""
    report = Report()
    with_peers = {"prompts": measure_first_tokens, "peers": measure_peers}
    sections = _SECTIONS | {name: partial(own, folder=peers_folder) for name, own in with_peers.items()}
    # The service comes first: models that other sections load would stay in memory beside it.
    if only is None:
        with report.attempt("service"):
            measure_service(report, effort)
        with report.attempt("cost error"), running_server() as server:
            measure_cost_error(report, effort, server)
    with ExitStack() as running, report.attempt("everything that decodes"):
        cache_folder = cache_folder or default_cache_folder(os.environ)
        setting = load_setting(report, running, cache_folder, peers_folder, model)
        # As in the worker: loaded objects live as long as the process, so the collector need not visit them.
        gc.collect()
        gc.freeze()
        for name, section in sections.items():
            if only not in (None, name):
                continue
            progress(name)
            with report.attempt(name):
                section(report, setting, effort)
    return report


if __name__ == "__main__":
    main()
