"""Decoding on CUDA: eager layers whose parts are replayed as graphs. Has not been run on a GPU.

A mixture of experts runs without: the host reads which experts the rows have.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.backends.cuda_graphs import Graphs
from dash_runtime.decoder.backends.eager import EagerBackend, Part, Tensors
from dash_runtime.layers.heads import Heads
from dash_runtime.layers.layer import DecoderLayer
from dash_runtime.model_config import ModelConfig


class CudaBackend(EagerBackend):
    """Replays two graphs per layer: the parts before and after attention, which do not depend on positions."""

    def __init__(self, config: ModelConfig, layers: Sequence[DecoderLayer], heads: Heads, graphs: Graphs) -> None:
        super().__init__(config, layers, heads)
        self._graphs = graphs

    def _run_part(self, part: Part, layer: int, action: Action, *inputs: Tensor) -> Tensors:
        function = partial(part, self._layers[layer], action)
        if part == self._after_attention and self._config.mixture_of(layer) is not None:
            return function(*inputs)
        return self._graphs.run((part.__name__, layer, action), function, inputs)
