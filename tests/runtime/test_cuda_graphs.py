"""Graphs are captured behind what is queued, with garbage collection off, and a capture that fails says so."""

import gc
from contextlib import nullcontext
from typing import Any

import pytest

from dash_runtime.devices.cuda_graphs import CaptureFailed, CudaCapture
from tests.runtime.support import CPU


class JournalCuda:
    """Notes the order in which streams wait and a graph is captured."""

    def __init__(self, refuses_to_end: bool = False) -> None:
        self.journal: list[str] = []
        self.refuses_to_end = refuses_to_end

    def Stream(self, device: Any) -> Any:  # noqa: N802
        return JournalStream(self.journal, "side")

    def current_stream(self, device: Any) -> Any:
        return JournalStream(self.journal, "current")

    def graph_pool_handle(self) -> str:
        return "pool"

    def stream(self, stream: Any) -> Any:
        return nullcontext()

    def CUDAGraph(self) -> Any:  # noqa: N802
        journal, refuses_to_end = self.journal, self.refuses_to_end

        class Graph:
            def capture_begin(self, **options: str) -> None:
                journal.append(f"begin {options['pool']} {options['capture_error_mode']}")

            def capture_end(self) -> None:
                journal.append("end")
                if refuses_to_end:
                    raise RuntimeError("capture was invalidated")

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
    capture = CudaCapture(CPU, cuda=cuda)
    capture(lambda: cuda.journal.append("run"))()
    expected = ["side waits for current", "run", "begin pool thread_local", "run", "end", "current waits for side"]
    assert cuda.journal == [*expected, "replay"]
    assert capture.num_captured == 1


def test_no_garbage_is_collected_while_a_graph_is_captured() -> None:
    seen: list[bool] = []
    CudaCapture(CPU, cuda=JournalCuda())(lambda: seen.append(gc.isenabled()))
    assert seen == [False, False]
    assert gc.isenabled()


@pytest.mark.parametrize("refuses_to_end", [False, True])
def test_a_capture_that_fails_is_ended_and_names_the_first_error_in_one_line(refuses_to_end: bool) -> None:
    cuda = JournalCuda(refuses_to_end)

    def fail() -> None:
        if "begin pool thread_local" in cuda.journal:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    capture = CudaCapture(CPU, cuda=cuda)
    with pytest.raises(CaptureFailed) as caught:
        capture(fail)
    assert str(caught.value) == "a CUDA graph cannot be captured: operation not permitted when stream is capturing"
    assert str(caught.value.__cause__).endswith("more of it")
    assert cuda.journal[-1] == "end"
    assert gc.isenabled()
    assert capture.num_captured == 0


def test_an_error_of_ending_a_capture_is_told_if_it_is_the_only_one() -> None:
    with pytest.raises(CaptureFailed, match="capture was invalidated"):
        CudaCapture(CPU, cuda=JournalCuda(refuses_to_end=True))(lambda: None)
