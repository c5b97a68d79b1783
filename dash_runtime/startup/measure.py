"""Measures what drafting and verifying take on this device, and has what other measurements share.

Takes minima of interleaved rounds, since other work on the machine only adds time. Knows the decoder; knows no
requests.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch

from dash_runtime.actions import Action, LatencyTable
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Identity
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.passes import PassPlan
from dash_runtime.policy.policy import cheapest_kernel

_Work = TypeVar("_Work")

_CONTEXT_TOKENS = 256
_ROUNDS = 12
ROUND_SIZES = (1, 2, 4, 8, 16)
"""Numbers of sequences whose rounds of drafts are measured; others are interpolated or extrapolated."""
_DRAFTS = 8
"""Passes of a round that draft: then the drafts' weights are in the caches, if there is room."""
SECONDS = 6.0
"""Time that one measurement may take. Beside a busy process a pass takes thirty times as long, since threads wait for
each other; a few rounds must do then."""


@torch.inference_mode()
def measure_verification(
    decoder: Decoder, lengths: Sequence[int], rounds: int = _ROUNDS, now: Callable[[], float] = time.monotonic
) -> dict[int, float]:
    """Measures the time to verify a draft, by its length, as a multiple of the time for one token.

    A verification is a full-depth pass over the draft's tokens and the one before, head included. Lengths that the
    model's context cannot hold are left out.
    """
    fitting = [length for length in lengths if length + 1 < decoder.context_length]
    (cache,) = filled_caches(decoder, num_more=1 + max((0, *fitting)))

    def run_pass(length: int) -> None:
        count = length + 1
        batch = decoder.batch(PassKind.VERIFY, [cache], [count], [Identity()])
        heads = (decoder.finest_head,) * count
        plan = PassPlan.of((decoder.highest,) * decoder.num_layers, heads, wants_logits=False, shares_head=False)
        decoder.run_pass(plan, different_tokens(decoder, count), batch)

    def run_token() -> float:
        run_pass(0)  # leaves the caches as decoding does
        return timed(decoder, partial(run_pass, 0))

    works: dict[int, Callable[[], float]] = {0: run_token}
    works |= {length: partial(timed, decoder, partial(run_pass, length)) for length in fitting}
    seconds = least_seconds(works, rounds_within(SECONDS, rounds, now))
    # A shorter draft never takes longer: where it did, other work added time.
    return {length: min(seconds[longer] for longer in fitting if longer >= length) / seconds[0] for length in fitting}


@torch.inference_mode()
def measure_second_row(decoder: Decoder, rounds: int = _ROUNDS, now: Callable[[], float] = time.monotonic) -> float:
    """Measures what a second row adds to a pass in the cheapest kernel and head, as a share of one row's time.

    Where one row decodes otherwise than several rows of a sequence, as with graphs, that counts too.
    """
    action = cheapest_kernel(decoder.actions)
    head = min(decoder.heads)
    (cache,) = filled_caches(decoder, num_more=2)

    def run_pass(count: int) -> None:
        kind = PassKind.DECODE if count == 1 else PassKind.VERIFY
        batch = decoder.batch(kind, [cache], [count], [Identity()])
        plan = PassPlan.of((action,) * decoder.num_layers, (head,) * count, wants_logits=False)
        decoder.run_pass(plan, different_tokens(decoder, count), batch)

    works = {count: partial(timed, decoder, partial(run_pass, count)) for count in (1, 2)}
    seconds = least_seconds(works, rounds_within(SECONDS / 3, rounds, now))
    return max(0.0, seconds[2] / seconds[1] - 1)


@torch.inference_mode()
def measure_rounds(
    decoder: Decoder, counts: tuple[int, ...], rounds: int = _ROUNDS, now: Callable[[], float] = time.monotonic
) -> tuple[LatencyTable, ...]:
    """Measures the passes of sequences that draft in step, by the number of sequences: whole ones, head included.

    Returns for each place in a round the seconds in FULL, which are the same, and in the cheapest kernel and head.
    Full depth leaves nearly all caches without the drafts' weights. Where these fit into a cache, the first passes
    after it take up to twice the time of later ones.
    """
    action, head = cheapest_kernel(decoder.actions), min(decoder.heads)
    caches = filled_caches(decoder, max(counts))
    batches = {
        count: decoder.batch(PassKind.DECODE, caches[:count], [1] * count, [Identity()] * count) for count in counts
    }

    plans = {
        (count, *each): PassPlan.of((each[0],) * decoder.num_layers, (each[1],) * count, wants_logits=False)
        for count in counts
        for each in ((decoder.highest, decoder.finest_head), (action, head))
    }

    def seconds(count: int, own: Action, own_head: Action) -> float:
        arguments = plans[count, own, own_head], different_tokens(decoder, count), batches[count]
        return timed(decoder, lambda: decoder.run_pass(*arguments))

    def take_round(count: int) -> list[float]:
        """Returns the seconds of a pass in FULL after another one, and of each drafting pass after it."""
        full = [seconds(count, decoder.highest, decoder.finest_head) for _ in range(2)]
        return [full[-1], *(seconds(count, action, head) for _ in range(_DRAFTS))]

    least = {count: [math.inf] * (1 + _DRAFTS) for count in counts}
    for number in rounds_within(SECONDS / 2, rounds, now):
        for count in counts:
            taken = take_round(count)
            if number > 0:
                least[count] = list(map(min, least[count], taken))
    full, *drafts = zip(*(least[count] for count in counts), strict=True)
    return tuple(LatencyTable(counts, {action: own, decoder.highest: full}) for own in drafts)


def least_seconds(works: Mapping[_Work, Callable[[], float]], rounds: Iterable[int]) -> dict[_Work, float]:
    """Returns the least of the seconds that each work says it took, in turn in every round; round 0 warms up."""
    seconds: dict[_Work, list[float]] = {name: [] for name in works}
    for number in rounds:
        for name, work in works.items():
            taken = work()
            if number > 0:
                seconds[name].append(taken)
    return {name: min(own) for name, own in seconds.items()}


def rounds_within(seconds: float, most: int, now: Callable[[], float] = time.monotonic) -> Iterator[int]:
    """Yields 0, for a round that warms up, then up to `most` rounds: at least one, and none once the time is over."""
    ends_at = now() + seconds
    for number in range(most + 1):
        if number > 1 and now() >= ends_at:
            return
        yield number


def filled_caches(
    decoder: Decoder, count: int = 1, num_more: int = 1, num_tokens: int = _CONTEXT_TOKENS
) -> list[SequenceCache]:
    """Returns contexts of `num_tokens` each, or as many as the model's context holds, with room for `num_more`."""
    context = min(num_tokens, decoder.context_length - num_more)
    caches = decoder.caches([context + num_more] * count)
    for cache in caches:
        cache.append(
            [torch.zeros_like(own[:, :, :context]) for own in cache.memories]
        )  # written, so that it is in memory
    return caches


def different_tokens(decoder: Decoder, count: int) -> list[int]:
    """Returns tokens for the rows of a pass. In a mixture of experts, rows of one token would share all experts, and
    take less time than those of a text."""
    vocab_size = decoder.config.vocab_size
    return [place * vocab_size // count for place in range(count)]


def timed(decoder: Decoder, work: Callable[[], object]) -> float:
    """Returns the seconds until the decoder's devices have done the work."""
    started = time.perf_counter()
    work()
    decoder.synchronise()
    return time.perf_counter() - started
