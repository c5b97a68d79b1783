"""Prefills prompts at full depth, a chunk in each step of the engine.

Knows sequences and kept prompts; knows no slots and no events.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several

from torch import Tensor

from dash_runtime.config import EngineConfig
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.prefix_cache import PrefixCache
from dash_runtime.engine.sequence import Sequence
from dash_runtime.layers.batch import Batch, PassKind
from dash_runtime.passes import PassPlan


class PromptPasses:
    """The passes over prompts. A long one takes several steps, so that others go on.

    A beginning that an earlier prompt had too is copied instead. Sequences run one at a time, and each is cut at
    multiples of the decoder's row block whatever runs beside it. So a sequence's numbers depend neither on its
    neighbours nor on how much of its prompt was copied.
    """

    def __init__(self, decoder: Decoder, config: EngineConfig) -> None:
        self._decoder = decoder
        self._chunk_tokens = config.prefill_chunk_tokens
        row_block = min(decoder.row_block, config.prefill_chunk_tokens)
        self._pass_tokens = min(decoder.max_prompt_rows, config.prefill_chunk_tokens) // row_block * row_block
        self._prefix_cache = PrefixCache(config.prefix_cache_tokens, row_block)

    @property
    def num_kept_tokens(self) -> int:
        """Prompt tokens whose keys and values are kept for later prompts."""
        return self._prefix_cache.num_tokens

    def run(self, sequences: Several[Sequence], on_layer: Callable[[], None]) -> Iterator[tuple[Sequence, Tensor]]:
        """Prefills one chunk. Yields sequences after each pass, with the rows of the last layer's output
        `[rows, hidden_size]` that tokens of their output follow. `on_layer` is called after each layer."""
        num_left = self._chunk_tokens
        plan = PassPlan.of((self._decoder.highest,) * self._decoder.num_layers, on_layer=on_layer)
        for sequence in [own for own in sequences if own.num_prompt_tokens_left]:
            prompt = (self._namespace(sequence), sequence.request.prompt_token_ids, sequence.cache)
            if not sequence.cache.length:
                sequence.num_cached_prompt_tokens = self._prefix_cache.copy_into(*prompt)
            while sequence.num_prompt_tokens_left:
                chunk = sequence.next_prompt_chunk(self._pass_tokens)
                if len(chunk) > num_left:
                    return
                num_left -= len(chunk)
                batch = full_depth_batch(self._decoder, PassKind.PREFILL, [sequence], [len(chunk)])
                hidden = self._decoder.run_pass(plan, chunk, batch).states
                assert hidden is not None
                batch.commit()
                if not sequence.num_prompt_tokens_left:
                    self._prefix_cache.store(*prompt)
                yield sequence, hidden[len(hidden) - sequence.num_rows_to_put_out :]

    def _namespace(self, sequence: Sequence) -> str:
        """Returns its caller's namespace, or the one beside it for sequences whose keys are rotated otherwise."""
        has_other_keys = self._decoder.has_other_keys(sequence.cache.reserved_tokens)
        return f"{int(has_other_keys)}:{sequence.request.cache_namespace}"


def full_depth_batch(decoder: Decoder, kind: PassKind, sequences: Several[Sequence], lengths: Several[int]) -> Batch:
    """Returns the rows of a pass over several prompt or drafted tokens of each sequence."""
    compensations = [sequence.assignment.policy.compensation for sequence in sequences]
    return decoder.batch(kind, [sequence.cache for sequence in sequences], lengths, compensations)
