"""Bursts: several tokens of a sequence that decodes alone, in one call of the decoder.

Between two tokens of a call there is no Python, which otherwise takes a twentieth of a token in INT4. Knows a sequence
and its rows; knows no slots.
"""

import time

from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.deciders import DecodingRows
from dash_runtime.engine.sequence import Sequence
from dash_runtime.layers.pass_plan import WantedBurst
from dash_runtime.rows.burst import Burst

MOST_IN_BURST = 32
"""Tokens of a burst at most, however short they are."""


class Bursts:
    """Decodes bursts of up to so many seconds."""

    def __init__(self, decoder: Decoder, seconds: float) -> None:
        self._decoder = decoder
        self._seconds = seconds
        self.wake_file = -1
        """A file descriptor: no token begins while there is something to read from it. Negative: none."""

    def decode(self, rows: DecodingRows, sequence: Sequence) -> Burst | None:
        """Decodes as many tokens of a lone sequence as fit, going by the last one's time; no further than to its end,
        or to when somebody writes to `wake_file`.

        Returns None if that is less than two tokens, if something has to happen between them, or if the decoder cannot.
        """
        sampler, decoder = sequence.sampler, self._decoder
        is_drawn = sampler.is_plain_draw and decoder.draw is not None
        if rows.plan is None or rows.token_seconds is None or not sequence.may_burst:
            return None
        if not (is_drawn or sampler.is_plain_greedy):
            return None
        count = min(MOST_IN_BURST, sequence.num_tokens_left, int(self._seconds / rows.token_seconds))
        if count < 2:
            return None
        started = time.perf_counter()
        draws = sampler.draws(count) if is_drawn else ()
        wanted = WantedBurst(sequence.last_token_id, count, sequence.end_token_ids, draws, self.wake_file)
        burst = decoder.run_burst(rows.plan, wanted, rows.batch)
        if burst is not None:
            if is_drawn:
                sampler.drew(burst.num_tokens)
            rows.batch.commit(burst.num_tokens)
            rows.token_seconds = (time.perf_counter() - started) / burst.num_tokens
        return burst
