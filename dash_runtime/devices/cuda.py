"""NVIDIA's GPUs. Knows torch's CUDA kernels and copies. None of this has been run on one."""

from typing import Any

import torch
from torch import Tensor

from dash_runtime.config import LaneKind
from dash_runtime.devices.cuda_graphs import Capture, CudaCapture
from dash_runtime.devices.device import AttendedRows, Device
from dash_runtime.devices.step_timer import CudaStepTimer, StepTimer

_MAX_HEAD_DIM = 256
_K_TILE = 16
_INNER_K_TILES = (8, 4, 2)


class CudaDevice(Device):
    """One GPU.

    Args:
        cuda: `torch.cuda`, or anything with its `Stream`, `Event`, `stream`, `current_stream`, `empty_cache` and
            `mem_get_info`.
    """

    default_lane = LaneKind.CUDA_STREAM
    lanes = frozenset(LaneKind)
    has_graphs = True
    has_own_memory = True
    offers_only_faster = True
    most_rows_apart = 0  # a product over all rows takes no longer than one over a single row

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        super().__init__(device)
        self.cuda = cuda
        self._timer: CudaStepTimer | None = None
        # cuDNN makes a plan for every new length, for some 30 ms each, and decoding has a new one at each token.
        torch.backends.cuda.enable_cudnn_sdp(False)

    def make_capture(self, stream: Any = None) -> Capture:
        return CudaCapture(self.device, stream, self.cuda)

    def describe(self) -> str:
        return f"{torch.cuda.get_device_name(self.device)} ({self.device})"

    def synchronise(self) -> None:
        torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int | None:
        self.cuda.empty_cache()  # timing kernels takes gigabytes, which torch would hold on to
        free, _ = self.cuda.mem_get_info(self.device)
        return int(free)

    def step_timer(self, num_marks: int, is_exact: bool) -> StepTimer:
        if not is_exact:
            return super().step_timer(num_marks, is_exact)
        if self._timer is None:
            self._timer = CudaStepTimer(num_marks, self.device, self.cuda)
        self._timer.start()
        return self._timer

    def keep_for(self, stream: Any, tensor: Tensor) -> None:
        """Keeps the memory of a tensor, which another stream may drop, until this stream has done its queued work."""
        tensor.record_stream(stream)

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def attend_rows(
        self, queries: Tensor, keys: Tensor, values: Tensor, rows: AttendedRows, scale: float | None, window: int | None
    ) -> Tensor:
        head_dim = queries.shape[-1]
        if queries.dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > _MAX_HEAD_DIM:
            return super().attend_rows(queries, keys, values, rows, scale, window)
        # FlashAttention reads where a sequence begins and how long it is on the device. With lengths given, the starts
        # may come in any order.
        attended, *_ = torch.ops.aten._flash_attention_forward(
            queries,
            keys,
            values,
            rows.first_rows,
            rows.starts,
            1,
            rows.max_length,
            0.0,
            False,
            False,
            scale=scale,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
            seqused_k=rows.lengths,
        )
        return attended.flatten(1)

    def upload(self, rows: Tensor) -> Tensor:
        # A pageable copy would make the host wait for the decoder's stream.
        return rows.pin_memory().to(self.device, non_blocking=True)

    def download(self, tensor: Tensor) -> Tensor:
        # Without pinned memory the host would wait for the decoder's stream.
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    def likeliest(self, logits: Tensor) -> Any:
        found = self.download(logits.argmax(dim=-1))
        self.wait_for_downloads()
        return found.tolist()

    def wait_for_downloads(self) -> None:
        # An event, unlike the whole stream, does not make a thread wait for what the decoder has queued since.
        arrived = self.cuda.Event()
        arrived.record(self.cuda.current_stream(self.device))
        arrived.synchronize()

    def pack_int4(self, quantized: Tensor) -> Tensor:
        pairs = (quantized[:, ::2] << 4 | quantized[:, 1::2]).to(torch.uint8)
        return torch._convert_weight_to_int4pack(pairs.contiguous(), inner_k_tiles(quantized.shape[1]))

    def int4_product(self, inputs: Tensor, packed: Tensor, group_size: int, scales_and_zeros: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int4pack_mm(inputs, packed, group_size, scales_and_zeros)
        return product


def inner_k_tiles(in_features: int) -> int:
    """Returns how many tiles of 16 inputs CUDA's INT4 kernel packs together: the most that divide the row.

    Raises:
        NotImplementedError: no such number divides it.
    """
    for tiles in _INNER_K_TILES:
        if in_features % (tiles * _K_TILE) == 0:
            return tiles
    raise NotImplementedError(f"CUDA's INT4 kernel takes no rows of {in_features} inputs")
