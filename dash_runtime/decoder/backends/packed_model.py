"""A model's weights as native code reads them: tensors by name, wherever they lie.

Knows layers, heads and precisions; knows no files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.actions import Action
from dash_runtime.devices.one_thread import one_thread
from dash_runtime.layers.layer_body import Linears
from dash_runtime.layers.mlp import Mixture
from dash_runtime.layers.narrow_head import HeadMap, NarrowMatrices
from dash_runtime.layers.norm import RmsNorm
from dash_runtime.layers.shortlist import loudest_channels
from dash_runtime.layers.weight_loader import LayerWeights, WeightLoader
from dash_runtime.linears.dense_linear import FullLinear
from dash_runtime.linears.grouped_matrix import LANES
from dash_runtime.linears.quantization import quantized_parts, refined_linear, rounded_linear
from dash_runtime.model_config import ModelConfig
from dash_runtime.native.matrix import (
    NativeMatrix,
    RefinedNativeMatrix,
    int8_errors,
    matrix_of,
    named_tensors,
    pack_int4_and_further,
    pack_native_matrix,
    pack_outputs,
    pack_rough_matrix,
)
from dash_runtime.native.model import PackedLayer
from dash_runtime.native.structs import NORMS

_NUM_COMPARED = 64
"""Outputs of each matrix of which errors are measured."""
Take = Callable[[str, Tensor], object]
"""Keeps a packed tensor by its name."""


class Part(StrEnum):
    """What is packed together. A server needs `ENDS` and the parts of its actions."""

    ENDS = "ends"
    """The embedding, all vectors, and the head in INT8, from which the one in INT4 takes its likeliest tokens."""
    INT3 = "int3"
    INT4 = "int4"
    INT8 = "int8"
    """The further bits that layers in INT8 have beside INT4."""
    FULL = "full"
    NARROW = "narrow"
    """A narrow head, for the map of a policy."""

    @classmethod
    def of(cls, action: Action) -> "Part":
        """Returns the part of an action with a kernel."""
        return cls[action.name]


def parts_of(actions: Sequence[Action], head_map: HeadMap | None) -> list[Part]:
    """Returns the parts that native code needs for some actions."""
    wanted = {Part.of(action) for action in actions if action is not Action.SKIP}
    if Part.INT8 in wanted:
        wanted.add(Part.INT4)
    own = [part for part in Part if part is Part.ENDS or part in wanted]
    return own if head_map is None else [*own, Part.NARROW]


class PackedModel:
    """The tensors of some parts."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        self._config = config
        self._tensors = tensors

    @property
    def embedding(self) -> Tensor:
        """The embedding, `[vocab_size, hidden_size]`."""
        return self._tensors["embedding"]

    @property
    def final_norm(self) -> RmsNorm:
        """The norm before the head."""
        return RmsNorm(self._tensors["final_norm"], self._config.rms_norm_eps)

    @property
    def loudest(self) -> Tensor:
        """The channels that a rough head has twice, int64; see `loudest_channels`."""
        return self._tensors["loudest"]

    def error(self, action: Action) -> float:
        """Returns how far the layers' weights in this action are from the model's own: the root of the mean squared
        difference, as a share of theirs."""
        squares = self._tensors.get(f"error.{action.name}")
        return 0.0 if squares is None else float((squares[0] / squares[1].clamp_min(1e-30)).sqrt())

    @property
    def mean_row(self) -> Tensor:
        """The mean of a narrow head's outputs, float32 `[hidden_size]`."""
        return self._tensors["mean_row"]

    def matrix(self, name: str) -> NativeMatrix:
        """Returns a matrix, such as `head.INT8`."""
        found = matrix_of(name, self._tensors)
        assert found is not None, name
        return found

    def layer(self, index: int, actions: Sequence[Action]) -> PackedLayer:
        """Returns a layer with the matrices of some actions."""
        prefix = f"layers.{index}."
        vectors = {name: self._tensors.get(f"{prefix}{name}") for name in _VECTORS}
        inputs = [own[1] for own in self._config.matrices(index)]
        inputs.append(inputs[0])  # of keys and values, where they are apart

        def matrices_of(action: Action) -> list[NativeMatrix]:
            own = (matrix_of(f"{prefix}{place}.{action.name}", self._tensors) for place in range(len(inputs)))
            return [matrix for matrix in own if matrix is not None]

        matrices: dict[Action, list[tuple[NativeMatrix, int]]] = {}
        for action in actions:
            found = matrices_of(action)
            if action is Action.INT8:
                found = refined(matrices_of(Action.INT4), found)
            matrices[action] = list(zip(found, inputs, strict=False))
        router = matrix_of(f"{prefix}router", self._tensors)
        return PackedLayer({name: own for name, own in vectors.items() if own is not None}, matrices, router)


