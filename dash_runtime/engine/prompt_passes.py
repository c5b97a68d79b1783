"""Prefills prompts, a pass or a few in each step of the engine.

Knows sequences and kept prompts; knows no slots and no events.
"""

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several

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
"""Of a pass: fewer take hardly less time."""
_Chunks = list[tuple[Sequence, list[int]]]
Ended = list[tuple[Sequence, Tensor]]
"""Sequences with the rows of the last layer's output, `[rows, hidden_size]`, that tokens of their output follow."""


class PromptPasses:
    """The passes over prompts. A long one takes several steps, so that others go on.

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

    @property
    def num_kept_tokens(self) -> int:
        """Prompt tokens whose keys and values are kept for later prompts."""
        return self._prefix_cache.num_tokens

    def run(self, sequences: Several[Sequence], is_decoding: bool, on_progress: Callable[[], None]) -> Iterator[Ended]:
        """Prefills one chunk, in one pass if others decode. Yields after each pass.

        Args:
            on_progress: is called before each pass, and after each layer that runs by itself.
        """
        num_left = self._chunk_tokens
        waiting = [own for own in sequences if own.num_prompt_tokens_left]
        while waiting and num_left > 0:
            on_progress()
            action = waiting[0].prefill_action
            num_rows = min(num_left, self.pace.num_rows(action, is_decoding))
            chunks = self._next_chunks(waiting, action, num_rows)
            if not chunks:
                return
            num_left = 0 if is_decoding else num_left - sum(len(ids) for _, ids in chunks)
            yield self._run_pass(chunks, action, on_progress)
            waiting = [own for own in waiting if own.num_prompt_tokens_left]

    def _next_chunks(self, waiting: Several[Sequence], action: Action, num_rows: int) -> _Chunks:
        """Returns what fits into a pass: the tokens of the first prompt, or of several where rows are apart."""
        chunks: _Chunks = []
        for sequence in waiting if self._decoder.rows_are_apart else waiting[:1]:
            if sequence.prefill_action is not action:
                continue
            if not sequence.cache.length:
                sequence.num_cached_prompt_tokens = self._prefix_cache.copy_into(*self._prompt(sequence))
            most = num_rows - sum(len(ids) for _, ids in chunks)
            if sequence.num_prompt_tokens_left > most:
                most = most // self._cuts_at * self._cuts_at
            if not most:
                break
            chunks.append((sequence, sequence.next_prompt_chunk(most)))
        return chunks

    def _run_pass(self, chunks: _Chunks, action: Action, on_progress: Callable[[], None]) -> Ended:
        plan = PassPlan.of((action,) * self._decoder.num_layers, on_layer=on_progress)
        lengths = [len(ids) for _, ids in chunks]
        batch = self._decoder.batch(
            PassKind.PREFILL, [own.cache for own, _ in chunks], lengths, [self._compensation] * len(chunks)
        )
        started = time.perf_counter()
        hidden = self._decoder.run_pass(plan, [token_id for _, ids in chunks for token_id in ids], batch).states
        self.pace.passed(action, batch.num_rows, time.perf_counter() - started)
        assert hidden is not None
        batch.commit()
        ended: Ended = []
        for (sequence, _), rows in zip(chunks, hidden.split(lengths), strict=True):
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


def full_depth_batch(decoder: Decoder, kind: PassKind, sequences: Several[Sequence], lengths: Several[int]) -> Batch:
    """Returns the rows of a pass over several prompt or drafted tokens of each sequence."""
    compensations = [sequence.assignment.policy.compensation for sequence in sequences]
    return decoder.batch(kind, [sequence.cache for sequence in sequences], lengths, compensations)
