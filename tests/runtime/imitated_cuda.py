"""A CUDA device that is made of the CPU: work runs at once, and a checker says what a real one might do wrong.

- Streams, events and the host have vector clocks. Two accesses to the same memory, one of them a write, must be ordered
  by what was waited for; otherwise it is a race.
- A graph has to do at each replay what it did when it was captured, on the same memory: a real one would go on using
  the old addresses and numbers.
- Launches, copies from the host and waits are counted.

Memory counts as the device's if a graph uses it and did not make it.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from dash_runtime import devices
from dash_runtime.devices import CpuDevice, CudaDevice, device_of
from dash_runtime.devices.cuda_graphs import Capture, Replay

Clock = Counter[str]
"""How far each stream had come, by its name."""
_HOST = "host"


@dataclass(slots=True)
class _Access:
    actor: str
    clock: int
    is_write: bool
    what: str


@dataclass(slots=True)
class _Tape:
    """What a graph did when it was captured."""

    steps: list[object] = field(default_factory=list)
    made: set[int] = field(default_factory=set)
    """Memory that it made itself."""


class ImitatedCuda:
    """Stands for `torch.cuda`.

    Args:
        ignores: names of what has no effect, to see that the checker notices: `wait_event` or `synchronize`.
    """

    def __init__(self, ignores: str = "") -> None:
        self.ignores = ignores
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self._clocks: dict[str, Clock] = {}
        self._current = "decoder"
        self._accesses: dict[int, dict[tuple[int, int, str, bool], _Access]] = {}
        self._host_memory: dict[int, Tensor] = {}
        self._device_memory: set[int] = set()
        self._tape: _Tape | None = None
        self._place = 0
        self._is_capturing = False

    # What `torch.cuda` has.

    def Stream(self, device: torch.device, priority: int = 0) -> Any:  # noqa: N802
        return _Stream(self, f"stream {len(self._clocks)}")

    def Event(self, enable_timing: bool = False) -> Any:  # noqa: N802
        return _Event(self)

    def current_stream(self, device: torch.device | None = None) -> Any:
        return _Stream(self, self._current)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self._current = self._current, stream.name
        try:
            yield
        finally:
            self._current = before

    # The checker.

    def clock(self, actor: str) -> Clock:
        return self._clocks.setdefault(actor, Counter({actor: 1}))

    def join(self, actor: str, clock: Clock) -> None:
        self._clocks[actor] = self.clock(actor) | clock

    def host_memory(self, tensor: Tensor) -> Tensor:
        self._host_memory[_address(tensor)] = tensor
        return tensor

    def capture(self, function: Callable[[], None]) -> Replay:
        """Imitates a graph; see `Capture`."""
        tape = _Tape()
        self._run(function, tape, is_capturing=True)
        self.counts["captures"] += 1

        def replay() -> None:
            self.counts["launches"] += 1
            self._run(function, tape, is_capturing=False)

        return replay

    def _run(self, function: Callable[[], None], tape: _Tape, is_capturing: bool) -> None:
        self._tape, self._place, self._is_capturing = tape, 0, is_capturing
        tape.made.clear()
        self.join(self._current, self.clock(_HOST))  # the host launched it
        try:
            function()
        finally:
            self._tape = None
        if self._place != len(tape.steps):
            self.errors.append("a replay does less than was captured")

    def ran(self, name: str, reads: list[Tensor], writes: list[Tensor], made: list[Tensor], numbers: object) -> None:
        """Takes in an operation."""
        outer = [tensor for tensor in (*reads, *writes) if not self._is_made(tensor)]
        if self._tape is not None:
            self._tape.made |= {_address(tensor) for tensor in made}
            self._device_memory |= {_address(tensor) for tensor in outer} - self._host_memory.keys()
            step = name, numbers, [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in outer]
            self._check_step(self._tape, step)
            actor = self._current
        else:
            addresses = {_address(tensor) for tensor in outer}
            if addresses & self._device_memory:
                self.counts["launches"] += 1
                self.counts["uploads"] += bool(addresses - self._device_memory)
                actor = self._current
                self.join(actor, self.clock(_HOST))
            elif addresses & self._host_memory.keys():
                actor = _HOST
            else:
                return
        shared = self._device_memory | self._host_memory.keys()
        for is_write, tensors in ((False, reads), (True, writes)):
            for tensor in tensors:
                if _address(tensor) in shared and not self._is_made(tensor):
                    self._check_access(tensor, actor, is_write, name)

    def _is_made(self, tensor: Tensor) -> bool:
        return self._tape is not None and _address(tensor) in self._tape.made

    def _check_step(self, tape: _Tape, step: object) -> None:
        if self._is_capturing:
            tape.steps.append(step)
        elif self._place >= len(tape.steps) or tape.steps[self._place] != step:
            self.errors.append(f"a replay does something else than was captured: {step}")
        self._place += 1

    def _check_access(self, tensor: Tensor, actor: str, is_write: bool, what: str) -> None:
        low, high = _extent(tensor)
        clock = self.clock(actor)
        clock[actor] += 1
        known = self._accesses.setdefault(_address(tensor), {})
        for (other_low, other_high, *_), other in known.items():
            is_conflict = (is_write or other.is_write) and other.actor != actor
            if is_conflict and low < other_high and other_low < high and clock[other.actor] < other.clock:
                does, other_does = ("writes" if own else "reads" for own in (is_write, other.is_write))
                error = f"{actor} {does} ({what}) what {other.actor} {other_does} ({other.what}): nothing orders them"
                self.errors.append(error)
        known[low, high, actor, is_write] = _Access(actor, clock[actor], is_write, what)


class _Event:
    def __init__(self, cuda: ImitatedCuda) -> None:
        self._cuda = cuda
        self.clock: Clock = Counter()
        self._recorded_at = 0.0

    def record(self, stream: "_Stream") -> None:
        self._recorded_at = time.perf_counter()
        self.clock = self._cuda.clock(stream.name) | self._cuda.clock(_HOST)

    def elapsed_time(self, later: "_Event") -> float:
        return 1000 * (later._recorded_at - self._recorded_at)

    def synchronize(self) -> None:
        self._cuda.counts["waits"] += 1
        if self._cuda.ignores != "synchronize":
            self._cuda.join(_HOST, self.clock)


class _Stream:
    def __init__(self, cuda: ImitatedCuda, name: str) -> None:
        self._cuda = cuda
        self.name = name
        cuda.clock(name)

    def wait_event(self, event: _Event) -> None:
        if self._cuda.ignores != "wait_event":
            self._cuda.join(self.name, event.clock)

    def synchronize(self) -> None:
        self._cuda.join(_HOST, self._cuda.clock(self.name))


class ImitatedCudaDevice(CudaDevice):
    """The CPU's kernels, and CUDA's ways of launching, copying and waiting."""

    cuda: ImitatedCuda
    pack_int4 = CpuDevice.pack_int4
    int4_product = CpuDevice.int4_product
    describe = CpuDevice.describe
    free_bytes = CpuDevice.free_bytes
    offers_only_faster = False

    def make_capture(self, stream: Any = None) -> Capture:
        return self.cuda.capture

    def keep_for(self, stream: Any, tensor: Tensor) -> None:
        pass

    def synchronise(self) -> None:
        self.cuda.current_stream().synchronize()

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.cuda.host_memory(torch.zeros(shape, dtype=dtype))

    def upload(self, rows: Tensor) -> Tensor:
        self.cuda.counts["uploads"] += 1
        return rows.clone()

    def download(self, tensor: Tensor) -> Tensor:
        return self.cuda.host_memory(torch.zeros_like(tensor)).copy_(tensor)


class _Watch(TorchDispatchMode):
    """Tells the checker of every operation that is more than a view."""

    def __init__(self, cuda: ImitatedCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        schema = func._schema
        given = [*zip(schema.arguments, args, strict=False)]
        given += [(own, kwargs[own.name]) for own in schema.arguments if kwargs and own.name in kwargs]
        reads: list[Tensor] = []
        writes: list[Tensor] = []
        numbers: list[object] = []
        for argument, value in given:
            is_write = argument.alias_info is not None and argument.alias_info.is_write
            for leaf in tree_flatten(value)[0]:
                if isinstance(leaf, Tensor):
                    (writes if is_write else reads).append(leaf)
                else:
                    numbers.append(leaf)
        taken = {_address(tensor) for tensor in (*reads, *writes)}
        results = [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor)]
        made = [tensor for tensor in results if _address(tensor) not in taken]
        if made or writes:
            self._cuda.ran(func.name(), reads, writes, made, numbers)
        return outputs


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _extent(tensor: Tensor) -> tuple[int, int]:
    size = tensor.element_size()
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * size


@contextmanager
def imitated_cuda(monkeypatch: pytest.MonkeyPatch, ignores: str = "") -> Iterator[ImitatedCuda]:
    """Makes the CPU such a device, in inference mode all along."""
    cuda = ImitatedCuda(ignores)
    monkeypatch.setattr(devices, "_DEVICES", {"cpu": lambda device: ImitatedCudaDevice(device, cuda)})
    device_of.cache_clear()
    try:
        with torch.inference_mode(), _Watch(cuda):
            yield cuda
    finally:
        monkeypatch.undo()
        device_of.cache_clear()
