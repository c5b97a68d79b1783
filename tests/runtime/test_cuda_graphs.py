"""Layers run as graphs compute the same as without, and a device that cannot make graphs runs without them.

Without CUDA, graphs are imitated: a replay runs the function again and writes into its first outputs.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.decoder.backends.cuda_graphs import Graphs, Tensors, cuda_capture
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.loading import make_decoder
from tests.runtime.support import ALL_ACTIONS, CPU, full_plan, load_decoder, run_rows
from tests.tiny_models import save_tiny_model

Plan = list[Action]


class ImitatedGraphs:
    """Imitates capture and replay, and counts both."""

    def __init__(self, change: float = 0.0) -> None:
        self.num_captured = 0
        self.num_replayed = 0
        self._change = change

    def __call__(self, function: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], object]]:
        self.num_captured += 1
        outputs = function()

        def replay() -> None:
            self.num_replayed += 1
            for output, own in zip(outputs, function(), strict=True):
                output.copy_(own + self._change)

        return outputs, replay


def decoder_with(graphs: Graphs, folder: Path, device: torch.device = CPU) -> Decoder:
    config = load_model_config(folder)
    options = {"dtype": torch.float32, "device": device, "context_length": config.context_length}
    return make_decoder(config, open_weights(folder), ALL_ACTIONS, graphs={device: graphs}, **options)  # type: ignore[arg-type]


def plans_of(num_layers: int, num_rows: int, step: int) -> list[Plan]:
    return [[ALL_ACTIONS[(row * layer + step) % 4] for layer in range(num_layers)] for row in range(num_rows)]


def decoded(decoder: Decoder, num_rows: int, num_steps: int = 12) -> torch.Tensor:
    """Returns the logits of some steps of several sequences: with any action in any layer, and at last all in FULL."""
    caches = decoder.caches([64] * num_rows)
    for row, cache in enumerate(caches):
        run_rows(decoder, [cache], [range(1, 4 + row)], [full_plan(decoder)])
    steps: list[torch.Tensor] = []
    for step in range(num_steps):
        plans: list[Any] = plans_of(decoder.num_layers, num_rows, step)
        if step == num_steps - 1:
            plans = [full_plan(decoder)] * num_rows
        steps.append(run_rows(decoder, caches, [[7 * row + step] for row in range(num_rows)], plans).cpu())
    return torch.cat(steps)


@torch.inference_mode()
@pytest.mark.parametrize("num_rows", [1, 2, 3, 5])
def test_layers_as_graphs_compute_what_layers_do(tiny_folder: Path, num_rows: int) -> None:
    capture = ImitatedGraphs()
    own = decoded(decoder_with(Graphs(capture, (4, 1)), tiny_folder), num_rows)
    torch.testing.assert_close(own, decoded(load_decoder(tiny_folder), num_rows), rtol=1e-4, atol=1e-4)
    assert capture.num_replayed > 2 * capture.num_captured


class NoGraphs(Graphs):
    """Runs functions as they are, and notes the parts and layers that it was asked for."""

    def __init__(self) -> None:
        super().__init__(ImitatedGraphs())
        self.parts: set[tuple[str, int]] = set()

    def run(self, key: Any, function: Callable[..., Tensors], inputs: Tensors) -> Tensors:
        self.parts.add(key[:2])
        return function(*inputs)


@torch.inference_mode()
def test_a_mixture_of_experts_is_in_no_graph_since_the_host_reads_which_run(tmp_path: Path) -> None:
    graphs, folder = NoGraphs(), save_tiny_model(tmp_path / "moe", "qwen3-moe")
    decoded(decoder_with(graphs, folder), 3)
    assert {layer for part, layer in graphs.parts if part == "_after_attention"} == {1}  # whose MLP is a single one
    assert {layer for part, layer in graphs.parts if part == "_before_attention"} == set(range(6))


def test_what_a_graph_gave_is_not_written_to_by_its_next_replay() -> None:
    graphs = Graphs(ImitatedGraphs())
    first = [graphs.run("double", lambda rows: (2 * rows,), (torch.full((3, 2), float(n)),))[0] for n in range(4)]
    assert [row.unique().tolist() for row in first] == [[0.0], [2.0], [4.0], [6.0]]


def test_more_rows_than_there_are_graphs_for_run_without() -> None:
    capture = ImitatedGraphs()
    graphs = Graphs(capture, (2,))
    assert graphs.run("double", lambda rows: (2 * rows,), (torch.ones(3, 1),))[0].tolist() == [[2.0]] * 3
    assert capture.num_captured == 0


def failing(function: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], object]]:
    raise RuntimeError("operation not permitted when stream is capturing\nmore of it")


@pytest.mark.parametrize(
    ("capture", "reason"), [(failing, "not permitted"), (ImitatedGraphs(change=3.0), "something else than the layer")]
)
def test_a_device_that_cannot_says_so_once_and_runs_without(
    capture: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = Graphs(capture)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert graphs.run("double", lambda rows: (2 * rows,), (torch.ones(2, 2),))[0].tolist() == [[2.0, 2.0]] * 2
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    assert graphs.is_broken


class JournalCuda:
    """Notes the order in which streams wait and a graph is captured."""

    def __init__(self) -> None:
        self.journal: list[str] = []

    def Stream(self, device: Any) -> Any:  # noqa: N802
        return JournalStream(self.journal, "side")

    def current_stream(self, device: Any) -> Any:
        return JournalStream(self.journal, "current")

    def graph_pool_handle(self) -> str:
        return "pool"

    def stream(self, stream: Any) -> Any:
        return nullcontext()

    def CUDAGraph(self) -> Any:  # noqa: N802
        journal = self.journal

        class Graph:
            def capture_begin(self, **options: str) -> None:
                journal.append(f"begin {options['pool']} {options['capture_error_mode']}")

            def capture_end(self) -> None:
                journal.append("end")

            def replay(self) -> None:
                journal.append("replay")

        return Graph()


class JournalStream:
    def __init__(self, journal: list[str], name: str) -> None:
        self._journal = journal
        self.name = name

    def wait_stream(self, other: "JournalStream") -> None:
        self._journal.append(f"{self.name} waits for {other.name}")


def test_a_graph_is_captured_after_a_first_run_and_between_the_streams_waits() -> None:
    cuda = JournalCuda()
    outputs, replay = cuda_capture(CPU, cuda)(lambda: cuda.journal.append("run") or (torch.ones(1),))  # type: ignore[func-returns-value]
    replay()
    expected = ["side waits for current", "run", "begin pool thread_local", "run", "end", "current waits for side"]
    assert cuda.journal == [*expected, "replay"]
    assert outputs[0].tolist() == [1.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
@pytest.mark.parametrize("num_rows", [1, 3])
def test_on_cuda_graphs_are_made_and_compute_what_layers_do(tiny_folder: Path, num_rows: int) -> None:
    device = torch.device("cuda")
    graphs = Graphs(cuda_capture(device))
    own = decoded(decoder_with(graphs, tiny_folder, device), num_rows)
    assert not graphs.is_broken
    torch.testing.assert_close(own, decoded(load_decoder(tiny_folder), num_rows), rtol=1e-3, atol=1e-3)
