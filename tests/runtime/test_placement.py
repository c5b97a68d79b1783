"""Layers are spread by memory, and a model that does not fit is refused with what is missing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.config import EngineConfig
from dash_runtime.devices import CudaDevice, find_devices, stretches_of
from dash_runtime.devices.cpu import available_bytes, memory_limit_files
from dash_runtime.errors import ConfigError, NotEnoughMemory
from dash_runtime.layers.layer import make_layer
from dash_runtime.layers.weight_loader import WeightLoader
from dash_runtime.startup.memory_plan import model_bytes, place_on
from dash_runtime.startup.placement import CACHE, WORK, Bytes, ModelBytes, Place, Room, place_layers
from tests.runtime.support import CPU
from tests.tiny_models import save_tiny_model

GB = 10**9


def model(num_layers: int = 8, is_tied: bool = False, work: int = 0, loading: int = 0) -> ModelBytes:
    """Returns a model whose layers need 1 GB each, a tenth of it for the cache, and whose embedding needs half a GB."""
    layer = Bytes({"FULL": 6 * GB // 10, "INT8": 3 * GB // 10, CACHE: GB // 10})
    embedding = Bytes({"FULL": GB // 2})
    return ModelBytes([layer] * num_layers, embedding, embedding, is_tied, Bytes({WORK: work}), loading)


def rooms(*free: float | None) -> list[Room]:
    return [Room(f"cuda:{place}", None if own is None else round(own * GB)) for place, own in enumerate(free)]


def layers_of(places: list[Place]) -> list[range]:
    return [place.layers for place in places]


def test_one_device_has_all_layers() -> None:
    (place,) = place_layers(model(), rooms(9.1))
    assert place.layers == range(8)
    assert place.required == 9 * GB


@pytest.mark.parametrize(
    ("free", "sizes"),
    [
        ((10, 10), [4, 4]),
        ((20, 10), [6, 2]),
        ((3, 30), [1, 7]),
        ((8, 8, 8), [2, 3, 3]),
        ((2, 2, 8), [1, 1, 6]),
        ((None, None), [4, 4]),
    ],
)
def test_layers_are_spread_by_free_memory(free: tuple[float | None, ...], sizes: list[int]) -> None:
    places = place_layers(model(), rooms(*free))
    assert [len(place.layers) for place in places] == sizes
    assert [layer for place in places for layer in place.layers] == list(range(8))


def test_every_device_has_a_layer_however_little_is_free_there() -> None:
    assert [len(place.layers) for place in place_layers(model(3), rooms(100, 1.1, 100))] == [1, 1, 1]


def test_what_just_fits_is_placed_and_a_byte_less_is_refused() -> None:
    free = [Room("cuda:0", 4 * GB + GB // 2), Room("cuda:1", 4 * GB + GB // 2)]
    assert layers_of(place_layers(model(), free)) == [range(4), range(4, 8)]
    with pytest.raises(NotEnoughMemory, match=r"0\.0 GB are missing"):
        place_layers(model(), [Room("cuda:0", 4 * GB + GB // 2 - 1), free[1]])


def test_a_refusal_says_what_is_needed_what_is_there_and_what_is_missing() -> None:
    with pytest.raises(NotEnoughMemory) as refusal:
        place_layers(model(18, work=GB // 2), rooms(7.9, 7.9))
    assert str(refusal.value) == (
        "the model needs 17.2 GB for its weights in FULL, INT8, 1.8 GB for its cache and 1.0 GB to work; "
        "cuda:0 has 7.9, cuda:1 has 7.9: 4.2 GB are missing"
    )


def test_a_tied_head_needs_a_copy_only_away_from_its_embedding() -> None:
    alone, split = (place_layers(model(is_tied=True), rooms(*free)) for free in ((99,), (99, 99)))
    assert sum(place.required for place in split) - sum(place.required for place in alone) == GB // 2


def test_loading_may_use_the_caches_memory_and_needs_its_own_beyond() -> None:
    for loading, required in ((0, 8), (8 * GB // 10, 8), (2 * GB, 8 + 1.2)):
        (place,) = place_layers(model(8, loading=loading), rooms(99))
        assert place.required == (required + 1) * GB


def test_where_the_cache_fills_lazily_only_weights_must_fit() -> None:
    (place,) = place_layers(model(), [Room("cpu", round(8.2 * GB), fills_lazily=True)])
    assert str(place) == (
        "cpu: layers 0 to 7 need 8.2 GB of 8.2 GB free: FULL 5.8, INT8 2.4; the cache takes up to 0.8 GB as it fills"
    )
    with pytest.raises(NotEnoughMemory, match=r"8\.2 GB for its weights in FULL, INT8; cpu has 7\.2: 1\.0 GB"):
        place_layers(model(), [Room("cpu", round(7.2 * GB), fills_lazily=True)])


def test_each_device_gets_a_line() -> None:
    said: list[str] = []
    assert place_on([CPU, CPU], model(), rooms(10, 20), said.append) == [CPU] * 8
    assert said == [
        "cuda:0: layers 0 to 1 need 2.5 GB of 10.0 GB free: FULL 1.7, INT8 0.6, cache 0.2",
        "cuda:1: layers 2 to 7 need 6.5 GB of 20.0 GB free: FULL 4.1, INT8 1.8, cache 0.6",
    ]


def test_more_devices_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^devices: names 3, but the model has 2 layers$"):
        place_on([CPU] * 3, model(2), rooms(9, 9, 9), lambda line: None)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "qwen3-moe"])
def test_weights_take_the_memory_that_the_plan_says(tmp_path: Path, family: str) -> None:
    folder = save_tiny_model(tmp_path / "model", family, hidden_size=256, intermediate_size=512)
    config = load_model_config(folder)
    actions = (Action.SKIP, Action.INT8, Action.FULL)
    weights = WeightLoader(config, open_weights(folder), torch.float32, CPU).layer(0)
    layer: Any = make_layer(weights, config.num_heads * config.head_dim, actions)
    needs = model_bytes(config, actions, torch.float32, 64, EngineConfig(), (), CudaDevice(torch.device("cuda")))
    matrices: dict[str, list[Any]] = {"FULL": [], "INT8": [layer.key_values[Action.INT8]]}
    for name, found in matrices.items():
        layer.linears[Action[name]].mapped(found.append, lambda router: router)
    taken = {name: sum(own.weight.nbytes for own in linears) for name, linears in matrices.items()}
    assert {name: needs.layers[0][name] for name in taken} == taken
    assert needs.head.total() == 5 * config.vocab_size * config.hidden_size


MEMINFO = "MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:  5000 kB\nSwapFree:  70 kB\n"


@pytest.mark.parametrize(
    ("system", "limits", "expected"),
    [
        (MEMINFO, [], 5070),
        (MEMINFO, ["max\n", ""], 5070),
        (MEMINFO, [f"{3000 * 1024}\n"], 3070),
        (MEMINFO, [f"{1 << 62}\n"], 5070),
        ("", ["1024\n"], None),
    ],
)
def test_a_process_can_have_what_is_available_and_no_more_than_its_group(
    system: str, limits: list[str], expected: int | None
) -> None:
    assert available_bytes(system, limits) == (None if expected is None else 1024 * expected)


@pytest.mark.parametrize(
    ("own_groups", "expected"),
    [
        ("0::/\n", ["memory.max"]),
        ("0::/a.slice/b\n", ["a.slice/b/memory.max", "a.slice/memory.max", "memory.max"]),
        (
            "9:name=systemd:/x\n4:cpu,memory:/y:z\n3:cpuset:/\n",
            ["memory/y:z/memory.limit_in_bytes", "memory/memory.limit_in_bytes"],
        ),
        ("", []),
    ],
)
def test_the_limits_of_a_processs_groups_are_looked_for_in_both_versions(own_groups: str, expected: list[str]) -> None:
    assert [str(path) for path in memory_limit_files(own_groups)] == [f"/sys/fs/cgroup/{name}" for name in expected]


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["cpu", "cpu:0"], "'cpu:0' is the same device as 'cpu'"),
        (["cpu", "meta"], "must be of one kind, got 'cpu' and 'meta'"),
        (["cpu", "warp"], "'warp' cannot be used"),
    ],
)
def test_devices_that_cannot_share_a_model_are_refused(names: list[str], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        find_devices(names)


def test_a_single_device_is_found_as_before() -> None:
    assert find_devices(["cpu"]) == [CPU]


def test_stretches_are_consecutive_layers_of_one_device() -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    own = stretches_of([first, first, second])
    assert [(stretch.device, stretch.layers) for stretch in own] == [(first, range(2)), (second, range(2, 3))]


class HoardingCuda:
    """A fake `torch.cuda` that holds 3 GB which nobody uses."""

    held = 3 * GB

    def empty_cache(self) -> None:
        self.held = 0

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 10 * GB - self.held, 10 * GB


def test_memory_that_torch_holds_and_does_not_use_is_free() -> None:
    assert CudaDevice(torch.device("cuda", 0), HoardingCuda()).free_bytes() == 10 * GB
