"""Runs passes in native code: all rows in one call, or layer by layer if somebody has a part between layers.

Knows layers and rows; knows no policies and no requests.
"""

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.backends.loop import LayerLoop, LoopEnds
from dash_runtime.decoder.backends.native_heads import NativeHeads
from dash_runtime.decoder.backends.native_plans import PassArguments, PassTranslator
from dash_runtime.decoder.backends.packed_model import PackedModel
from dash_runtime.layers.batch import Batch
from dash_runtime.layers.embedding import PlainEmbedding
from dash_runtime.layers.heads import Head, Heads
from dash_runtime.layers.rotary import queries_grow
from dash_runtime.layers.row_groups import group_rows, scatter_rows
from dash_runtime.linears.grouped_matrix import LANES, is_packable
from dash_runtime.model_config import ModelConfig
from dash_runtime.native.library import NativeLibrary
from dash_runtime.native.model import HeadRows, NativeModel
from dash_runtime.native.structs import MOST_CHANNELS
from dash_runtime.passes import MOST_GUESSES, DrawTokens, Limit, PassPlan, PassResult

_Made = tuple[PassArguments, HeadRows | None]


class NativeBackend(LayerLoop):
    """Runs the passes of one decoder in native code. No row's rounding depends on its neighbours.

    Args:
        actions: those that its layers are packed for.
        shares_heads: if True, many rows may take another head than few (`NativeHeads`).
    """

    def __init__(
        self, config: ModelConfig, library: NativeLibrary, actions: Sequence[Action], num_threads: int, *,
        shares_heads: bool,
    ) -> None:  # fmt: skip
        self._num_layers = config.num_layers
        ropes = list(dict.fromkeys(config.ropes))
        self._rows = NativeModel(library, config, [ropes.index(rope) for rope in config.ropes], num_threads)
        self._actions: list[Action] = [action for action in actions if action is not Action.SKIP]
        self._translator = PassTranslator(library, config.num_layers, config.hidden_size, {*self._actions, Action.SKIP})
        self.logits = Heads({})
        self.heads = NativeHeads(self._rows, self._actions, shares_heads)
        self._made: WeakKeyDictionary[PassPlan, tuple[Batch, _Made | None]] = WeakKeyDictionary()
        """The arguments of native code for passes, which may run step after step."""

    def set_layers(self, packed: PackedModel) -> None:
        """Takes all layers."""
        for index in range(self._num_layers):
            self._rows.set_layer(index, packed.layer(index, self._actions))

    def set_ends(self, ends: LoopEnds, embedding: PlainEmbedding, heads: Mapping[Action, Head]) -> None:
        """Sets the embedding, and the heads by precision."""
        super().__init__(ends)
        self.logits = Heads(heads)
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
            self._translator.check(action)
            own = self._translator.rows_of(batch, group)
            parts.append((group, self._rows.run(inputs, own, action, layer, None, action)))
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
        arguments = self._translator.arguments(plan, batch)
        if arguments is None:
            return None
        return arguments, self.heads.of(plan.heads, plan.wants_logits) if plan.heads else None

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
    inner = {model.mlp_size(layer) for layer in range(model.num_layers)}
    sizes = [*model.matrices(), *((size, size) for size in inner), (model.vocab_size, model.hidden_size)]
    reasons = {
        "biases of outputs": block.has_output_bias or block.has_mlp_bias,
        "queries that grow with their position": any(
            rope is not None and queries_grow(rope, context_length) for rope in model.ropes
        ),
        "heads of this size": model.head_dim % LANES != 0 or model.head_dim > MOST_CHANNELS,
        "matrices of these sizes": not all(is_packable(*size) for size in sizes),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)
