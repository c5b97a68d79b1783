"""Prefills prompts, a pass or a part of one in each step of the engine.

Knows sequences and kept prompts; knows no slots and no events.
"""

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.config import EngineConfig
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.prefix_cache import PrefixCache
from dash_runtime.engine.prompt_pace import PromptPace
from dash_runtime.engine.sequence import Sequence
from dash_runtime.layers.batch import Batch, PassKind
from dash_runtime.layers.compensation import Identity
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.passes import PassPlan

_FEWEST_ROWS = 16
"""The rows of a pass, at least: fewer take hardly less time."""
_WHOLE_SECONDS = 0.5
"""A pass that takes longer runs layer by layer, so that its worker can show that it works."""
Ended = list[tuple[Sequence, Tensor]]
"""Sequences with the rows of the last layer's output, `[rows, hidden_size]`, that tokens of their output follow."""


@dataclass(slots=True)
class _Pass:
    """The rows of some prompts, as far as they have come: `hidden` is the input of `layer`, None before the first."""

    sequences: list[Sequence]
    token_ids: list[list[int]]
    action: Action
    batch: Batch
    layer: int = 0
    hidden: Tensor | None = None

    @property
    def all_token_ids(self) -> list[int]:
        return [token_id for ids in self.token_ids for token_id in ids]


class PromptPasses:
    """The passes over prompts. A long prompt takes several, and beside others who decode each step runs a few layers of
    one.

    A beginning that an earlier prompt had too is copied instead. Where rows are apart, prompts share passes, and are
    cut wherever a pass is full. Elsewhere sequences run one at a time, and each is cut at multiples of the decoder's
    row block whatever runs beside it. So a sequence's numbers depend neither on its neighbours nor on how much of its
    prompt was copied.
    """

    def __init__(self, decoder: Decoder, config: EngineConfig) -> None:
        self._decoder = decoder
        self._chunk_tokens = config.prefill_chunk_tokens
        row_block = min(decoder.row_block, config.prefill_chunk_tokens)
        most = min(decoder.max_prompt_rows, config.prefill_chunk_tokens)
        self._cuts_at = 1 if decoder.rows_are_apart else row_block
        fewest = min(_FEWEST_ROWS, most) if decoder.rows_are_apart else row_block
        self.pace = PromptPace(fewest, most // row_block * row_block)
        self._prefix_cache = PrefixCache(config.prefix_cache_tokens, row_block)
        self._compensation = Identity()
        self._begun: _Pass | None = None

    @property
    def num_kept_tokens(self) -> int:
        """Prompt tokens whose keys and values are kept for later prompts."""
        return self._prefix_cache.num_tokens

    def drop(self, sequence: Sequence) -> None:
        """Forgets a sequence whose cache others may get. The others of its pass begin it again."""
        if self._begun is not None and sequence in self._begun.sequences:
            self._begun = None

    def run(self, sequences: Several[Sequence], is_decoding: bool, on_progress: Callable[[], None]) -> Iterator[Ended]:
        """Prefills one chunk, or a part of a pass if others decode. Yields after each pass.

        Args:
            on_progress: is called before each pass, and between layers that run by themselves.
        """
        num_left = self._chunk_tokens
        while num_left > 0:
            on_progress()
            own = self._begun or self._begin(sequences, num_left, is_decoding)
            if own is None:
                return
            self._begun = own
            first = own.layer
            if first < self._decoder.num_layers:
                self._go_on(own, is_decoding, on_progress)
                if own.layer < self._decoder.num_layers or (is_decoding and first):
                    return  # after parts of a pass the head takes a step of its own
            self._begun = None
            num_left = 0 if is_decoding else num_left - own.batch.num_rows
            yield self._end(own)

    def _begin(self, sequences: Several[Sequence], num_left: int, is_decoding: bool) -> _Pass | None:
        """Returns a pass with what fits into it: the tokens of the first prompt, or of several where rows are apart.
        None if nothing is left or fits."""
        waiting = [own for own in sequences if own.num_prompt_tokens_left]
        if not waiting:
            return None
        action = waiting[0].prefill_action
        num_rows = min(num_left, self.pace.num_rows(action, is_decoding))
        together: list[Sequence] = []
        token_ids: list[list[int]] = []
        for sequence in waiting if self._decoder.rows_are_apart else waiting[:1]:
            if sequence.prefill_action is not action:
                continue
            if not sequence.cache.length:
                sequence.num_cached_prompt_tokens = self._prefix_cache.copy_into(*self._prompt(sequence))
            most = num_rows - sum(map(len, token_ids))
            if sequence.num_prompt_tokens_left > most:
                most = most // self._cuts_at * self._cuts_at
            if not most:
                break
            together.append(sequence)
            token_ids.append(sequence.next_prompt_chunk(most))
        if not together:
            return None
        caches, lengths = [own.cache for own in together], list(map(len, token_ids))
        batch = self._decoder.batch(PassKind.PREFILL, caches, lengths, [self._compensation] * len(together))
        return _Pass(together, token_ids, action, batch)

    def _go_on(self, own: _Pass, is_decoding: bool, on_progress: Callable[[], None]) -> None:
        """Runs a pass; if others decode, some of its layers."""
        decoder, num_rows, first = self._decoder, own.batch.num_rows, own.layer
        started, num_layers = time.perf_counter(), decoder.num_layers - first
        if is_decoding:
            num_layers = min(num_layers, self.pace.num_layers(own.action, num_rows))
        expected = self.pace.seconds(own.action, num_rows, num_layers)
        if num_layers == decoder.num_layers and expected is not None and expected < _WHOLE_SECONDS:
            plan = PassPlan.of((own.action,) * num_layers, on_layer=on_progress)
            own.hidden = decoder.run_pass(plan, own.all_token_ids, own.batch).states
            own.layer = num_layers
        else:
            hidden = decoder.embed(own.all_token_ids) if own.hidden is None else own.hidden
            for own.layer in range(first + 1, first + num_layers + 1):
                on_progress()
                hidden = decoder.run_layer(own.layer - 1, (own.action,) * num_rows, hidden, own.batch)
            own.hidden = hidden
        self.pace.passed(own.action, num_rows, num_layers, time.perf_counter() - started)

    def _end(self, own: _Pass) -> Ended:
        own.batch.commit()
        assert own.hidden is not None
        ended: Ended = []
        for sequence, rows in zip(own.sequences, own.hidden.split(list(map(len, own.token_ids))), strict=True):
            if not sequence.num_prompt_tokens_left:
                self._prefix_cache.store(*self._prompt(sequence))
            if count := sequence.num_rows_to_put_out:
                ended.append((sequence, rows[-count:]))
        return ended

    def _prompt(self, sequence: Sequence) -> tuple[str, list[int], SequenceCache]:
        """Returns what the prefix cache is asked with: its caller's namespace, one for each precision and for sequences
        whose keys are rotated otherwise."""
        has_other_keys = self._decoder.has_other_keys(sequence.cache.reserved_tokens)
        namespace = f"{int(has_other_keys)}:{sequence.prefill_action.name}:{sequence.request.cache_namespace}"
        return namespace, sequence.request.prompt_token_ids, sequence.cache
