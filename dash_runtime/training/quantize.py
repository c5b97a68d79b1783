"""Rounds a model's INT4 matrices by the inputs that they get on some text, then tunes them, layer by layer, and says
what that wins.

Knows layers and text; knows no files and no policies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.layers.layer_body import Linears
from dash_runtime.linears.dense_linear import FullLinear, Linear
from dash_runtime.linears.int4_matrix import Int4Matrix, Place, is_nearly_exact
from dash_runtime.linears.quantization import rounded_linear
from dash_runtime.progress import Progress
from dash_runtime.training.dense_decoder import DenseDecoder, token_batch
from dash_runtime.training.gptq import quantize_int4_for
from dash_runtime.training.loaded_model import LoadedModel
from dash_runtime.training.loss import divergences
from dash_runtime.training.tune_int4 import LayerPass, tune_int4

_TOGETHER = 4
"""Sequences that run together, and by which a layer is tuned at a time."""


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """The matrices that INT4 changes, rounded by their inputs and tuned.

    The divergences are of INT4 in all layers, in nats per token, with each weight rounded to the nearest, and with
    these matrices.
    """

    matrices: Mapping[Place, Int4Matrix]
    nearest_divergence: float
    divergence: float


@dataclass(slots=True)
class _Watched:
    """A matrix in FULL that adds up the second moments of its inputs, float32 `[in, in]`."""

    full: FullLinear
    moments: Tensor | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        rows = inputs.flatten(0, -2).float()
        self.moments = rows.T @ rows if self.moments is None else self.moments.addmm_(rows.T, rows)
        return self.full(inputs)


@dataclass(slots=True)
class _Paths:
    """The states of some sequences, in batches, before the layer that comes next."""

    decoder: DenseDecoder
    states: list[Tensor] = field(default_factory=list)

    @classmethod
    def begin(cls, decoder: DenseDecoder, sequences: Sequence[Sequence[int]]) -> "_Paths":
        ids = token_batch(sequences, 0)
        return cls(decoder, [decoder.embed(own) for own in ids.split(_TOGETHER)])

    def run(self, layer: int, linears: Linears[Linear]) -> None:
        """Takes the states through a layer with these matrices."""
        self.states = [_run(self.decoder, layer, states, linears) for states in self.states]

    def divergence_from(self, full: "_Paths") -> float:
        """Returns the mean divergence of the last layer's outputs."""
        pairs = zip(full.states, self.states, strict=True)
        each = [divergences(self.decoder, *(own.flatten(0, 1) for own in pair)) for pair in pairs]
        return float(torch.cat(each).mean())


def _run(decoder: DenseDecoder, layer: int, states: Tensor, linears: Linears[Linear]) -> Tensor:
    return decoder.run_layer(layer, Action.FULL, states, linears={Action.FULL: linears})


def is_changed_by_int4(model: LoadedModel) -> bool:
    """Returns True if INT4 changes a matrix of the layers, which it hardly does if the file has four bits a weight."""
    found: list[int] = []

    def look(place: int, full: FullLinear) -> FullLinear:
        if not found and not is_nearly_exact(full.weight):
            found.append(place)
        return full

    for layer in range(model.config.num_layers):
        if not found:
            model.layer_weights(layer).linears.mapped_by_place(look, lambda router: router)
    return bool(found)


@torch.no_grad()
def quantize(
    model: LoadedModel, sequences: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], progress: Progress
) -> QuantizedModel:
    """Rounds the matrices that INT4 would change, and tunes them behind the tuned layers before.

    Args:
        model: the model.
        sequences: the text whose inputs count, token ids in sequences of one length.
        held_out: the text that the divergences are of, likewise.
        progress: called with sentences.
    """
    decoder = model.dense_decoder()
    text, own_text = (_Paths.begin(decoder, sequences) for _ in range(2))
    full, nearest, ours = (_Paths.begin(decoder, held_out) for _ in range(3))
    matrices: dict[Place, Int4Matrix] = {}
    for layer in range(decoder.num_layers):
        linears = model.layer_weights(layer).linears
        watched = linears.mapped(_Watched, _Watched)
        before = text.states
        text.run(layer, watched)
        passes = [LayerPass(*own) for own in zip(own_text.states, before, text.states, strict=True)]
        begun = _quantized(watched)
        rounded = tune_int4(partial(_run, decoder, layer), linears, begun, passes, seed=layer)
        matrices |= {(layer, place): matrix for place, matrix in rounded.items()}
        full.run(layer, linears)
        nearest.run(layer, int4_linears(linears, {}))
        tuned = int4_linears(linears, rounded)
        own_text.run(layer, tuned)
        ours.run(layer, tuned)
        done = "rounded" if rounded is begun else "rounded and tuned"
        progress(f"{done} layer {layer + 1} of {decoder.num_layers}")
    return QuantizedModel(matrices, nearest.divergence_from(full), ours.divergence_from(full))


def _quantized(layer: Linears[_Watched]) -> dict[int, Int4Matrix]:
    """Returns the matrices rounded by their inputs, by place, without those that have had none or whose file had four
    bits."""
    rounded: dict[int, Int4Matrix] = {}

    def add(place: int, watched: _Watched) -> _Watched:
        weight, moments = watched.full.weight, watched.moments
        if moments is not None and moments.diagonal().any() and not is_nearly_exact(weight):
            rounded[place] = quantize_int4_for(weight, moments)
        return watched

    layer.mapped_by_place(add, lambda router: router)
    return rounded


def int4_linears(layer: Linears[FullLinear], rounded: Mapping[int, Int4Matrix]) -> Linears[FullLinear]:
    """Returns what a layer in INT4 computes with."""

    def matrix(place: int, full: FullLinear) -> FullLinear:
        return rounded_linear(Action.INT4, replace(full, int4=rounded.get(place)))

    return layer.mapped_by_place(matrix, lambda router: router)
