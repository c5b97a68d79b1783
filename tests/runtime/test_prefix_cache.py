"""A beginning that prompts share is computed once: copied bit for bit, within a bound, never across namespaces."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.config import (
    EngineConfig,
    GenerationRequest,
    Mode,
    SamplingParameters,
    SkipOptions,
    StoppingParameters,
)
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.engine import Engine
from dash_runtime.engine.prefix_cache import PrefixCache
from dash_runtime.events import EngineEvent, TokenProduced
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.startup.measured_engine import assemble_engine
from tests.runtime.support import (
    ALL_ACTIONS,
    drain,
    finished,
    load_decoder,
    new_cache,
    produced,
    run,
    some_affine,
    some_costs,
    some_plans,
)
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.alone

BLOCK = 4
MODES = {
    "full_depth": SkipOptions(Mode.FULL_DEPTH),
    "adaptive": SkipOptions(Mode.ADAPTIVE, compute_budget=0.6),
    "exact": SkipOptions(Mode.EXACT, compute_budget=0.8),
    "int8": SkipOptions(Mode.FIXED, fixed_action=Action.INT8),
    "int4": SkipOptions(Mode.FIXED, fixed_action=Action.INT4),
    "skip": SkipOptions(Mode.FIXED, fixed_action=Action.SKIP),
}
LONG = [place * 7 % 250 for place in range(340)]
"""Longer than one pass, and than one KV block of attention."""


def filled(decoder: Decoder, num_tokens: int) -> SequenceCache:
    """Returns a sequence cache of random keys and values."""
    cache = new_cache(decoder)
    generator = torch.Generator().manual_seed(num_tokens)
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    cache.length = num_tokens
    return cache


def num_found(decoder: Decoder, cache: PrefixCache, prompt: Sequence[int], namespace: str = "") -> int:
    return cache.copy_into(namespace, prompt, new_cache(decoder))


def make_engine(decoder: Decoder, **options: int) -> Engine:
    config = EngineConfig(group_planner=False, **options)  # type: ignore[arg-type]
    nearly_free = {1: 0.5, 3: 0.5, 7: 0.5}
    catalog = PolicyCatalog(some_costs(), ALL_ACTIONS, some_affine(decoder), (), 0.8, nearly_free, plans=some_plans())
    return assemble_engine(decoder, catalog, config, 512, frozenset())


def request(name: str, prompt: list[int], max_new_tokens: int = 8, **options: object) -> GenerationRequest:
    made = GenerationRequest(name, prompt, StoppingParameters(max_new_tokens), logprobs=3, return_decisions=True)
    return replace(made, **options)  # type: ignore[arg-type]


def num_cached(events: list[EngineEvent]) -> int:
    return finished(events).num_cached_prompt_tokens


def test_what_is_copied_is_equal_bit_for_bit(decoder: Decoder) -> None:
    stored, own = filled(decoder, 11), new_cache(decoder)
    cache = PrefixCache(100, BLOCK)
    cache.store("", list(range(11)), stored)
    assert cache.copy_into("", [*range(10), 99, 98], own) == own.length == 8
    for kept, copied in zip((*stored.keys, *stored.values), (*own.keys, *own.values), strict=True):
        assert torch.equal(kept[:8], copied[:8])


def test_a_prompt_is_found_by_equal_tokens_from_the_first_on_and_by_nothing_else(decoder: Decoder) -> None:
    cache = PrefixCache(100, BLOCK)
    cache.store("", list(range(12)), filled(decoder, 12))
    assert num_found(decoder, cache, list(range(50))) == 12
    assert num_found(decoder, cache, [*range(7), 99, *range(8, 50)]) == 4
    assert num_found(decoder, cache, [99, *range(1, 50)]) == 0
    assert num_found(decoder, cache, list(range(4, 50))) == 0
    assert num_found(decoder, cache, [0, 1, 2]) == 0


def test_nothing_is_found_in_another_namespace(decoder: Decoder) -> None:
    cache = PrefixCache(100, BLOCK)
    prompt = list(range(12))
    cache.store("a", prompt, filled(decoder, 12))
    for other in ("", "b", "A", "a\0", "aa"):
        assert num_found(decoder, cache, prompt, other) == 0
    assert num_found(decoder, cache, prompt, "a") == 8


def test_the_last_token_of_a_prompt_is_always_left_to_prefill(decoder: Decoder) -> None:
    cache = PrefixCache(100, BLOCK)
    cache.store("", list(range(12)), filled(decoder, 12))
    assert [num_found(decoder, cache, list(range(length))) for length in (12, 9, 8, 5, 4, 1)] == [8, 8, 4, 4, 0, 0]


def test_what_prompts_share_is_there_once(decoder: Decoder) -> None:
    cache = PrefixCache(100, BLOCK)
    cache.store("", list(range(14)), filled(decoder, 14))
    cache.store("", [*range(8), 99, 98, 97, 96], filled(decoder, 12))
    assert cache.num_tokens == 16
    cache.store("", list(range(14)), filled(decoder, 14))
    assert cache.num_tokens == 16


def test_the_prompt_unused_longest_goes_first(decoder: Decoder) -> None:
    cache = PrefixCache(24, BLOCK)
    prompts = [[number] * 9 for number in range(4)]
    for prompt in prompts[:3]:
        cache.store("", prompt, filled(decoder, 9))
    assert num_found(decoder, cache, prompts[0]) == 8
    cache.store("", prompts[3], filled(decoder, 9))
    assert cache.num_tokens == 24
    assert [num_found(decoder, cache, prompt) for prompt in prompts] == [8, 0, 8, 8]


def test_the_end_of_a_prompt_goes_before_its_beginning(decoder: Decoder) -> None:
    cache = PrefixCache(20, BLOCK)
    prompt = list(range(21))
    cache.store("", prompt, filled(decoder, 21))
    for number in (100, 101, 102):
        cache.store("", [number] * BLOCK, filled(decoder, BLOCK))
    assert cache.num_tokens == 20
    assert num_found(decoder, cache, prompt) == 8


def test_of_a_prompt_larger_than_the_bound_the_beginning_is_kept(decoder: Decoder) -> None:
    cache = PrefixCache(3 * BLOCK + 2, BLOCK)
    prompt = list(range(40))
    cache.store("", [99] * 8, filled(decoder, 8))
    cache.store("", prompt, filled(decoder, 40))
    assert cache.num_tokens == 3 * BLOCK
    assert num_found(decoder, cache, prompt) == 3 * BLOCK
    assert num_found(decoder, cache, [99] * 9) == 0


def test_never_more_is_kept_than_allowed_and_every_block_can_be_found(decoder: Decoder) -> None:
    cache = PrefixCache(40, BLOCK)
    chance = random.Random(3)
    for _ in range(300):
        prompt = [chance.randrange(2) for _ in range(chance.randrange(1, 30))]
        namespace = chance.choice("ab")
        if chance.random() < 0.5:
            num_found(decoder, cache, prompt, namespace)
        else:
            cache.store(namespace, prompt, filled(decoder, len(prompt)))
            assert num_found(decoder, cache, [*prompt, 9], namespace) == len(prompt) // BLOCK * BLOCK
        assert cache.num_tokens <= 40
        assert _num_reachable(decoder, cache) == cache.num_tokens


def _num_reachable(decoder: Decoder, cache: PrefixCache) -> int:
    """Counts the tokens in KV blocks that a prompt of 0s and 1s can find, by trying all of them."""

    def below(namespace: str, prompt: list[int]) -> int:
        total = 0
        for number in range(2**BLOCK):
            longer = prompt + [number >> place & 1 for place in range(BLOCK)]
            digests = cache._digests(namespace, longer)
            if digests[-1] in cache._blocks:
                total += BLOCK + below(namespace, longer)
        return total

    return sum(below(namespace, []) for namespace in "ab")


@pytest.mark.parametrize("max_tokens", [0, BLOCK - 1])
def test_without_room_for_a_block_nothing_is_kept(decoder: Decoder, max_tokens: int) -> None:
    cache = PrefixCache(max_tokens, BLOCK)
    cache.store("", list(range(12)), filled(decoder, 12))
    assert cache.num_tokens == 0
    assert num_found(decoder, cache, list(range(12))) == 0


def test_what_is_kept_is_no_part_of_a_sequences_memory(decoder: Decoder) -> None:
    cache = PrefixCache(100, BLOCK)
    sequence = filled(decoder, 11)
    block_bytes = sequence.copy_of(0, BLOCK)[0].nbytes
    cache.store("", list(range(11)), sequence)
    assert [memory.untyped_storage().nbytes() for (memory,) in cache._blocks.values()] == [block_bytes] * 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sampling", [SamplingParameters(), SamplingParameters(temperature=1.0, seed=5)])
@pytest.mark.parametrize("chunk", [5, 64, 100, 256])
def test_a_request_gets_the_same_whether_its_prefix_is_reused_or_not(
    decoder: Decoder, mode: str, sampling: SamplingParameters, chunk: int
) -> None:
    prompt = [*LONG[:200], 3, 1, 4]
    options = {"skip": MODES[mode], "sampling": sampling}
    cold = run(make_engine(decoder, prefill_chunk_tokens=chunk, prefix_cache_tokens=0), request("a", prompt, **options))
    warm = make_engine(decoder, prefill_chunk_tokens=chunk)
    run(warm, request("before", LONG))
    events = run(warm, request("a", prompt, **options))["a"]
    assert num_cached(events) >= 192
    assert num_cached(cold["a"]) == 0
    assert produced(events) == produced(cold["a"])
    if mode == "exact":
        speculation = finished(events).speculation
        assert speculation is not None
        assert speculation.num_drafted > 0


def test_random_prompts_that_share_random_prefixes_get_what_a_cold_engine_gives(decoder: Decoder) -> None:
    chance = random.Random(1)
    warm = make_engine(decoder, prefill_chunk_tokens=96, prefix_cache_tokens=1024, num_slots=3)
    texts = [[chance.randrange(250) for _ in range(400)] for _ in range(3)]
    num_reused = 0
    for number in range(12):
        requests = []
        for place in range(3):
            prompt = chance.choice(texts)[: chance.randrange(1, 400)]
            prompt += [chance.randrange(250) for _ in range(chance.choice((0, 1, 2, 70)))]
            skip = chance.choice(list(MODES.values()))
            namespace = chance.choice(("a", "a", "b"))
            requests.append(request(f"{number}-{place}", prompt, 4, skip=skip, cache_namespace=namespace))
        together = run(warm, *requests)
        for own in requests:
            cold = make_engine(decoder, prefill_chunk_tokens=96, prefix_cache_tokens=0)
            assert produced(together[own.request_id]) == produced(run(cold, own)[own.request_id])
            num_reused += num_cached(together[own.request_id])
        assert warm.num_kept_prompt_tokens <= 1024
    assert num_reused > 1000


def test_a_prompt_equal_to_an_earlier_one_still_prefills_a_token(decoder: Decoder) -> None:
    engine = make_engine(decoder)
    counts = [num_cached(run(engine, request("a", LONG[:length]))["a"]) for length in (128, 128, 129, 300, 300)]
    assert counts == [0, 64, 128, 128, 256]


def test_a_request_reuses_the_prompt_of_one_that_came_with_it(decoder: Decoder) -> None:
    events = run(make_engine(decoder), request("first", LONG[:150]), request("second", [*LONG[:140], 9]))
    assert num_cached(events["first"]) == 0
    assert num_cached(events["second"]) == 128


def test_requests_of_other_namespaces_share_nothing(decoder: Decoder) -> None:
    engine = make_engine(decoder)
    counts = [
        num_cached(run(engine, request("a", LONG, cache_namespace=namespace))["a"])
        for namespace in ("one", "two", "", "one")
    ]
    assert counts == [0, 0, 0, 320]


def test_sequences_whose_keys_are_rotated_otherwise_share_nothing(tmp_path: Path) -> None:
    decoder = load_decoder(save_tiny_model(tmp_path, "phi3-longrope", original_max_position_embeddings=100))
    engine = make_engine(decoder)
    counts = [num_cached(run(engine, request("a", LONG[:90], count))["a"]) for count in (4, 20, 10, 30)]
    assert counts == [0, 0, 64, 64]


def test_a_prompt_that_was_not_prefilled_to_its_end_leaves_nothing(decoder: Decoder) -> None:
    engine = make_engine(decoder, prefill_chunk_tokens=64)
    engine.submit(request("cancelled", LONG))
    for _ in range(3):
        engine.step()
    engine.cancel("cancelled")
    assert engine.num_kept_prompt_tokens == 0
    assert engine.num_reserved_cache_tokens == 0


def test_the_cache_is_off_where_it_has_no_tokens(decoder: Decoder) -> None:
    engine = make_engine(decoder, prefix_cache_tokens=0)
    assert [num_cached(run(engine, request("a", LONG))["a"]) for _ in range(2)] == [0, 0]
    assert engine.num_kept_prompt_tokens == 0


def test_a_step_computes_no_more_of_prompts_than_its_chunk_and_reuse_does_not_count(decoder: Decoder) -> None:
    engine = make_engine(decoder, prefill_chunk_tokens=128)
    run(engine, request("before", LONG))
    engine.submit(request("reused", [*LONG[:320], 1]))
    engine.submit(request("new", [*LONG[5:100], 1]))
    assert [event.request_id for event in engine.step() if isinstance(event, TokenProduced)] == ["reused", "new"]
    drain(engine)
    for name in ("a", "b"):
        engine.submit(request(name, [7, *LONG[:99]], cache_namespace=name))
    assert [event.request_id for event in engine.step() if isinstance(event, TokenProduced)] == ["a"]
