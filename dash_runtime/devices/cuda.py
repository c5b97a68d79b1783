"""NVIDIA's GPUs. Knows torch's CUDA kernels and copies. None of this has been run on one."""

from typing import Any

import torch
from torch import Tensor

from dash_runtime.config import LaneKind
from dash_runtime.devices.device import Device

_K_TILE = 16
_INNER_K_TILES = (8, 4, 2)


class CudaDevice(Device):
    """One GPU.

    Args:
        cuda: `torch.cuda`, or anything with its `Stream`, `Event`, `stream`, `current_stream` and `mem_get_info`.
    """

    default_lane = LaneKind.CUDA_STREAM
    lanes = frozenset(LaneKind)
    has_graphs = True

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        super().__init__(device)
        self.cuda = cuda

    def describe(self) -> str:
        return f"{torch.cuda.get_device_name(self.device)} ({self.device})"

    def synchronise(self) -> None:
        torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int | None:
        free, _ = self.cuda.mem_get_info(self.device)
        return int(free)

    def upload(self, rows: Tensor) -> Tensor:
        # A pageable copy would make the host wait for the decoder's stream.
        return rows.pin_memory().to(self.device, non_blocking=True)

    def download(self, tensor: Tensor) -> Tensor:
        # Without pinned memory the host would wait for the decoder's stream.
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

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
