"""Rounded kernels are offered where they pay beside FULL's, as they are built."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dash_runtime import devices
from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config
from dash_runtime.config import EngineConfig
from dash_runtime.decoder.backends.eager import EagerBackend
from dash_runtime.devices import CpuDevice, device_of
from dash_runtime.layers.batch import PassKind
from dash_runtime.linears.dense_linear import FullLinear
from dash_runtime.startup import build
from dash_runtime.startup.build import BuildOptions, NativeCode, build_engine
from dash_runtime.startup.faster_kernels import MakeMatrices, actions_that_pay, pays, product_seconds
from tests.runtime.support import ALL_ACTIONS, CPU

EAGER_ACTIONS = tuple(action for action in ALL_ACTIONS if action is not Action.INT3)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [({1: 0.9, 16: 1.1, 32: 1.1}, True), ({1: 0.91, 16: 0.5, 32: 0.5}, False), ({1: 0.5, 16: 0.5, 32: 1.2}, False)],
    ids=["by a tenth alone, even among others", "even alone", "slow among others"],
)
def test_a_kernel_pays_if_it_is_faster_by_a_tenth_alone_and_not_slower_by_one_among_others(
    seconds: dict[int, float], expected: bool
) -> None:
    def measured(action: Action, num_rows: int) -> float:
        return 1.0 if action is Action.FULL else seconds[num_rows]

    assert pays(Action.INT4, measured, (1, 16, 32)) is expected


@pytest.mark.parametrize(("int8_pays", "keys"), [(True, Action.INT8), (False, Action.FULL)])
def test_int4_is_timed_with_the_keys_that_it_will_have(tiny_folder: Path, int8_pays: bool, keys: Action) -> None:
    model, seen = load_model_config(tiny_folder), set()

    def measure(make: MakeMatrices, action: Action, num_rows: int) -> float:
        made = make()
        if action is Action.INT4:
            seen.add((made[0].keys_from, made[0].finer_keys))
            assert [tuple(own.weight.shape) for own in made] == [*model.matrices()]
        return 1.0 if action is Action.FULL or (action is Action.INT8 and not int8_pays) else 0.5

    offered, has_int8_head = actions_that_pay(model, EAGER_ACTIONS, 32, CPU, torch.bfloat16, measure)
    assert offered == tuple(own for own in EAGER_ACTIONS if int8_pays or own is not Action.INT8)
    assert has_int8_head is int8_pays
    assert seen == {(model.query_size, keys)}


@pytest.mark.parametrize(("max_rows", "expected"), [(1, {1}), (8, {1, 8}), (64, {1, 16, 32})])
def test_kernels_are_timed_with_no_more_rows_than_decode_together(
    tiny_folder: Path, max_rows: int, expected: set[int]
) -> None:
    seen: set[int] = set()

    def measure(make: MakeMatrices, action: Action, num_rows: int) -> float:
        seen.add(num_rows)
        return float(action)

    actions_that_pay(load_model_config(tiny_folder), EAGER_ACTIONS, max_rows, CPU, torch.bfloat16, measure)
    assert seen == expected


@pytest.mark.parametrize("num_rows", [1, 16])
def test_more_and_larger_matrices_take_longer(num_rows: int) -> None:
    def made(*sizes: int) -> Callable[[], list[FullLinear]]:
        return lambda: [FullLinear(torch.randn(size, size, dtype=torch.bfloat16)) for size in sizes]

    few, many = (product_seconds(make, Action.FULL, num_rows) for make in (made(64), made(64, 4096)))
    assert 0 < few < many


class OffersOnlyFaster(CpuDevice):
    offers_only_faster = True


@pytest.mark.usefixtures("short_measurements")
def test_an_engine_without_int8_has_int4_with_keys_and_values_in_full(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = Action.SKIP, Action.INT4, Action.FULL
    monkeypatch.setattr(build, "actions_that_pay", lambda *arguments: (offered, False))
    monkeypatch.setattr(devices, "_DEVICES", {"cpu": OffersOnlyFaster})
    device_of.cache_clear()
    options = BuildOptions(native_code=NativeCode.OFF, checks_kept_costs=False)
    decoder = build_engine(tiny_folder, tmp_path, options, EngineConfig(), lambda line: None)._decoder
    monkeypatch.undo()
    device_of.cache_clear()
    (eager,) = decoder.backends[PassKind.DECODE]
    assert isinstance(eager, EagerBackend)
    assert decoder.actions == offered
    for layer in eager._layers:
        rows = torch.randn(3, decoder.config.hidden_size, dtype=torch.bfloat16)
        assert torch.equal(layer.key_values[Action.INT4](rows), layer.key_values[Action.FULL](rows))
    assert [*decoder.heads] == [Action.FULL]
