"""CUDA graphs of the parts of a layer that do not depend on positions: the part before attention and the part after it.

A layer is some twenty kernels of a few microseconds, and launching each takes about as long; a graph launches them all
at once. There is one graph for each part, layer, action and number of rows, captured when it is first needed. Inputs
are copied to where the graph reads them, and padded to the next number of rows that has graphs.
Knows functions of tensors; knows no layers.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Capture = Callable[[Callable[[], Tensors]], tuple[Tensors, Callable[[], object]]]
"""Runs a function once, on the tensors that it closes over. Returns its outputs, and a function that recomputes them in
place. Raises RuntimeError if the device cannot."""

_BUCKETS = (1, 2, 4, 8, 16, 32)
_TOLERANCE = 0.05  # of the largest number, since another number of rows may get other kernels
_logger = logging.getLogger(__name__)


class Graphs:
    """Runs functions as graphs. Each is captured on its first call.

    If capturing fails, or a first replay differs from the function's own result, the reason is logged and everything
    runs without graphs from then on.
    """

    def __init__(self, capture: Capture, buckets: Sequence[int] = _BUCKETS) -> None:
        self._capture = capture
        self._buckets = sorted(buckets)
        self._graphs: dict[tuple[Hashable, int], _Graph] = {}
        self.is_broken = False

    def run(self, key: Hashable, function: Callable[..., Tensors], inputs: Tensors) -> Tensors:
        """Returns `function(*inputs)`. Every input and output is `[rows, …]`; the outputs are copies that stay valid.

        `key` must differ for another function, and for other shapes or types of inputs.
        """
        num_rows = len(inputs[0])
        bucket = next((size for size in self._buckets if size >= num_rows), None)
        if self.is_broken or bucket is None:
            return function(*inputs)
        graph = self._graphs.get((key, bucket))
        if graph is not None:
            return graph(inputs)
        expected = function(*inputs)
        try:
            graph = self._graphs[key, bucket] = _Graph(self._capture, function, inputs, bucket)
            if not all(map(_is_close, graph(inputs), expected)):
                raise RuntimeError("a graph computes something else than the layer")
        except RuntimeError as error:
            self.is_broken = True
            self._graphs.clear()
            _logger.warning("layers run without CUDA graphs: %s", str(error).splitlines()[0])
        return expected


class _Graph:
    def __init__(self, capture: Capture, function: Callable[..., Tensors], inputs: Tensors, bucket: int) -> None:
        # Padding repeats the first row: any numbers would do that raise no exceptions.
        self._inputs = [given[:1].expand(bucket, *given.shape[1:]).clone() for given in inputs]
        self._outputs, self._replay = capture(lambda: function(*self._inputs))

    def __call__(self, inputs: Tensors) -> Tensors:
        num_rows = len(inputs[0])
        for own, given in zip(self._inputs, inputs, strict=True):
            own[:num_rows].copy_(given)
        self._replay()
        return tuple(output[:num_rows].clone() for output in self._outputs)


def _is_close(own: Tensor, expected: Tensor) -> bool:
    return not own.numel() or bool((own - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def cuda_capture(device: torch.device, cuda: Any = torch.cuda) -> Capture:
    """Returns a capture on a stream of its own.

    All graphs share a pool of memory, since they run one after another and each one's outputs are copied before the
    next runs. `cuda` is `torch.cuda`, or anything with its `Stream`, `CUDAGraph`, `graph_pool_handle`, `stream` and
    `current_stream`.
    """
    stream, pool = cuda.Stream(device), cuda.graph_pool_handle()

    def capture(function: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], object]]:
        graph = cuda.CUDAGraph()
        stream.wait_stream(cuda.current_stream(device))
        with cuda.stream(stream):
            function()  # what a library sets up at its first call must not be captured
            # Another thread, or the policy's stream, may go on meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                outputs = function()
            finally:
                graph.capture_end()
        cuda.current_stream(device).wait_stream(stream)
        return outputs, graph.replay

    return capture
