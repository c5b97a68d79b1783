"""One run of a contender, from the arrival times of its tokens. Knows times; knows no models."""

from collections.abc import Sequence
from dataclasses import dataclass

Arrivals = Sequence[tuple[float, int]]
"""One stream's arrivals in order: the time, and the number of tokens that came then."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run. `num_tokens` and `seconds` count from `seconds_to_first` on, when every stream had its first token."""

    seconds_to_first: float
    seconds: float
    num_tokens: int
    exposed_share: float = 0.0
    """The share of the decode time that the decoder lost to a policy."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all streams together."""
        return self.num_tokens / self.seconds

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / self.num_tokens


def run_from_arrivals(started: float, streams: Sequence[Arrivals], exposed_share: float = 0.0) -> Run:
    """Returns the run that began at `started`.

    Raises:
        RuntimeError: a stream has no token.
    """
    if not all(streams):
        raise RuntimeError("a stream ended without a token")
    first = max(arrivals[0][0] for arrivals in streams)
    last = max(arrivals[-1][0] for arrivals in streams)
    num_tokens = sum(count for arrivals in streams for time, count in arrivals if time > first)
    return Run(first - started, last - first, num_tokens, exposed_share)
