"""The risky pieces of a decoding graph, each captured and replayed alone, beside the same on the CPU.

Knows a device's kernels and graphs; knows no models.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.gpu_once.live_report import LiveReport
from benchmarks.gpu_once.parity import LAYER_BOUND, relative_error
from benchmarks.gpu_once.whole_step import as_it_is
from dash_runtime.actions import Action
from dash_runtime.devices import device_of
from dash_runtime.devices.device import AttendedRows
from dash_runtime.linears.dense_linear import FullLinear
from dash_runtime.linears.quantization import make_linear

Piece = Callable[[torch.device], tuple[Callable[[], None], Tensor]]
"""Returns what a graph does on a device, and the tensor that this writes, of the same numbers on every device."""
_HEADS, _KEY_HEADS, _CHANNELS, _TOKENS = 8, 2, 64, 512


def attention(device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Rows whose sequences begin in any order, as a pool has them."""
    queries = _numbers(device, 3, _HEADS, _CHANNELS)
    keys, values = (_numbers(device, _TOKENS, _KEY_HEADS, _CHANNELS, seed=seed) for seed in (1, 2))
    starts, lengths, first_rows = (
        torch.tensor(own, dtype=torch.int32, device=device) for own in ([256, 0, 128, 448], [40, 17, 1], range(4))
    )
    result = torch.zeros(3, _HEADS * _CHANNELS, dtype=torch.bfloat16, device=device)

    def run() -> None:
        rows = AttendedRows(starts, lengths, first_rows, 1024)
        result.copy_(device_of(device).attend_rows(queries, keys, values, rows, None, None))

    return run, result


def int4(device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """A product in INT4, whose keys and values are in FULL."""
    weight, inputs = _numbers(device, 768, 512), _numbers(device, 3, 512, seed=1)
    linear = make_linear(Action.INT4, FullLinear(weight, keys_from=512, finer_keys=Action.FULL))
    result = torch.zeros(3, 768, dtype=torch.bfloat16, device=device)
    return lambda: result.copy_(linear(inputs)), result


def index_copy(device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Keys that are written where the device reads their places."""
    pool = torch.zeros(_TOKENS, _KEY_HEADS, _CHANNELS, dtype=torch.bfloat16, device=device)
    keys = _numbers(device, 3, _KEY_HEADS, _CHANNELS)
    places = torch.tensor([300, 7, 511], device=device)
    return lambda: pool.index_copy_(0, places, keys), pool


def pinned_copies(device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Numbers that come from the host's memory and go back there."""
    own = device_of(device)
    given, result = own.host_memory((64,), torch.float32), own.host_memory((64,), torch.float32)
    given.copy_(torch.arange(64))
    there = torch.zeros(64, device=device)

    def run() -> None:
        there.copy_(given, non_blocking=True)
        result.copy_(there * 2, non_blocking=True)

    return run, result


PIECES: Mapping[str, Piece] = {own.__name__: own for own in (pinned_copies, index_copy, attention, int4)}


@torch.inference_mode()
def piece_parity(report: LiveReport, name: str, device: torch.device) -> None:
    """Captures a piece, replays it twice, and compares what it wrote with what the CPU writes."""
    run, expected = PIECES[name](torch.device("cpu"))
    run()
    run, result = PIECES[name](device)
    own = device_of(device)
    replay = own.make_capture()(run) if own.has_graphs else as_it_is(run)
    for _ in range(2):
        result.zero_()
        replay()
        own.synchronise()
        report.require(f"piece_{name}_error", relative_error(expected.float(), result.float().cpu()), LAYER_BOUND)


def _numbers(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16().to(device)
