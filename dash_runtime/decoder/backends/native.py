"""Runs passes in native code: all rows in one call, or shared products for many rows in FULL.

For passes of one row per sequence, and for verification. Knows layers and rows; knows no policies and no requests.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.backends.loop import LayerLoop, LoopEnds
from dash_runtime.decoder.backends.native_heads import NativeHeads
from dash_runtime.decoder.backends.native_plans import PassArguments, PassTranslator
from dash_runtime.decoder.backends.packed_model import PackedModel
from dash_runtime.layers.batch import Batch, PassKind
from dash_runtime.layers.embedding import PlainEmbedding
from dash_runtime.layers.heads import Head, Heads
from dash_runtime.layers.layer import DecoderLayer
from dash_runtime.layers.layer_body import Linears, run_layer_body
from dash_runtime.layers.rotary import queries_grow
from dash_runtime.layers.row_groups import group_rows, scatter_rows
from dash_runtime.layers.weight_loader import LayerWeights
from dash_runtime.linears.dense_linear import Linear, for_neighbours, most_rows_apart
from dash_runtime.linears.int4_matrix import LANES, is_packable
from dash_runtime.model_config import ModelConfig
from dash_runtime.native.library import NativeLibrary
from dash_runtime.native.matrix import pack_native_matrix
from dash_runtime.native.model import HeadRows, NativeModel, PackedLayer
from dash_runtime.native.structs import MOST_CHANNELS
from dash_runtime.passes import MOST_GUESSES, DrawTokens, Limit, PassPlan, PassResult

_Made = tuple[PassArguments, HeadRows | None]


class FullLayer(NamedTuple):
    """A layer's weights, and the layer that runs them in FULL by the library's products."""

    weights: LayerWeights
    layer: DecoderLayer


@dataclass(frozen=True, slots=True)
class _SharedLayer:
    """One layer for rows that share products: its norms, and its matrices in FULL."""

    norms: DecoderLayer
    linears: Linears[Linear]


class NativeBackend(LayerLoop):
    """Runs the passes of one decoder in native code; layer by layer, if somebody has a part between its layers.

    Args:
        actions: those that its layers are packed for.
        shares_products: if True, more than `most_apart` rows in FULL share their products with the library's kernels,
            where these are faster. A row's rounding then depends on how many neighbours it has. Otherwise no row's
            does.
    """

    def __init__(
        self, config: ModelConfig, library: NativeLibrary, actions: Sequence[Action], num_threads: int, *,
        shares_products: bool, most_apart: int | None = None,
    ) -> None:  # fmt: skip
        self._block, self._num_layers = config.block, config.num_layers
        ropes = list(dict.fromkeys(config.ropes))
        self._rows = NativeModel(library, config, [ropes.index(rope) for rope in config.ropes], num_threads)
        self._actions: list[Action] = [action for action in actions if action is not Action.SKIP]
        self._translator = PassTranslator(library, config.num_layers, config.hidden_size, {*self._actions, Action.SKIP})
        self.shares_products = shares_products
        self._most_apart = most_rows_apart() if most_apart is None else most_apart
        self._layers: list[_SharedLayer | None] = []
        self.logits = Heads({})
        self.heads = NativeHeads(self._rows, self._actions, shares_products)
        self._made: WeakKeyDictionary[PassPlan, tuple[Batch, _Made | None]] = WeakKeyDictionary()
        """The arguments of native code for passes, which may run step after step."""

    @property
    def uses_library(self) -> bool:
        """True if many rows in FULL take the library's products, and prompts with them."""
        return Action.FULL in self._actions and self._most_apart < sys.maxsize

    def add_layer(self, packed: PackedModel, own: FullLayer | None) -> None:
        """Takes the next layer, with `own` for the library's products."""
        index = len(self._layers)
        layer = packed.layer(index, [action for action in self._actions if own is None or action is not Action.FULL])
        matrices, shared = dict(layer.matrices), None
        if own is not None:
            weights, products = own.weights.linears.matrices(), own.layer.linears[Action.FULL]
            pairs = zip(weights, products.matrices(), strict=True)
            matrices[Action.FULL] = [
                (pack_native_matrix(Action.FULL, one, other), one.weight.shape[1]) for one, other in pairs
            ]
            shared = _SharedLayer(own.layer, products.mapped(for_neighbours, for_neighbours))
        self._rows.set_layer(index, PackedLayer(layer.vectors, matrices))
        self._layers.append(shared)

    def set_ends(
        self, ends: LoopEnds, embedding: PlainEmbedding, heads: Mapping[Action, Head], shared: Head | None
    ) -> None:
        """Sets the embedding, the heads by precision, and the head for many rows at once."""
        super().__init__(ends)
        self.logits = Heads(heads, shared if self.shares_products else None, self._most_apart)
        self._rows.set_embedding(embedding.weight, embedding.multiplier)

    def run(
        self, plan: PassPlan, token_ids: Sequence[int], batch: Batch, limit: Limit | None = None
    ) -> PassResult | None:
        made = self._made_for(plan, batch)
        if limit is not None:
            return None if made is None else self._run_burst(made, plan, token_ids, batch, limit)
        if made is None:
            return self.run_by_layer(plan, token_ids, batch)
        (plans, planner), head = made
        rows = self._translator.rows_of(batch)
        result = self._rows.run_tokens(token_ids, rows, plans, head, planner, plan.wants_logits)
        if head is None and plan.heads:
            assert result.states is not None
            return self.ended(plan, result.states, result.plans, result.record)
        return result

    def run_layer(self, layer: int, actions: Sequence[Action], hidden: Tensor, batch: Batch) -> Tensor:
        parts: list[tuple[list[int] | None, Tensor]] = []
        for (_, action), group in group_rows(in_turns(actions, batch)):
            if action is Action.SKIP:
                parts += self._skip(layer, hidden, batch, group)
                continue
            inputs = hidden if group is None else hidden[group]
            if action is Action.FULL and self._is_shared(batch, len(inputs)):
                outputs = self._run_shared(layer, inputs, batch, group)
            else:
                self._translator.check(action)
                own = self._translator.rows_of(batch, group)
                outputs = self._rows.run(inputs, own, action, layer, None, action)
            parts.append((group, outputs))
        return scatter_rows(parts, len(actions))

    @property
    def draw(self) -> DrawTokens:
        """Draws tokens from its passes' logits."""
        return self._rows.draw

    def _run_burst(
        self, made: _Made, plan: PassPlan, token_ids: Sequence[int], batch: Batch, limit: Limit
    ) -> PassResult | None:
        (plans, _), head = made
        if head is None:
            return None
        guessed = None
        if limit.guesses is not None:
            own = self._made_for(limit.guesses.plan, batch)
            if own is None or self.heads.of(list(plan.heads) * (1 + MOST_GUESSES), plan.wants_logits) is not head:
                return None
            guessed = own[0].plans
        return self._rows.run_burst(token_ids[0], limit, self._translator.rows_of(batch), plans, head, guessed)

    def _made_for(self, plan: PassPlan, batch: Batch) -> _Made | None:
        own = self._made.get(plan)
        if own is None or own[0] is not batch:
            own = self._made[plan] = batch, self._make(plan, batch)
        return own[1]

    def _make(self, plan: PassPlan, batch: Batch) -> _Made | None:
        """Returns what the native code is told of such passes; None if they run layer by layer."""
        num_full = sum(Action.FULL in row.pinned.values() for row in plan.rows) * (batch.num_rows // len(plan.rows))
        if self._is_shared(batch, num_full):
            return None
        arguments = self._translator.arguments(plan, batch)
        if arguments is None:
            return None
        is_apart = not plan.heads or self._is_shared(batch, batch.num_rows)
        return arguments, None if is_apart else self.heads.of(plan.heads, plan.wants_logits)

    def _skip(
        self, layer: int, hidden: Tensor, batch: Batch, group: list[int] | None
    ) -> list[tuple[list[int] | None, Tensor]]:
        """Lets rows skip a layer, those of one compensation in one call."""
        rows = range(len(hidden)) if group is None else group
        kinds: dict[tuple[int, Action], list[int]] = {}
        for row in rows:
            kinds.setdefault((id(batch.compensations[row]), batch.kv_actions[row]), []).append(row)
        parts: list[tuple[list[int] | None, Tensor]] = []
        for (_, kv_action), own in kinds.items():
            chosen = None if len(own) == len(hidden) else own
            inputs = hidden if chosen is None else hidden[chosen]
            compensation = batch.compensations[own[0]]
            packed = self._translator.compensated_by(compensation)
            self._translator.check(kv_action)
            own_rows = self._translator.rows_of(batch, chosen)
            outputs = self._rows.run(inputs, own_rows, Action.SKIP, layer, packed, kv_action)
            parts.append((chosen, compensation(layer, inputs) if packed is None else outputs))
        return parts

    def _is_shared(self, batch: Batch, num_rows: int) -> bool:
        is_verified = batch.kind is PassKind.VERIFY and len(batch.spans) == 1
        return self.shares_products and not is_verified and num_rows > self._most_apart

    def _run_shared(self, layer: int, inputs: Tensor, batch: Batch, group: list[int] | None) -> Tensor:
        """Runs rows in FULL, with one product and one attention for all of them."""
        own = self._layers[layer]
        assert own is not None

        def attend(normed: Tensor) -> Tensor:
            return self._rows.attend(layer, own.linears.query_key_value(normed), self._translator.rows_of(batch, group))

        return run_layer_body(self._block, own.norms, own.linears, inputs, attend)


def in_turns(actions: Sequence[Action], batch: Batch) -> list[tuple[int, Action]]:
    """Returns each row's action after the number of other actions that the rows before it in its sequence take turns
    with: it attends to what these write."""
    turns: list[tuple[int, Action]] = []
    for span in batch.spans:
        turn, before = 0, actions[span.first_row]
        for action in actions[span.first_row : span.first_row + span.num_rows]:
            turn += action is not before
            turns.append((turn, before := action))
    return turns


def why_eager(model: ModelConfig, context_length: int) -> str | None:
    """Returns what the native code cannot compute of this model's layers, None if it can compute all of it."""
    block = model.block
    sizes = [*model.matrices(), (model.vocab_size, model.hidden_size)]
    reasons = {
        "mixtures of experts": model.mixture is not None,
        "biases of outputs": block.has_output_bias or block.has_mlp_bias,
        "queries that grow with their position": any(
            rope is not None and queries_grow(rope, context_length) for rope in model.ropes
        ),
        "heads of this size": model.head_dim % LANES != 0 or model.head_dim > MOST_CHANNELS,
        "matrices of these sizes": not all(is_packable(*size) for size in sizes),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)
