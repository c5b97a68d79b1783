"""Rounds a model's matrices to INT4 and INT3 by the inputs that they get on some text, then tunes them, layer by
layer, and says what that wins.

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
from dash_runtime.linears.grouped_matrix import GroupedMatrix, Place, is_nearly_exact
from dash_runtime.linears.quantization import BITS, rounded_linear
from dash_runtime.progress import Progress
from dash_runtime.training.dense_decoder import DenseDecoder, token_batch
from dash_runtime.training.gptq import quantize_for
from dash_runtime.training.loaded_model import LoadedModel
from dash_runtime.training.loss import divergences
from dash_runtime.training.tune_rounding import LayerPass, tune_rounding

_TOGETHER = 4
"""Sequences that run together, and by which a layer is tuned at a time."""


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """The matrices that one action changes, rounded by their inputs and tuned.

    The divergences are of that action in all layers, in nats per token, with each weight rounded to the nearest, and
    with these matrices.
    """

    matrices: Mapping[Place, GroupedMatrix]
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

    def copy(self) -> "_Paths":
        """Returns the same states, to be taken another way."""
        return _Paths(self.decoder, self.states)

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


@dataclass(slots=True)
class _Rounded:
    """One action's matrices, as far as they are made, and the states behind them: of the text that they are tuned by,
    and of the other text, with each weight rounded to the nearest and with these matrices."""

    action: Action
    text: _Paths
    nearest: _Paths
    ours: _Paths
    matrices: dict[Place, GroupedMatrix] = field(default_factory=dict)


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
    model: LoadedModel,
    actions: Sequence[Action],
    sequences: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    progress: Progress,
) -> Mapping[Action, QuantizedModel]:
    """Rounds the matrices that INT4 or INT3 would change, and tunes them behind the tuned layers before.

    Args:
        model: the model.
        actions: those to round for.
        sequences: the text whose inputs count, token ids in sequences of one length.
        held_out: the text that the divergences are of, likewise.
        progress: called with sentences.
    """
    decoder = model.dense_decoder()
    text, full = _Paths.begin(decoder, sequences), _Paths.begin(decoder, held_out)
    all_rounded = [_Rounded(own, text.copy(), full.copy(), full.copy()) for own in actions]
    for layer in range(decoder.num_layers):
        linears = model.layer_weights(layer).linears
        watched = linears.mapped(_Watched, _Watched)
        before = text.states
        text.run(layer, watched)
        full.run(layer, linears)
        for own in all_rounded:
            passes = [LayerPass(*each) for each in zip(own.text.states, before, text.states, strict=True)]
            begun = _quantized(own.action, watched)
            rounded = tune_rounding(partial(_run, decoder, layer), own.action, linears, begun, passes, seed=layer)
            own.matrices |= {(layer, place): matrix for place, matrix in rounded.items()}
            tuned = rounded_linears(own.action, linears, rounded)
            own.text.run(layer, tuned)
            own.ours.run(layer, tuned)
            own.nearest.run(layer, rounded_linears(own.action, linears, {}))
            done = "rounded" if rounded is begun else "rounded and tuned"
            progress(f"{done} layer {layer + 1} of {decoder.num_layers} for {own.action.name}")
    return {
        own.action: QuantizedModel(own.matrices, own.nearest.divergence_from(full), own.ours.divergence_from(full))
        for own in all_rounded
    }


def _quantized(action: Action, layer: Linears[_Watched]) -> dict[int, GroupedMatrix]:
    """Returns the matrices rounded by their inputs, by place, without those that have had none, or that INT4 hardly
    changes."""
    rounded: dict[int, GroupedMatrix] = {}

    def add(place: int, watched: _Watched) -> _Watched:
        weight, moments = watched.full.weight, watched.moments
        is_exact = action is Action.INT4 and is_nearly_exact(weight)
        if moments is not None and moments.diagonal().any() and not is_exact:
            rounded[place] = quantize_for(weight, BITS[action], moments)
        return watched

    layer.mapped_by_place(add, lambda router: router)
    return rounded


def rounded_linears(
    action: Action, layer: Linears[FullLinear], rounded: Mapping[int, GroupedMatrix]
) -> Linears[FullLinear]:
    """Returns what a layer in INT4 or INT3 computes with."""

    def matrix(place: int, full: FullLinear) -> FullLinear:
        own = {action: rounded[place]} if place in rounded else {}
        return rounded_linear(action, replace(full, rounded=own))

    return layer.mapped_by_place(matrix, lambda router: router)
