"""A start captures what the first requests replay, and leaves the other graphs to idle time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dash_runtime import devices
from dash_runtime.config import EngineConfig, GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.decoder.backends import cuda as cuda_backend
from dash_runtime.devices import CpuDevice, device_of
from dash_runtime.devices.cuda_graphs import Capture, Replay
from dash_runtime.engine.engine import Engine
from dash_runtime.startup.build import BuildOptions, NativeCode, build_engine
from tests.runtime.random_policy import save_random_policy
from tests.runtime.support import drain, tokens

pytestmark = pytest.mark.usefixtures("short_measurements")


class CountingDevice(CpuDevice):
    """A CPU that counts the graphs that it would capture."""

    has_graphs = True
    num_captured = 0

    def make_capture(self, stream: Any = None) -> Capture:
        def capture(function: Callable[[], None]) -> Replay:
            CountingDevice.num_captured += 1
            function()
            return function

        return capture


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[CountingDevice]]:
    monkeypatch.setattr(devices, "_DEVICES", {"cpu": CountingDevice})
    monkeypatch.setattr(cuda_backend, "_SHORTEST_CONTEXT", 16)
    device_of.cache_clear()
    yield CountingDevice
    monkeypatch.undo()
    device_of.cache_clear()


def served(engine: Engine, num_rows: int, skip: SkipOptions, num_tokens: int) -> list[list[int]]:
    for row in range(num_rows):
        stopping = StoppingParameters(num_tokens, ignore_eos=True)
        engine.submit(GenerationRequest(str(row), [1 + row, 2, 3], stopping, skip=skip))
    events = drain(engine)
    return [tokens(events[str(row)]) for row in range(num_rows)]


def test_served_steps_capture_nothing_and_idle_time_captures_what_they_lacked(
    tiny_folder: Path, tmp_path: Path, counting: type[CountingDevice]
) -> None:
    policy = save_random_policy(tmp_path / "policy.safetensors", tiny_folder)
    options = BuildOptions(native_code=NativeCode.OFF, policy_file=policy, checks_kept_costs=False)
    engine = build_engine(tiny_folder, tmp_path, options, EngineConfig(num_slots=2, cache_tokens=128), print)
    modes = SkipOptions(Mode.FULL_DEPTH), SkipOptions(Mode.ADAPTIVE), SkipOptions(Mode.EXACT)
    before = counting.num_captured

    def answers() -> list[list[list[int]]]:
        return [served(engine, num_rows, skip, 20) for num_rows in (1, 2) for skip in modes]

    first = answers()
    assert counting.num_captured == before > 0
    assert not engine.later.is_done
    engine.later.finish()
    graphs = engine._decoder.graphs
    assert isinstance(graphs, cuda_backend.CudaBackend)
    assert {size.max_length for _, size in graphs._graphs[engine._pool]} == {0, 16, 128}
    after = counting.num_captured
    assert after > before
    engine.may_capture = True  # nothing would be captured now if it might be
    assert answers() == first
    assert counting.num_captured == after
