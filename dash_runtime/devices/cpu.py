"""The CPU. Knows torch's CPU kernels."""

import mmap
from typing import Any

import torch
from torch import Tensor

from dash_runtime.devices.device import Device


class CpuDevice(Device):
    """All cores that torch has threads for."""

    row_block = 64
    """Smaller blocks let more of a prompt be reused, but make prefill some per cent slower (`benchmarks/prefix.py`)."""
    compiles_layers = True
    has_packed_products = True
    has_int8_rows = True
    unpacks_for_many_rows = True
    norms_as_layer_norm = True

    def describe(self) -> str:
        return f"{torch.backends.cpu.get_cpu_capability()} CPU, {torch.get_num_threads()} threads"

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # torch would write its zeros. The pages of an anonymous map are zeros already, and take no room until touched.
        pages = mmap.mmap(-1, torch.Size(shape).numel() * dtype.itemsize)
        return torch.frombuffer(pages, dtype=dtype).view(shape)

    def upload(self, rows: Tensor) -> Tensor:
        return rows

    def download(self, tensor: Tensor) -> Tensor:
        return tensor

    def likeliest(self, logits: Tensor) -> Any:
        # numpy takes at most a third of torch's time.
        return logits.numpy().argmax(axis=-1).tolist()

    def pack_int4(self, quantized: Tensor) -> Tensor:
        return torch._convert_weight_to_int4pack_for_cpu(quantized, 1)

    def int4_product(self, inputs: Tensor, packed: Tensor, group_size: int, scales_and_zeros: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(inputs, packed, group_size, scales_and_zeros)
        return product
