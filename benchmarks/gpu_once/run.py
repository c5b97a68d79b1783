"""The units of the run and their parts, in order: a model has parity, graphs, layers, tokens per second, overlap.

Knows which part measures what; knows no arguments.
"""

import importlib.util
import math
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from benchmarks.figures import machine
from benchmarks.gpu_once.decoding import contexts, generate
from benchmarks.gpu_once.graphs import has_graphs
from benchmarks.gpu_once.layer_times import copy_bandwidth, measure_layers
from benchmarks.gpu_once.live_report import LiveReport
from benchmarks.gpu_once.model import LOOKAHEADS, MAX_ROWS, Model, build_model
from benchmarks.gpu_once.overlap import overlap_of, read_events, record
from benchmarks.gpu_once.parity import (
    check_waits,
    float_parity,
    lane_parity,
    layer_parity,
    token_parity,
    verification_parity,
)
from benchmarks.gpu_once.pieces import PIECES, piece_parity
from benchmarks.gpu_once.speeds import CONTEXT, measure_exposed, measure_speeds
from dash_runtime.devices import device_of

_NEEDS_CUDA = "needs a CUDA device"


@dataclass(frozen=True, slots=True)
class Effort:
    """The amount of work."""

    layer_parity_rows: tuple[int, ...]
    token_parity_rows: tuple[int, ...]
    parity_tokens: int
    layer_rows: tuple[int, ...]
    num_context: tuple[int, ...]
    speed_rows: tuple[int, ...]
    speed_tokens: int
    rounds: int
    traced_tokens: int

    @property
    def cache_tokens(self) -> int:
        """The most that a part caches at a time, of which each sequence begins a block of its own."""
        timed = max(self.layer_rows) * (max(self.num_context) + 16)
        decoded = max(self.speed_rows) * (CONTEXT + max(self.speed_tokens, self.traced_tokens) + 16)
        compared = MAX_ROWS * (128 + self.parity_tokens)
        return max(timed, decoded, compared)


FULL = Effort((1, 2, 3, 4, 8, 16, 17, 32), (1, 3, 16), 64, (1, 4, 16), (256, 2048), (1, 16), 64, 3, 8)
QUICK = Effort((1, 3, 16), (1, 3), 16, (1, 16), (256,), (1, 16), 8, 1, 4)


TESTS = "tests"


def units_of(shapes: Sequence[str]) -> list[str]:
    """Returns what runs in a process of its own, in order: risky pieces, models, tests."""
    return [*PIECES, *shapes, TESTS]


def run_unit(report: LiveReport, unit: str, shapes: Sequence[str], device: torch.device, effort: Effort) -> None:
    """Runs every part of a unit; what fails is in the report, and the others go on."""
    report.part("card and versions", partial(_note_machine, report, device))
    if unit in PIECES:
        report.part(f"piece, {unit}", partial(piece_parity, report, unit, device), is_parity=True)
    elif unit == TESTS:
        report.part("pytest -m gpu", partial(_run_tests, report, device))
    else:
        _run_model(report, unit, device, effort, is_first=unit == shapes[0])


def _run_model(report: LiveReport, name: str, device: torch.device, effort: Effort, is_first: bool) -> None:
    part, models, bandwidth = report.part, dict[str, Model](), list[float]()
    if is_first:
        part("parity, float32", partial(float_parity, report, name, device, effort.parity_tokens), is_parity=True)
    part(f"parity, bfloat16, {name}", partial(check_parity, report, models, name, device, effort), is_parity=True)
    model = models.get(name)
    if model is None:
        return
    part(f"waits, {name}", partial(check_waits, report, model), is_parity=True)
    part(f"graphs, {name}", partial(add_graphs, report, model))
    part(f"bandwidth, {name}", partial(_add_bandwidth, report, name, bandwidth, device))
    peak = max(bandwidth, default=math.nan)
    part(f"layers, {name}", partial(measure_layers, report, model, effort.layer_rows, effort.num_context, peak))
    for measure, what in ((measure_speeds, "tokens per second"), (measure_exposed, "exposed time")):
        for num_rows in effort.speed_rows:
            own = partial(measure, report, model, num_rows, effort.speed_tokens, effort.rounds)
            part(f"{what}, {name}, {num_rows} rows", own)
    # After all that is timed, since a profiler may slow what follows.
    part(f"overlap, {name}", partial(_measure_overlap, report, model, effort.traced_tokens))


