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

MOST_IN_BURST = 16
"""Tokens of a burst at most, however short they are."""
_GROWTH = 4
"""A burst has one token, and one more for so many that were put out before. Requests often come together: the first
must not make the others wait."""


def decode_burst(decoder: Decoder, rows: DecodingRows, sequence: Sequence, seconds: float) -> Burst | None:
    """Decodes as many tokens of a lone sequence as take `seconds`, going by the last one; no further than to its end,
    and fewer of its first ones.

    Returns None if that is less than two tokens, if something has to happen between them, or if the decoder cannot.
    """
    sampler = sequence.sampler
    is_drawn = sampler.is_plain_draw and decoder.draw is not None
    if rows.plan is None or rows.token_seconds is None or not sequence.may_burst:
        return None
    if not (is_drawn or sampler.is_plain_greedy):
        return None
    longest = min(MOST_IN_BURST, 1 + len(sequence.output_ids) // _GROWTH)
    count = min(longest, sequence.num_tokens_left, int(seconds / rows.token_seconds))
    if count < 2:
        return None
    started = time.perf_counter()
    draw = sampler.draw if is_drawn else None
    wanted = WantedBurst(sequence.last_token_id, count, sequence.end_token_ids, draw)
    burst = decoder.run_burst(rows.plan, wanted, rows.batch)
    if burst is not None:
        rows.batch.commit(burst.num_tokens)
        rows.token_seconds = (time.perf_counter() - started) / burst.num_tokens
    return burst
