"""Bursts: several tokens of a sequence that decodes alone, in one call of the decoder.

Between two tokens of a call there is no Python, which otherwise takes a twentieth of a token in INT4. Knows a sequence
and its rows; knows no slots.
"""

import time

from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.decoding_rows import DecodingRows
from dash_runtime.engine.sequence import Sequence
from dash_runtime.passes import MOST_GUESSES, Limit, PassResult, TextGuesses

MOST_IN_BURST = 32
"""Tokens of a burst at most, however short they are."""


class Bursts:
    """Decodes bursts of up to so many seconds."""

    def __init__(self, decoder: Decoder, seconds: float) -> None:
        self._decoder = decoder
        self._seconds = seconds
        self.wake_file: int | None = None
        """A file descriptor: no token begins while there is something to read from it."""

    def may_have(self, sequence: Sequence) -> bool:
        """Returns True if a lone sequence's tokens may come in bursts: nothing has to happen between them."""
        sampler = sequence.sampler
        return sequence.may_burst and (sampler.is_plain_greedy or self._is_drawn(sequence))

    def decode(self, rows: DecodingRows, sequence: Sequence) -> PassResult | None:
        """Decodes as many tokens of a lone sequence that may have bursts as fit, going by the last one's time; no
        further than to its end, or to when somebody writes to `wake_file`.

        Returns None if that is less than two tokens, or if the decoder cannot.
        """
        if not rows.may_burst or rows.token_seconds is None:
            return None
        count = min(MOST_IN_BURST, sequence.num_tokens_left, int(self._seconds / rows.token_seconds))
        guesses: TextGuesses | None = None
        if sequence.guesses is not None:
            own, most = sequence.guesses.wanted_in_burst(sequence.output_ids)
            count = min(count, most)
            if own is not None:
                guesses = TextGuesses(*own, sequence.num_tokens_left, rows.plan_of_guesses)
        if count < 2:
            return None
        started, is_drawn = time.perf_counter(), self._is_drawn(sequence)
        draws = sequence.sampler.draws(count + (MOST_GUESSES if guesses else 0)) if is_drawn else ()
        limit = Limit(count, sequence.end_token_ids, draws, self.wake_file, guesses)
        burst = self._decoder.run(rows.plan, [sequence.last_token_id], rows.batch, limit)
        if burst is None:
            rows.may_burst = guesses is not None
            return None
        num_tokens = len(burst.token_ids)
        if is_drawn:
            sequence.sampler.drew(num_tokens)
        sequence.cache.note_written(sequence.cache.length + burst.num_positions)
        rows.batch.commit(num_tokens)
        rows.token_seconds = (time.perf_counter() - started) / num_tokens
        return burst

    def _is_drawn(self, sequence: Sequence) -> bool:
        return sequence.sampler.is_plain_draw and self._decoder.draw is not None
