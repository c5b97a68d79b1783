"""The run for a GPU: its graph of a whole step, what it says of the decoder's graphs, and what it reads from traces."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu_once.decoding import contexts, generate
from benchmarks.gpu_once.graphs import decoder_with_graphs, eager_over, has_graphs, layers_of, prepare
from benchmarks.gpu_once.live_report import LiveReport
from benchmarks.gpu_once.model import MAX_ROWS, Model, build_model
from benchmarks.gpu_once.overlap import Overlap, overlap_of, read_events, record
from benchmarks.gpu_once.random_models import SHAPES, RandomWeights, tensor_shapes
from benchmarks.gpu_once.run import add_graphs, measure_overlap
from benchmarks.gpu_once.whole_step import WholeStep, as_it_is
from dash_runtime.actions import Action
from dash_runtime.decoder.backends.cuda import CudaBackend
from dash_runtime.decoder.backends.eager import EagerBackend
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.loading import make_decoder
from dash_runtime.devices import CpuDevice, device_of
from dash_runtime.devices.cuda_graphs import Capture, CaptureFailed, Replay
from dash_runtime.engine.lanes import InlineLane
from dash_runtime.layers.batch import PassKind
from dash_runtime.policy.policy import full_depth
from tests.runtime.support import CPU

TINY = SHAPES["tiny"]
EMBEDDING = "model.embed_tokens.weight"


def float_decoder() -> Decoder:
    weights = RandomWeights(TINY, torch.float32, CPU)
    return decoder_with_graphs(TINY, weights, (Action.SKIP, Action.FULL), torch.float32, CPU, 512)


@pytest.mark.parametrize("lengths", [[50], [3, 60, 17]])
def test_the_whole_step_has_full_depths_tokens_every_time_that_it_is_run(lengths: list[int]) -> None:
    decoder, num_steps, first_ids = float_decoder(), 12, list(range(7, 7 + len(lengths)))
    caches = decoder.caches([length + num_steps for length in lengths])
    for row, cache in enumerate(caches):
        memories = [memory[:, :, : lengths[row]] for memory in cache.memories]
        cache.append([torch.randn(own.shape, generator=torch.Generator().manual_seed(row)) for own in memories])
    expected = generate(decoder, InlineLane(), full_depth(6), caches, first_ids, num_steps).tokens
    embedding = RandomWeights(TINY, torch.float32, CPU)[EMBEDDING]
    whole = WholeStep(decoder, embedding, caches, num_steps, as_it_is)
    assert whole.run(first_ids, num_steps) == expected
    assert whole.run(first_ids, num_steps) == expected


@torch.inference_mode()
def test_on_a_fake_cuda_device_the_whole_step_touches_nothing_of_the_hosts() -> None:
    device = torch.device("cuda", 0)
    with FakeTensorMode():
        try:
            torch.empty(2, device=device)[:1]  # torch 2.9 asks the driver for that
        except (AssertionError, RuntimeError):
            pytest.skip("this build of torch has no CUDA, or wants a driver for tensors that are not there")
        weights = {name: torch.empty(shape, device=device) for name, shape in tensor_shapes(TINY).items()}
        decoder = make_decoder(
            TINY, weights, (Action.SKIP, Action.FULL), dtype=torch.bfloat16, device=device, context_length=128
        )
        caches = decoder.caches([64, 64])
        for cache in caches:
            cache.append([torch.empty_like(memory[:, :, :9]) for memory in cache.memories])
        whole = WholeStep(decoder, weights[EMBEDDING].bfloat16(), caches, 8, as_it_is)
        whole.step()
    assert whole._token_ids.device == whole._positions.device == device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_whole_step_has_the_tokens_of_the_same_step_that_is_not(report: LiveReport) -> None:
    model = build_model(report, "135m", torch.device("cuda"), 4096)
    assert model is not None
    embedding = model.weights[EMBEDDING].to(model.device)
    with contexts(model.pool, [50, 7], 17) as caches:
        steps = (
            WholeStep(model.decoder, embedding, caches, 17, own)
            for own in (as_it_is, device_of(model.device).make_capture())
        )
        plain, captured = (step.run([1, 2], 16) for step in steps)
    assert captured == plain


def kernels(stream: int, *intervals: tuple[float, float]) -> Iterator[dict[str, Any]]:
    for begin, end in intervals:
        yield {"ph": "X", "cat": "kernel", "ts": begin, "dur": end - begin, "args": {"stream": stream}}


def test_overlap_is_the_policys_kernel_time_inside_the_decoders() -> None:
    events = [
        *kernels(20, (5, 9), (11, 13), (29, 30)),
        *kernels(7, (0, 8), (6, 10), (12, 20), (25, 30)),
        {"ph": "X", "cat": "gpu_memcpy", "ts": 20, "dur": 5, "args": {"stream": 20}},
        {"ph": "X", "cat": "cpu_op", "ts": 0, "dur": 100},
        {"ph": "i", "ts": 3},
    ]
    overlap = overlap_of(events)
    assert overlap == Overlap(decoder_us=23, idle_us=7, policy_us=7, inside_us=6)
    assert overlap.share_inside == 6 / 7


def test_without_a_second_stream_no_overlap_is_claimed() -> None:
    alone = overlap_of(kernels(7, (0, 8)))
    assert alone is not None
    assert alone.share_inside is None
    assert overlap_of([]) is None


def test_a_recorded_trace_is_kept_and_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    record(lambda: torch.ones(3) + 1, path, [torch.profiler.ProfilerActivity.CPU])
    events = read_events(path)
    assert any(event.get("name") == "aten::add" for event in events)
    assert overlap_of(events) is None


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_traces_with_and_without_the_policy_are_in_the_folder_for_each_lookahead(
    report: LiveReport, model: Model
) -> None:
    measure_overlap(report, model, 2)
    assert sorted(path.name for path in report.folder.glob("trace_*")) == [
        f"trace_tiny_lookahead{lookahead}_{kind}.json.gz" for lookahead in (1, 4) for kind in ("no_policy", "stream")
    ]


class _CapturingDevice(CpuDevice):
    """A CPU that makes graphs with the given capture."""

    def __init__(self, capture: Capture) -> None:
        super().__init__(CPU)
        self._capture = capture

    def make_capture(self, stream: Any = None) -> Capture:
        return self._capture


def with_graphs(model: Model, capture: Capture) -> Model:
    eager = model.decoder.backends[PassKind.VERIFY][-1]
    assert isinstance(eager, EagerBackend)
    parts = layers_of(model.decoder), range(TINY.num_layers), None, model.decoder.heads, eager
    backend = CudaBackend(eager._ends, TINY, *parts, _CapturingDevice(capture), model.decoder.dtype)
    decoder = replace(model.decoder, backends={**model.decoder.backends, PassKind.DECODE: [backend, eager]})
    pool = decoder.pool(model.pool.total_tokens, MAX_ROWS)
    captured = prepare(decoder, pool, model.compensation, 2)
    return replace(model, decoder=decoder, eager=eager_over(decoder), pool=pool, captured=captured)


def run_now(function: Callable[[], None]) -> Replay:
    function()
    return function


def test_graphs_of_all_layers_actions_and_heads_are_counted(report: LiveReport, model: Model) -> None:
    graphed = with_graphs(model, run_now)
    assert has_graphs(graphed.decoder)
    assert not has_graphs(graphed.eager)
    add_graphs(report, graphed)
    values = {figure.name: figure.value for figure in report.figures}
    num_running = len(graphed.decoder.actions) - 1
    # Skipped rows have keys and values in every action; rows that run may have others beside them that skip.
    alone, together = 2 * num_running, 3 * num_running
    others = 1 + len(graphed.decoder.heads)  # a pass's beginning, and the heads
    assert values["tiny_graphs"] == TINY.num_layers * (alone + together) + 2 * others
    assert values["tiny_failed_captures"] == 0


def test_a_failed_capture_is_noted_and_breaks_the_run(report: LiveReport, model: Model) -> None:
    def fail(function: Callable[[], None]) -> Replay:
        raise CaptureFailed("a CUDA graph cannot be captured: no memory")

    add_graphs(report, with_graphs(model, fail))
    assert report.broken_parities == ["tiny_failed_captures"]
    assert report.notes[-1] == "tiny: capturing failed: a CUDA graph cannot be captured: no memory"
