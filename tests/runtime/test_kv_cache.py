"""All sequences share one number of tokens, and each has one piece of the pool's memory."""

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from dash_runtime.checkpoints import load_model_config
from dash_runtime.layers.kv_cache import BLOCK_TOKENS, CachePool, SequenceCache
from tests.runtime.support import CPU
from tests.tiny_models import save_tiny_model

MakePool = Callable[..., CachePool]


@pytest.fixture(params=[False, True], ids=["by sequence", "by layer"])
def by_layer(request: pytest.FixtureRequest) -> bool:
    """Returns True if the sequences of a layer lie together, and not the layers of a sequence."""
    return bool(request.param)


@pytest.fixture
def make_pool(tiny_folder: Path, by_layer: bool) -> MakePool:
    def make(total_tokens: int, max_sequences: int = 8) -> CachePool:
        config, devices = load_model_config(tiny_folder), [CPU] * 6
        return CachePool(config, total_tokens, torch.float32, devices, max_sequences, by_layer=by_layer)

    return make


def reserved(pool: CachePool, num_tokens: int) -> SequenceCache:
    cache = pool.reserve(num_tokens)
    assert cache is not None
    return cache


def fill(cache: SequenceCache, length: int, number: int) -> None:
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        keys[:length] = 100 * number + layer
        values[:length] = -100 * number - layer
    cache.length = length


def holds(cache: SequenceCache, number: int) -> bool:
    layers = enumerate(zip(cache.keys, cache.values, strict=True))
    return all(
        bool((keys[: cache.length] == 100 * number + layer).all())
        and bool((values[: cache.length] == -100 * number - layer).all())
        for layer, (keys, values) in layers
    )


def test_memory_follows_what_is_written_and_not_what_is_reserved(make_pool: MakePool) -> None:
    before = psutil.Process().memory_info().rss
    pool = make_pool(1_000_000)
    fill(reserved(pool, 900_000), 1000, 1)
    assert pool.memories[0].nbytes > 1 << 30
    assert psutil.Process().memory_info().rss - before < 1 << 26


def test_all_layers_of_a_sequence_or_all_sequences_of_a_layer_lie_together(make_pool: MakePool, by_layer: bool) -> None:
    pool = make_pool(5 * BLOCK_TOKENS)
    first, second = reserved(pool, 2 * BLOCK_TOKENS), reserved(pool, 3 * BLOCK_TOKENS)
    before, after = [own.memories[0] for own in (first, second)] if not by_layer else pool.layers[0]
    assert after.data_ptr() == before.data_ptr() + before.nbytes


def test_reservations_never_exceed_the_pool_and_come_back(make_pool: MakePool) -> None:
    pool = make_pool(100)
    first = reserved(pool, 60)
    reserved(pool, 40)
    assert pool.reserve(1) is None
    pool.release(first)
    pool.release(first)
    assert pool.reserved_tokens == 40
    assert pool.reserve(61) is None
    reserved(pool, 60)


def test_every_sequence_begins_with_a_block_of_its_own(make_pool: MakePool) -> None:
    pool = make_pool(100, max_sequences=100)
    caches = [reserved(pool, 1) for _ in range(100)]
    assert sorted(cache.start for cache in caches) == [BLOCK_TOKENS * place for place in range(100)]


def test_room_in_pieces_is_made_one_piece_without_losing_anything(make_pool: MakePool) -> None:
    pool = make_pool(160, max_sequences=5)
    caches = [reserved(pool, 32) for _ in range(5)]
    for number, cache in enumerate(caches):
        fill(cache, 30, number)
    for cache in caches[::2]:
        pool.release(cache)
    large = reserved(pool, 96)
    fill(large, 96, 9)
    assert all(holds(caches[number], number) for number in (1, 3))
    assert holds(large, 9)


@pytest.mark.parametrize("seed", range(3))
def test_sequences_that_come_and_go_do_not_overlap_and_find_zeros(make_pool: MakePool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pool = make_pool(300, max_sequences=6)
    held: dict[int, SequenceCache] = {}
    for number in range(1, 120):
        size, choice, share = torch.randint(1, 120, (3,), generator=generator).tolist()
        if len(held) < 6 and (cache := pool.reserve(size)) is not None:
            assert not cache.memory.any()
            fill(cache, max(1, size * share // 120), number)
            cache.truncate(cache.length // 2 if choice % 3 == 0 else cache.length)
            held[number] = cache
        elif held:
            pool.release(held.pop(sorted(held)[choice % len(held)]))
        assert all(holds(cache, own) for own, cache in held.items())
    assert pool.reserved_tokens == sum(cache.reserved_tokens for cache in held.values())


def test_a_stretch_is_copied_and_appended_as_it_is(make_pool: MakePool) -> None:
    pool = make_pool(400)
    first, second = reserved(pool, 200), reserved(pool, 200)
    for tensor in (*first.keys, *first.values):
        tensor.copy_(torch.randn(tensor.shape))
    first.length = 90
    for start, end in ((0, 30), (30, 80)):
        copied = first.copy_of(start, end)
        assert [own.untyped_storage().nbytes() for own in copied] == [own.nbytes for own in copied]
        second.append(copied)
    assert second.length == 80
    for own, expected in zip((*second.keys, *second.values), (*first.keys, *first.values), strict=True):
        assert torch.equal(own[:80], expected[:80])


def test_truncating_forgets_the_end_only(make_pool: MakePool) -> None:
    cache = reserved(make_pool(10), 10)
    fill(cache, 8, 1)
    cache.truncate(5)
    assert cache.length == 5
    assert holds(cache, 1)


def test_rounded_keys_and_values_are_forgotten_with_those_that_they_were_made_from(make_pool: MakePool) -> None:
    pool = make_pool(5 * BLOCK_TOKENS, max_sequences=1)
    first, cache = (reserved(pool, 2 * BLOCK_TOKENS) for _ in range(2))
    assert pool.rounded is not None
    assert cache.rounded is not None
    memory, filled = cache.rounded
    assert memory.data_ptr() == pool.rounded[2].data_ptr()
    fill(cache, 2 * BLOCK_TOKENS, 1)
    filled.copy_(torch.tensor([[0, 2 * BLOCK_TOKENS], [0, 10]] * 3))
    cache.truncate(20)
    assert filled.tolist() == [[0, 20], [0, 10]] * 3
    pool.release(first)
    reserved(pool, 3 * BLOCK_TOKENS)  # moves the other one
    assert pool.num_moves == 1
    assert [own.data_ptr() for own in cache.rounded] == [pool.rounded.data_ptr(), filled.data_ptr()]
    assert not filled.any()


def test_a_model_with_biases_of_keys_has_no_rounded_ones(tmp_path: Path) -> None:
    pool = CachePool(load_model_config(save_tiny_model(tmp_path, "qwen2")), 64, torch.bfloat16, [CPU] * 6)
    assert reserved(pool, 64).rounded is None
    assert pool.rounded is None
