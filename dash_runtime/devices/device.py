"""The runtime's interface to a device. Knows tensors; knows no layers, policies or requests."""

from typing import Any

import torch
from torch import Tensor

from dash_runtime.config import LaneKind


class Device:
    """A device that needs nothing beyond torch. Subclasses override what they do differently."""

    row_block = 256
    """Rows of a prompt that attention takes at a time. Each block is a whole pass, and short passes cost as much as
    long ones."""
    default_lane = LaneKind.INLINE
    lanes = frozenset((LaneKind.INLINE, LaneKind.THREAD))
    has_graphs = False
    """True if the launches of a layer can be captured and replayed."""
    compiles_layers = False
    """True if Inductor's programs are faster than the library's kernels."""
    has_packed_products = False
    """True if the library may have bf16 products over weights in a layout of its own."""
    has_int8_rows = False
    """True if the library's INT8 product is fast for a few rows of a small matrix."""
    unpacks_for_many_rows = False
    """True if many rows take less time with unpacked weights than with the library's INT8 and INT4 products."""
    norms_as_layer_norm = False
    """True if RMS norm is fastest as the layer norm of (x, −x)."""
    fills_lazily = False
    """True if the memory of a pool takes room only once it is written."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def describe(self) -> str:
        """Returns the device in words, for logs and for the names of files that depend on it."""
        return str(self.device)

    def synchronise(self) -> None:
        """Waits until all queued work is done."""

    def free_bytes(self) -> int | None:
        """Returns the memory that this process can still get; None if nobody can tell."""
        return None

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns memory for a whole pool, all zeros."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def upload(self, rows: Tensor) -> Tensor:
        """Copies a small tensor of the host, without waiting for queued work."""
        return rows.to(self.device)

    def download(self, tensor: Tensor) -> Tensor:
        """Copies to the host; the copy may be read once the work queued so far is done."""
        return tensor.cpu()

    def wait_for_downloads(self) -> None:
        """Waits until everything downloaded so far has arrived."""

    def likeliest(self, logits: Tensor) -> Any:
        """Returns the index of the largest logit, the first of equal ones.

        A number for `[vocab_size]`, a list for `[rows, vocab_size]`.
        """
        return logits.argmax(dim=-1).tolist()

    def pack_int4(self, quantized: Tensor) -> Tensor:
        """Packs int32 values 0…15, `[out_features, in_features]`, for `int4_product`.

        Raises:
            NotImplementedError: there is no kernel for this device or shape.
        """
        raise NotImplementedError(f"no INT4 kernel for {self.device.type}")

    def int4_product(self, inputs: Tensor, packed: Tensor, group_size: int, scales_and_zeros: Tensor) -> Tensor:
        """Returns `[rows, out_features]`; scales and zeros are `[groups, out_features, 2]`."""
        raise NotImplementedError(f"no INT4 kernel for {self.device.type}")
