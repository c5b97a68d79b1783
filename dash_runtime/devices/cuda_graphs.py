"""CUDA graphs: what a function queues, recorded once and launched as one. Has not been run on a GPU.

A layer is some twenty kernels of a few microseconds, and launching each takes about as long. Knows functions; knows no
layers.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

Replay = Callable[[], object]


class CaptureFailed(RuntimeError):
    """The device could not record a function. Its allocator may be broken since, so the process has to end."""


Capture = Callable[[Callable[[], None]], Replay]
"""Runs a function, and returns what launches the same work again on the current stream.

The function reads and writes only memory that stays where it is: weights, static buffers, and what it makes itself. It
runs twice, so it may not change what it reads. Raises CaptureFailed if the device cannot record it.
"""


class CudaCapture:
    """Records functions on one device, on a stream of its own.

    All graphs share a pool of memory, so they have to be launched one after another on one stream.

    Args:
        stream: the one to record on; None makes one.
        cuda: `torch.cuda`, or anything with its `Stream`, `CUDAGraph`, `graph_pool_handle`, `stream` and
            `current_stream`.
    """

    def __init__(self, device: torch.device, stream: Any = None, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._stream = cuda.Stream(device) if stream is None else stream
        self._pool = cuda.graph_pool_handle()
        self.num_captured = 0
        self.seconds = 0.0
        """The time that capturing has taken."""

    def __call__(self, function: Callable[[], None]) -> Replay:
        started = time.perf_counter()
        graph, stream, cuda = self._cuda.CUDAGraph(), self._stream, self._cuda
        stream.wait_stream(cuda.current_stream(self._device))
        try:
            with collected_garbage(), cuda.stream(stream):
                function()  # what a library sets up at its first call must not be captured
                # Another thread, or another stream, may go on meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    function()
                except RuntimeError:
                    with suppress(RuntimeError):  # it only says that the capture had failed before
                        graph.capture_end()
                    raise
                graph.capture_end()
        except RuntimeError as error:
            raise CaptureFailed(f"a CUDA graph cannot be captured: {str(error).splitlines()[0]}") from error
        cuda.current_stream(self._device).wait_stream(stream)
        self.num_captured += 1
        self.seconds += time.perf_counter() - started
        return graph.replay


@contextmanager
def collected_garbage() -> Iterator[None]:
    """Keeps Python from collecting garbage: a graph that is destroyed during a capture breaks it.

    Garbage is collected before. Inside another such context it does nothing.
    """
    if not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