def check_parity(report: LiveReport, models: dict[str, Model], name: str, device: torch.device, effort: Effort) -> None:
    """Builds a model, puts it among the others, and compares its decoders."""
    model = build_model(report, name, device, effort.cache_tokens)
    if model is None:
        raise MemoryError(f"{name} does not fit on the device")
    models[name] = model
    if not has_graphs(model.decoder):
        report.note(f"{name}: decodes without graphs, so these compare the eager way with itself")
    layer_parity(report, model, effort.layer_parity_rows)
    token_parity(report, model, effort.token_parity_rows, effort.parity_tokens)
    lane_parity(report, model, effort.parity_tokens)
    verification_parity(report, model)


def _add_bandwidth(report: LiveReport, name: str, bandwidth: list[float], device: torch.device) -> None:
    bandwidth += copy_bandwidth(device)
    report.add(f"{name}_copy_bandwidth_gb_per_second", [rate / 1e9 for rate in bandwidth])


def _note_machine(report: LiveReport, device: torch.device) -> None:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "missing"
    report.note(machine())
    report.note(f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton}, {platform.platform()}")
    report.note(device_of(device).describe())
    if device.type == "cuda":
        own = torch.cuda.get_device_properties(device)
        report.note(
            f"{own.name}, compute capability {own.major}.{own.minor}, {own.multi_processor_count} processors, "
            f"{own.total_memory / 1e9:.1f} GB, {(device_of(device).free_bytes() or 0) / 1e9:.1f} GB free"
        )


def add_graphs(report: LiveReport, model: Model) -> None:
    """Adds what capturing took, and whether it failed."""
    name, own = model.name, model.captured
    if not has_graphs(model.decoder):
        report.note(f"{name}: graphs: {_NEEDS_CUDA}")
        return
    report.add(f"{name}_graphs", [own.num_graphs])
    report.add(f"{name}_capture_seconds", [own.seconds])
    report.add(f"{name}_graphs_gb", [own.num_bytes / 1e9])
    if own.error is not None:
        report.note(f"{name}: capturing failed: {own.error}")
    report.require(f"{name}_failed_captures", int(own.error is not None), "≤ 0")
    if model.device.type == "cuda":
        report.add(f"{name}_peak_memory_gb", [torch.cuda.max_memory_allocated(model.device) / 1e9])


def _measure_overlap(report: LiveReport, model: Model, num_tokens: int) -> None:
    if model.device.type == "cuda":
        measure_overlap(report, model, num_tokens)
    else:
        report.note(f"the share of the policy's kernels inside the decoder's: {_NEEDS_CUDA}")


def measure_overlap(report: LiveReport, model: Model, num_tokens: int) -> None:
    """Adds the share of the policy's kernel time inside the decoder's, by traces that are kept in the folder."""
    lane = model.lane(model.concurrent_lane_kind)
    for lookahead, policy in zip(LOOKAHEADS, model.policies, strict=True):
        with contexts(model.pool, [CONTEXT], num_tokens + 1) as caches:
            decode = partial(generate, model.decoder, lane, policy, caches, [1], num_tokens)
            planned = decode()  # warms up
            for kind, replayed in (("stream", None), ("no_policy", planned.plans)):
                report.check_time()
                name = f"{model.name}_lookahead{lookahead}_{kind}"
                path = report.folder / f"trace_{name}.json.gz"
                work = partial(decode, forced=planned.tokens, replayed=replayed)
                record(work, path, [ProfilerActivity.CPU, ProfilerActivity.CUDA])
                seen = overlap_of(read_events(path))
                if seen is None:
                    report.note(f"{path.name} has no kernels")
                    continue
                report.add(f"{name}_decoder_busy_us", [seen.decoder_us / num_tokens])
                report.add(f"{name}_decoder_idle_us", [seen.idle_us / num_tokens])
                if seen.share_inside is not None:
                    report.add(f"{name}_policy_us", [seen.policy_us / num_tokens])
                    report.add(f"{name}_policy_share_inside_decoder", [seen.share_inside])
    lane.close()
    report.note("overlap: µs per token under the profiler, which slows the host; exposed times are taken without it")


def _run_tests(report: LiveReport, device: torch.device) -> None:
    if device.type != "cuda":
        report.note(f"the tests: {_NEEDS_CUDA}")
        return
    if missing := [name for name in ("pytest", "msgspec") if importlib.util.find_spec(name) is None]:
        report.note(f"the tests need {' and '.join(missing)}")
        return
    files = [str(path) for path in sorted(Path("tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    report.note(f"pytest -m gpu {' '.join(files)}")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=report.seconds_left())
    (report.folder / "pytest.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    report.require("tests_exit_code", done.returncode, "≤ 0")
