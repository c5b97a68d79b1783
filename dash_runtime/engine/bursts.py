"""Bursts: several tokens of a sequence that decodes alone, in one call of the decoder.

Between two tokens of a call there is no Python, which otherwise takes a twentieth of a token in INT4. Knows a sequence
and its rows; knows no slots.
"""

import time
from dataclasses import replace

from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.deciders import DecodingRows
from dash_runtime.engine.sequence import Sequence
from dash_runtime.rows.burst import Burst, WantedBurst

MOST_IN_BURST = 32
"""Tokens of a burst at most, however short they are."""


class Bursts:
    """Decodes bursts of up to so many seconds."""

    def __init__(self, decoder: Decoder, seconds: float) -> None:
        self._decoder = decoder
        self._seconds = seconds
        self.wake_file = -1
        """A file descriptor: no token begins while there is something to read from it. Negative: none."""

    def may_have(self, sequence: Sequence) -> bool:
        """Returns True if a lone sequence's tokens may come in bursts: nothing has to happen between them."""
        sampler = sequence.sampler
        return sequence.may_burst and (sampler.is_plain_greedy or self._is_drawn(sequence))

    def decode(self, rows: DecodingRows, sequence: Sequence) -> Burst | None:
        """Decodes as many tokens of a lone sequence that may have bursts as fit, going by the last one's time; no
        further than to its end, or to when somebody writes to `wake_file`.

        Returns None if that is less than two tokens, or if the decoder cannot.
        """
        if rows.plan is None or rows.token_seconds is None:
            return None
        count = min(MOST_IN_BURST, sequence.num_tokens_left, int(self._seconds / rows.token_seconds))
        guesses, guessed = None, None
        if sequence.guesses is not None:
            guesses, most = sequence.guesses.wanted_in_burst(sequence.output_ids, sequence.num_tokens_left)
            count, guessed = min(count, most), None if guesses is None else rows.plan_of_guesses
        if count < 2:
            return None
        started = time.perf_counter()
        wanted = WantedBurst(sequence.last_token_id, count, sequence.end_token_ids, (), self.wake_file, guesses)
        if is_drawn := self._is_drawn(sequence):
            wanted = replace(wanted, draws=sequence.sampler.draws(wanted.most))
        burst = self._decoder.run_burst(rows.plan, wanted, rows.batch, guessed)
        if burst is not None:
            if is_drawn:
                sequence.sampler.drew(burst.num_tokens)
            sequence.cache.note_written(sequence.cache.length + burst.num_positions)
            rows.batch.commit(burst.num_tokens)
            rows.token_seconds = (time.perf_counter() - started) / burst.num_tokens
        return burst

    def _is_drawn(self, sequence: Sequence) -> bool:
        return sequence.sampler.is_plain_draw and self._decoder.draw is not None