_VECTORS = (*NORMS, "query_norm", "key_norm", "head_norm", "bias")


def pack_by_layer(loader: WeightLoader, takers: Mapping[Part, Take], head_map: HeadMap | None = None) -> Iterator[int]:
    """Packs some parts of a model, with one layer in memory at a time. Yields how many layers are done after each; the
    ends follow the last one.

    Args:
        takers: get each part's tensors.
        head_map: that of the narrow head; needed for it only.
    """
    actions = [action for action in Action if action is not Action.SKIP and Part.of(action) in takers]
    squares: dict[Action, Tensor] = {action: torch.zeros(2) for action in actions}
    ends = takers.get(Part.ENDS)
    for index in range(loader.config.num_layers):
        weights = loader.layer(index)
        matrices = native_matrices(weights.linears)
        with one_thread():  # many small operations, for which threads beside a busy process wait for seconds
            for action, packed in packed_matrices(actions, matrices).items():
                for place, matrix in enumerate(packed):
                    _take(takers[Part.of(action)], f"layers.{index}.{place}.{action.name}", matrix)
                for full in matrices if action is not Action.FULL else ():
                    squares[action] += _squares_of_some(action, full)
        if ends is not None:
            if isinstance(weights.linears.mlp, Mixture):
                _take(ends, f"layers.{index}.router", pack_router(weights.linears.mlp.router))
            for name, vector in layer_vectors(weights).items():
                ends(f"layers.{index}.{name}", vector.float())
        yield index + 1
    for action in actions:
        takers[Part.of(action)](f"error.{action.name}", squares[action])
    final_norm = loader.final_norm()
    loudest = loudest_channels(weights, final_norm)
    del weights
    embedding = loader.embedding()
    head = embedding if loader.config.has_tied_head else loader.head()
    if ends is not None:
        ends("embedding", embedding)
        ends("final_norm", final_norm.weight)
    del embedding
    pack_head(takers, FullLinear(head), loudest)
    if Part.NARROW in takers and head_map is not None:
        pack_narrow_head(takers[Part.NARROW], head, loudest, head_map)


def pack_head(takers: Mapping[Part, Take], head: FullLinear, loudest: Tensor) -> None:
    """Packs a head for some parts."""
    if Part.ENDS in takers:
        _take(takers[Part.ENDS], "head.INT8", pack_native_matrix(Action.INT8, head))
        _take(takers[Part.ENDS], "head.ERRORS", int8_errors(head))
        takers[Part.ENDS]("loudest", loudest)
    if Part.INT4 in takers:
        _take(takers[Part.INT4], "head.INT4", pack_rough_matrix(head, loudest))
    if Part.FULL in takers:
        _take(takers[Part.FULL], "head.FULL", pack_native_matrix(Action.FULL, head))


