"""Decodes with native code: all rows in one call, or shared products for many rows in FULL.

For passes of one row per sequence, and for verification. Knows layers and rows; knows no policies and no requests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor, bfloat16

from dash_runtime.actions import Action
from dash_runtime.decoder.backends.backend import OwnMemory
from dash_runtime.decoder.backends.native_heads import NativeHeads
from dash_runtime.devices import device_of
from dash_runtime.devices.one_thread import one_thread
from dash_runtime.layers.batch import Batch, PassKind
from dash_runtime.layers.compensation import Compensation
from dash_runtime.layers.embedding import Embedding, HeadsEmbedding, PlainEmbedding
from dash_runtime.layers.heads import Head, Heads
from dash_runtime.layers.layer import DecoderLayer
from dash_runtime.layers.layer_body import Linears, run_layer_body
from dash_runtime.layers.pass_plan import PassPlan, PassRun
from dash_runtime.layers.rotary import queries_grow
from dash_runtime.layers.row_compensation import pack_for_rows
from dash_runtime.layers.row_groups import group_rows, scatter_rows
from dash_runtime.layers.weight_loader import LayerWeights
from dash_runtime.linears.dense_linear import FullLinear, Linear, for_neighbours, most_rows_apart
from dash_runtime.linears.quantization import quantized_parts
from dash_runtime.model_config import ModelConfig
from dash_runtime.rows.burst import Burst, WantedBurst
from dash_runtime.rows.draws import DrawTokens
from dash_runtime.rows.library import RowsLibrary
from dash_runtime.rows.model_rows import Chosen, HeadRows, ModelRows, PackedLayer
from dash_runtime.rows.pass_rows import CompensatedLayers, PlannerTable, PlannerTables, RowPlan, RowPlans
from dash_runtime.rows.row_matrix import (
    RowMatrix,
    is_packable,
    pack_row_matrix,
)
from dash_runtime.rows.structs import LANES, MOST_CHANNELS, MOST_GUESSES, NORMS


@dataclass(frozen=True, slots=True)
class _SharedLayer:
    """One layer for rows that share products: its norms, and its matrices in FULL."""

    norms: DecoderLayer
    linears: Linears[Linear]


_Made = tuple[RowPlans, HeadRows | None, PlannerTable | None]


class NativeBackend(OwnMemory):
    """Runs the layers of one decoder in native code.

    Args:
        actions: those that its layers are packed for.
        shares_products: if True, more than `most_rows_apart` rows in FULL share their products with the library's
            kernels. That is faster, but a row's rounding then depends on how many neighbours it has. Otherwise no row's
            does.
    """

    def __init__(
        self, config: ModelConfig, library: RowsLibrary, actions: Sequence[Action], num_threads: int, *,
        shares_products: bool,
    ) -> None:  # fmt: skip
        self._block, self._num_layers, self._hidden_size = config.block, config.num_layers, config.hidden_size
        ropes = list(dict.fromkeys(config.ropes))
        self._rows = ModelRows(library, config, [ropes.index(rope) for rope in config.ropes], num_threads)
        self._actions: list[Action] = [action for action in actions if action is not Action.SKIP]
        self._possible = {*self._actions, Action.SKIP}
        self.shares_products = shares_products
        self._layers: list[_SharedLayer] = []
        self._compensated: dict[int, tuple[Compensation, CompensatedLayers | None]] = {}
        """By the compensation's id; the compensation is kept, so that nothing else gets it."""
        self.logits = Heads({})
        self.heads = NativeHeads(self._rows, self._actions, shares_products)
        self._has_embedding = False
        self._planners = PlannerTables()
        self._made: WeakKeyDictionary[PassPlan, tuple[Batch, _Made | None]] = WeakKeyDictionary()
        """The arguments of native code for passes, which may run step after step."""

    def add_layer(self, weights: LayerWeights, layer: DecoderLayer) -> None:
        """Packs the next layer's matrices; `layer` has those for eager passes in FULL."""
        linears = layer.linears[Action.FULL]
        with one_thread():  # many small operations, for which threads beside a busy process wait for seconds
            packed = {action: packed_matrices(action, weights.linears, linears) for action in self._actions}
        self._rows.set_layer(len(self._layers), PackedLayer(layer_vectors(weights), packed))
        self._layers.append(_SharedLayer(layer, linears.mapped(for_neighbours, for_neighbours)))

    def set_ends(self, embedding: Embedding, heads: Mapping[Action, Head], shared: Head) -> None:
        """Sets the embedding, the heads by precision, and the head for many rows at once."""
        self.logits = Heads(heads, shared if self.shares_products else None, most_rows_apart())
        self.heads.keep(heads)
        self._has_embedding = True
        match embedding:
            case HeadsEmbedding(words, multiplier):
                self._rows.set_embedding(words, multiplier)
            case PlainEmbedding(weight, multiplier) if weight.dtype is bfloat16 and weight.is_contiguous():
                self._rows.set_embedding(weight, multiplier)
            case _:
                self._has_embedding = False

    def takes(self, batch: Batch) -> bool:
        return True

    @property
    def decides_in_pass(self) -> bool:
        return True

    def run_layer(self, layer: int, actions: Sequence[Action], hidden: Tensor, batch: Batch) -> Tensor:
        parts: list[tuple[list[int] | None, Tensor]] = []
        for action, group in group_rows(actions):
            if action is Action.SKIP:
                parts += self._skip(layer, hidden, batch, group)
                continue
            inputs = hidden if group is None else hidden[group]
            if action is Action.FULL and self._is_shared(batch, len(inputs)):
                outputs = self._run_shared(layer, inputs, batch, group)
            else:
                self._check(action)
                own = batch.rows_of(group)
                outputs = self._rows.run(inputs, own, bytes([action]), range(layer, layer + 1), None, action)
            parts.append((group, outputs))
        return scatter_rows(parts, len(actions))

    def run_layers(self, action: Action, hidden: Tensor, batch: Batch) -> Tensor | None:
        kv_action, compensation = batch.kv_actions[0], self._compensated_by(batch.compensations[0])
        if compensation is None or not batch.skips_alike:
            return None
        if action is Action.FULL and self._is_shared(batch, batch.num_rows):
            return None
        self._check(action, kv_action)
        layers, rows = range(self._num_layers), batch.rows_of(None)
        return self._rows.run(hidden, rows, bytes([action]) * len(layers), layers, compensation, kv_action)

    def run_pass(self, plan: PassPlan, token_ids: Sequence[int], batch: Batch) -> PassRun | None:
        made = self._made_for(plan, batch)
        if made is None:
            return None
        plans, head, planner = made
        output = self._rows.run_tokens(token_ids, batch.rows_of(None), plans, head, planner, plan.wants_logits)
        if isinstance(output, Tensor):
            logits = self.logits(output, plan.heads)
            output = Chosen(logits, device_of(logits.device).likeliest(logits))
        ran = plans.ran()
        return PassRun(*output, ran if len(ran) > 1 else ran * len(token_ids), self._rows.times)

    def run_burst(
        self, plan: PassPlan, wanted: WantedBurst, batch: Batch, guessed: PassPlan | None = None
    ) -> Burst | None:
        made = self._made_for(plan, batch)
        plans, head, _ = made or (None, None, None)
        if plans is None or head is None:
            return None
        guessed_plans: RowPlans | None = None
        if wanted.guesses is not None:
            assert guessed is not None
            made = self._made_for(guessed, batch)
            if made is None or self.heads.of(list(plan.heads) * (1 + MOST_GUESSES), plan.wants_logits) is not head:
                return None
            guessed_plans = made[0]
        return self._rows.run_burst(wanted, batch.rows_of(None), plans, head, guessed_plans)

    @property
    def draw(self) -> DrawTokens:
        return self._rows.draw

    def _made_for(self, plan: PassPlan, batch: Batch) -> _Made | None:
        own = self._made.get(plan)
        if own is None or own[0] is not batch:
            own = self._made[plan] = batch, self._make(plan, batch)
        return own[1]

    def _make(self, plan: PassPlan, batch: Batch) -> _Made | None:
        """Returns what the native code is told of such passes; None if it cannot run them."""
        num_rows, decided = batch.num_rows, list(plan.decided)
        pinned = [bytes(own.get(layer, 0) for layer in range(self._num_layers)) for own, _ in decided]
        compensated = [own for given in batch.compensations if (own := self._compensated_by(given)) is not None]
        if not self._has_embedding or len(compensated) < num_rows:
            return None
        num_full = sum(Action.FULL in own for own in pinned) * (num_rows // len(decided))
        if self._is_shared(batch, num_full):
            return None
        if len(decided) == 1 and not batch.skips_alike:
            decided, pinned = decided * num_rows, pinned * num_rows
        if len(decided) > 1 and batch.kind is not PassKind.DECODE:
            return None
        self._check(*batch.kv_actions, *(Action(own) for own in set(b"".join(pinned)) - {0}))
        skips = zip(compensated, batch.kv_actions, strict=True)
        rows = [RowPlan(own, by, *skip) for own, (_, by), skip in zip(pinned, decided, skips, strict=False)]
        plans = RowPlans(rows, plan.attends_rounded)
        head = None if self._is_shared(batch, num_rows) else self.heads.of(plan.heads, plan.wants_logits)
        planner = None
        if plan.latencies is not None and len(decided) > 1:
            planner = self._planners.get(plan.latencies, num_rows)
        return plans, head, planner

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
            packed = self._compensated_by(compensation)
            self._check(kv_action)
            layers = range(layer, layer + 1)
            outputs = self._rows.run(inputs, batch.rows_of(chosen), bytes([Action.SKIP]), layers, packed, kv_action)
            parts.append((chosen, compensation(layer, inputs) if packed is None else outputs))
        return parts

    def _is_shared(self, batch: Batch, num_rows: int) -> bool:
        is_verified = batch.kind is PassKind.VERIFY and len(batch.spans) == 1
        return self.shares_products and not is_verified and num_rows > most_rows_apart()

    def _run_shared(self, layer: int, inputs: Tensor, batch: Batch, group: list[int] | None) -> Tensor:
        """Runs rows in FULL, with one product and one attention for all of them."""
        own = self._layers[layer]

        def attend(normed: Tensor) -> Tensor:
            return self._rows.attend(layer, own.linears.query_key_value(normed), batch.rows_of(group))

        return run_layer_body(self._block, own.norms, own.linears, inputs, attend)

    def _compensated_by(self, compensation: Compensation) -> CompensatedLayers | None:
        """Returns the compensation for native code; None if it has none of this kind."""
        made = self._compensated.get(id(compensation))
        if made is None:
            layers = pack_for_rows(compensation, self._num_layers, self._hidden_size)
            made = self._compensated[id(compensation)] = compensation, layers
        return made[1]

    def _check(self, *actions: Action) -> None:
        """Raises ValueError for an action without matrices: native code would read memory that is not there."""
        if missing := set(actions) - self._possible:
            raise ValueError(f"layers are not packed for {min(missing).name}")


def packed_matrices(
    action: Action, weights: Linears[FullLinear], linears: Linears[Linear]
) -> list[tuple[RowMatrix, int]]:
    """Packs a layer's matrices for `PackedLayer`; those in FULL share the memory of `linears`."""
    matrices = weights.matrices()
    if action is Action.FULL:
        pairs = zip(matrices, linears.matrices(), strict=True)
        return [(pack_row_matrix(action, own, linear), own.weight.shape[1]) for own, linear in pairs]
    first, *key_values = quantized_parts(action, matrices[0])
    parts = [first, *((action, own) for own in matrices[1:]), *key_values]
    return [(pack_row_matrix(precision, own), own.weight.shape[1]) for precision, own in parts]


def layer_vectors(weights: LayerWeights) -> dict[str, Tensor]:
    """Returns a layer's vectors by the names that the native code has for them."""
    norms = {name: getattr(weights, name) for name in (*NORMS, "query_norm", "key_norm")}
    vectors = {name: norm.weight for name, norm in norms.items() if norm is not None}
    others = {"head_norm": weights.head_norm, "bias": weights.linears.query_key_value.bias}
    return vectors | {name: own for name, own in others.items() if own is not None}


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
