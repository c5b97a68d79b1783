"""Measures how fast requests were served lately, to estimate retry delays and hopeless deadlines.

Knows durations; knows no clock, no queue and no network.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median

_NUM_RECENT = 64
_NEWEST_SHARE = 0.1
_UNMEASURED_RETRY_SECONDS = 1.0
_MIN_RETRY_SECONDS = 0.1
_MAX_RETRY_SECONDS = 60.0


class Pace:
    """Mean and best times of the latest requests."""

    def __init__(self) -> None:
        self._mean_slot_seconds: float | None = None
        self._prompt_token_seconds: deque[float] = deque(maxlen=_NUM_RECENT)
        self._token_seconds: deque[float] = deque(maxlen=_NUM_RECENT)

    def observe(
        self, prefill_seconds: float, num_prefilled_tokens: int, decode_seconds: float, num_decoded_tokens: int
    ) -> None:
        """Adds one request's times, without its time in the queue."""
        slot_seconds = prefill_seconds + decode_seconds
        mean = self._mean_slot_seconds
        self._mean_slot_seconds = slot_seconds if mean is None else mean + _NEWEST_SHARE * (slot_seconds - mean)
        if num_prefilled_tokens > 0:
            self._prompt_token_seconds.append(prefill_seconds / num_prefilled_tokens)
        if num_decoded_tokens > 0:
            self._token_seconds.append(decode_seconds / num_decoded_tokens)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """The median speed of the latest requests after their first tokens; None before any."""
        return _median_rate(self._token_seconds)

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """The median speed of the latest prompts, from the slot to the first token; None before any."""
        return _median_rate(self._prompt_token_seconds)

    def retry_seconds(self, num_slots: int) -> float:
        """Estimates the time until the next place is free."""
        if self._mean_slot_seconds is None:
            return _UNMEASURED_RETRY_SECONDS
        return min(max(self._mean_slot_seconds / num_slots, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS)

    def least_seconds(self, num_ahead: int, num_slots: int, num_prompt_tokens: int, num_tokens: int) -> float:
        """Returns a lower bound on the time to a new request's `num_tokens`-th token; 0 before any measurement.

        First every slot turns over as often as those ahead need; then the request runs at the best recent speeds. Low
        on purpose: only a hopeless deadline may be refused, as a high load may end soon.
        """
        rounds = num_ahead // num_slots
        waiting = rounds * (self._mean_slot_seconds or 0.0)
        prefill = num_prompt_tokens * min(self._prompt_token_seconds, default=0.0)
        return waiting + prefill + (num_tokens - 1) * min(self._token_seconds, default=0.0)


def _median_rate(seconds: Sequence[float]) -> float | None:
    middle = median(seconds) if seconds else 0.0
    return 1 / middle if middle > 0 else None