def pack_narrow_head(take: Take, weight: Tensor, loudest: Tensor, head_map: HeadMap) -> None:
    """Packs what is a narrow head's own of the matrix `weight`."""
    matrices = NarrowMatrices.of(weight, head_map.widen)
    _take(take, "narrow.INT8", pack_native_matrix(Action.INT8, FullLinear(head_map.narrow.to(weight))))
    _take(take, "narrow.INT4", pack_native_matrix(Action.INT4, matrices.widened))
    _take(take, "narrow.OUTPUTS", pack_outputs(FullLinear(weight), loudest))
    take("mean_row", matrices.mean)


def packed_matrices(
    actions: Sequence[Action], matrices: Sequence[FullLinear]
) -> Mapping[Action, Sequence[NativeMatrix]]:
    """Packs a layer's `native_matrices` for `PackedLayer`; of INT8 what `refined` takes beside INT4."""
    packed: dict[Action, Sequence[NativeMatrix]] = {}
    if Action.INT8 in actions:
        parts, keys = _parts(Action.INT4, matrices)
        coarse, further = zip(*map(pack_int4_and_further, parts), strict=True)
        packed[Action.INT8] = further
        if Action.INT4 in actions:
            packed[Action.INT4] = [*coarse, *keys]
    for action in [own for own in actions if own not in packed]:
        parts, keys = _parts(action, matrices)
        packed[action] = [*(pack_native_matrix(action, own) for own in parts), *keys]
    return packed


def _parts(action: Action, matrices: Sequence[FullLinear]) -> tuple[Sequence[FullLinear], list[NativeMatrix]]:
    """Returns what runs in an action, and packs keys and values if they are finer."""
    if action is Action.FULL:
        return matrices, []
    first, *others = matrices
    (_, queries), *finer = quantized_parts(action, first)
    return [queries, *others], [pack_native_matrix(precision, own) for precision, own in finer]


def refined(coarse: Sequence[NativeMatrix], further: Sequence[NativeMatrix]) -> list[NativeMatrix]:
    """Returns a layer's matrices in INT8. What is finer in INT4 anyhow stays as it is there."""
    pairs = zip(coarse, further, strict=False)
    return [*(RefinedNativeMatrix.of(*own) for own in pairs), *coarse[len(further) :]]


def native_matrices(weights: Linears[FullLinear]) -> Sequence[FullLinear]:
    """Returns query-key-value, output, gate-up and down, all experts' outputs one after the other."""
    if not isinstance(weights.mlp, Mixture):
        return weights.matrices()
    experts = weights.mlp.experts
    kinds = [expert.gate_up.weight for expert in experts], [expert.down.weight for expert in experts]
    return weights.query_key_value, weights.output, *(FullLinear(torch.cat(kind)) for kind in kinds)


def pack_router(router: FullLinear) -> NativeMatrix:
    """Packs a router, with outputs of zeros up to a whole tile."""
    missing = -len(router.weight) % LANES
    return pack_native_matrix(Action.FULL, FullLinear(functional.pad(router.weight, (0, 0, 0, missing))))


def layer_vectors(weights: LayerWeights) -> dict[str, Tensor]:
    """Returns a layer's vectors by the names that the native code has for them."""
    norms = {name: getattr(weights, name) for name in (*NORMS, "query_norm", "key_norm")}
    vectors = {name: norm.weight for name, norm in norms.items() if norm is not None}
    others = {"head_norm": weights.head_norm, "bias": weights.linears.query_key_value.bias}
    return vectors | {name: own for name, own in others.items() if own is not None}


def _squares_of_some(action: Action, full: FullLinear) -> Tensor:
    """Returns the squares of what an action changes of some of a matrix's weights, and of these, float32 `[2]`."""
    some = full.outputs(0, _NUM_COMPARED)
    rounded_some = refined_linear(some) if action is Action.INT8 else rounded_linear(action, some)
    own, rounded = some.weight.float(), rounded_some.weight.float()
    return torch.stack(((rounded - own).square().sum(), own.square().sum()))


def _take(take: Take, name: str, matrix: NativeMatrix) -> None:
    for key, tensor in named_tensors(name, matrix).items():
        take(key, tensor)
