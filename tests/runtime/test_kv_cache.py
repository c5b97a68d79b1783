"""One number of tokens for all sequences; memory that grows and keeps what it holds."""

from pathlib import Path

import torch

from dash_runtime.checkpoints import load_model_config
from dash_runtime.decoder.kv_cache import CachePool
from tests.runtime.support import CPU


def pool(tiny_folder: Path, total_tokens: int) -> CachePool:
    return CachePool(load_model_config(tiny_folder), total_tokens, torch.float32, CPU)


def test_growing_keeps_what_was_written(tiny_folder: Path) -> None:
    cache = pool(tiny_folder, 1000).reserve(1000)
    assert cache is not None
    cache.grow(3)
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        keys[:3] = layer
        values[:3] = -layer
    cache.length = 3
    for num_tokens in (64, 65, 400, 1000):
        cache.grow(num_tokens)
        assert num_tokens <= cache.capacity <= 1000
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        assert (keys[:3] == layer).all()
        assert (values[:3] == -layer).all()


def test_memory_follows_the_length_and_not_the_reservation(tiny_folder: Path) -> None:
    cache = pool(tiny_folder, 100_000).reserve(100_000)
    assert cache is not None
    cache.grow(10)
    assert cache.capacity < 200


def test_reservations_never_exceed_the_pool_and_come_back(tiny_folder: Path) -> None:
    caches = pool(tiny_folder, 100)
    first, second = caches.reserve(60), caches.reserve(40)
    assert first is not None
    assert second is not None
    assert caches.reserve(1) is None
    caches.release(first)
    caches.release(first)
    assert caches.reserved_tokens == 40
    assert caches.reserve(61) is None
    assert caches.reserve(60) is not None


def test_a_stretch_is_copied_and_appended_as_it_is(tiny_folder: Path) -> None:
    caches = pool(tiny_folder, 400)
    first, second = caches.reserve(200), caches.reserve(200)
    assert first is not None
    assert second is not None
    first.grow(90)
    for tensor in (*first.keys, *first.values):
        tensor.copy_(torch.randn(tensor.shape))
    first.length = 90
    for start, end in ((0, 30), (30, 80)):
        stretch = first.copy_of(start, end)
        assert stretch.untyped_storage().nbytes() == stretch.nbytes
        second.append(stretch)
    assert second.length == 80
    for own, expected in zip((*second.keys, *second.values), (*first.keys, *first.values), strict=True):
        assert torch.equal(own[:80], expected[:80])


def test_truncating_forgets_the_end_only(tiny_folder: Path) -> None:
    cache = pool(tiny_folder, 10).reserve(10)
    assert cache is not None
    cache.grow(8)
    cache.length = 8
    cache.truncate(5)
    assert cache.length == 5
