"""A decoder-only model, one layer at a time.

Knows weights, actions and rows; knows no policy, no sampling and no requests.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.backends.backend import Backend, Graphs
from dash_runtime.devices import Device, device_of, stretches_of
from dash_runtime.layers.batch import Batch, PassKind
from dash_runtime.layers.compensation import Compensation
from dash_runtime.layers.embedding import Embedding
from dash_runtime.layers.heads import Head, Heads
from dash_runtime.layers.kv_cache import CachePool, SequenceCache
from dash_runtime.layers.rotary import rotary_tables
from dash_runtime.model_config import ModelConfig
from dash_runtime.passes import DrawTokens, Limit, PassPlan, PassResult

Backends = Mapping[PassKind, Sequence[Backend]]
"""The backends for each kind of pass. The first that takes a pass runs it."""


@dataclass(eq=False, repr=False)
class Decoder:
    """The model's layers, embedding and heads."""

    config: ModelConfig
    actions: tuple[Action, ...]
    """The actions that layers can take."""
    backends: Backends
    """They run the layers. The last one for each kind takes every pass."""
    embed: Embedding
    """Maps token ids to the input of layer 0, `[tokens, hidden_size]`."""
    heads: Mapping[Action, Head]
    _: KW_ONLY
    dtype: torch.dtype
    devices: Sequence[torch.device]
    """One per layer. The embedding is on the first one's, the heads on the last one's."""
    context_length: int
    """Number of positions in the rotary tables."""
    max_prompt_rows: int
    """A prompt's row has the same bits in all passes of up to this many rows."""
    rows_are_apart: bool = False
    """True if no row's bits depend on the others of its pass, so that prompts may be cut anywhere and run together."""
    before_pass: Callable[[], None] | None = None
    """Called before every pass and layer that somebody runs by this object; see `patient`."""
    draw: DrawTokens | None = None
    """Draws tokens from decoded rows' logits; None if nothing does that is faster than numpy."""

    def __post_init__(self) -> None:
        config = self.config
        self.num_layers = config.num_layers
        self.placed_on: list[Device] = [device_of(own.device) for own in stretches_of(self.devices)]
        """The devices that layers lie on, in the order of layers."""
        self.row_block = self.placed_on[0].row_block
        """A prompt may be cut at multiples of this. If every pass begins at one and has at most `max_prompt_rows` rows,
        a row's bits do not depend on the cuts."""
        self._apart = Heads(self.heads)
        self._rotary = rotary_tables(config.ropes, config.head_dim, self.context_length, self.dtype, self.devices)
        self._split_tables = [table for table in dict.fromkeys(self._rotary) if table.first_row(self.context_length)]

    def patient(self, pause: Callable[[], None]) -> "Decoder":
        """Returns the same decoder for somebody who lets others go first: `pause` is called before every pass."""
        own = copy.copy(self)
        own.before_pass = pause
        return own

    @property
    def highest(self) -> Action:
        """The action of prompts, first tokens and verification: FULL, if that is offered."""
        return max(self.actions)

    @property
    def finest_head(self) -> Action:
        """The precision of their head."""
        return max(self.heads)

    @property
    def device(self) -> torch.device:
        """The first layer's device."""
        return self.devices[0]

    def synchronise(self) -> None:
        """Waits until all devices have done their queued work."""
        for device in self.placed_on:
            device.synchronise()

    def has_other_keys(self, num_tokens: int) -> bool:
        """Returns True if a sequence of up to `num_tokens` has other keys than a short one with the same tokens."""
        return any(table.first_row(num_tokens) for table in self._split_tables)

    def pool(self, total_tokens: int, max_sequences: int) -> CachePool:
        """Returns memory for so many positions of up to `max_sequences` sequences, as its backends need it."""
        has_graphs = self.graphs is not None
        return CachePool(self.config, total_tokens, self.dtype, self.devices, max_sequences, by_layer=has_graphs)

    def caches(self, sizes: Sequence[int]) -> list[SequenceCache]:
        """Returns one cache per size, which is its number of positions, in a pool of their own."""
        pool = self.pool(sum(sizes), len(sizes))
        return [cache for size in sizes if (cache := pool.reserve(size)) is not None]

    def batch(
        self,
        kind: PassKind,
        caches: Sequence[SequenceCache],
        lengths: Sequence[int],
        compensations: Sequence[Compensation],
        kv_actions: Sequence[Action] | None = None,
    ) -> Batch:
        """Returns the rows of one pass: the next `lengths[i]` positions of `caches[i]`.

        See `Batch` for the rest. Without `kv_actions`, skipped rows have keys and values in the highest action, which
        also takes the place of one that is not offered.
        """
        highest = self.highest
        kv_actions = [highest] * len(caches) if kv_actions is None else [min(own, highest) for own in kv_actions]
        return Batch(kind, caches, lengths, compensations, kv_actions, self.config, self._rotary, self.row_block)

    def run(
        self, plan: PassPlan, token_ids: Sequence[int], batch: Batch, limit: Limit | None = None
    ) -> PassResult | None:
        """Runs a pass over these tokens, one per row, or passes up to a limit; see `Backend`."""
        if self.before_pass is not None:
            self.before_pass()
        return self._backend_of(batch).run(plan, token_ids, batch, limit)

    def run_pass(self, plan: PassPlan, token_ids: Sequence[int], batch: Batch) -> PassResult:
        """Runs a pass over these tokens, one per row: embedding, layers and head."""
        result = self.run(plan, token_ids, batch)
        assert result is not None  # without a limit
        return result

    @property
    def graphs(self) -> Graphs | None:
        """The graphs of decoding; None where there are none."""
        return self.backends[PassKind.DECODE][0].graphs

    def run_layer(self, layer: int, actions: Sequence[Action], hidden: Tensor, batch: Batch) -> Tensor:
        """Runs one layer with each row's own action; see `Backend`."""
        if self.before_pass is not None:
            self.before_pass()
        return self._backend_of(batch).run_layer(layer, actions, hidden, batch)

    def _backend_of(self, batch: Batch) -> Backend:
        return next(backend for backend in self.backends[batch.kind] if backend.takes(batch))

    def logits(self, hidden: Tensor, precisions: Sequence[Action], kind: PassKind = PassKind.DECODE) -> Tensor:
        """Returns float32 `[rows, vocab_size]` from the last layer's output, with each row's head precision.

        Many rows of VERIFY share no product, so that each has the bits that it has when decoded alone.
        """
        heads = self._apart if kind is PassKind.VERIFY else self.backends[kind][0].logits
        return heads(hidden, precisions)
