"""The runtime's interface to a device. Knows tensors; knows no layers, policies or requests."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.config import LaneKind
from dash_runtime.devices.cuda_graphs import Capture
from dash_runtime.devices.step_timer import StepTimer, no_times


@dataclass(frozen=True, slots=True)
class AttendedRows:
    """The places of each row's sequence in a pool, in memory that stays where it is."""

    starts: Tensor
    """The first token of each sequence, int32 `[rows + 1]`; the last entry says nothing."""
    lengths: Tensor
    """Positions that each row attends to, int32 `[rows]`."""
    first_rows: Tensor
    """0, 1, …, int32 `[rows + 1]`: where each sequence's rows begin."""
    max_length: int
    """No length is larger."""


class Device:
    """A device that needs nothing beyond torch. Subclasses override what they do differently."""

    row_block = 256
    """Rows of a prompt that attention takes at a time. Each block is a whole pass, and short passes cost as much as
    long ones."""
    default_lane = LaneKind.INLINE
    lanes = frozenset((LaneKind.INLINE,))
    has_graphs = False
    """True if the launches of a layer can be captured and replayed."""
    has_own_memory = False
    """True if the host has to copy what it reads."""
    offers_only_faster = False
    """True if a rounded kernel may be slower than FULL's, and is then not offered."""
    most_rows_apart = 32
    """A float32 product rounds a lone row differently from several. Up to this many rows, enough for decoding, are
    compensated one by one, so that a row does not depend on its neighbours."""
    runs_native_code = False
    """True if native code is faster than the library's kernels."""
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

    def make_capture(self, stream: Any = None) -> Capture:
        """Returns what records graphs; on the given stream, or on one of its own.

        Raises:
            NotImplementedError: the device has no graphs (`has_graphs`).
        """
        raise NotImplementedError(f"no graphs on {self.device.type}")

    def step_timer(self, num_marks: int, is_exact: bool) -> StepTimer:
        """Returns what takes the times of a step's marks. On a device that only queues, exact times take a little time
        each."""
        return StepTimer(no_times(num_marks))

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns memory of the host, all zeros, that the device reads and writes while the host goes on."""
        return torch.zeros(shape, dtype=dtype)

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

    def attend_rows(
        self, queries: Tensor, keys: Tensor, values: Tensor, rows: AttendedRows, scale: float | None, window: int | None
    ) -> Tensor:
        """Attends with one row per sequence over a pool of all sequences' keys; the host knows no length.

        Args:
            queries: `[rows, num_heads, head_dim]`.
            keys: `[tokens, num_kv_heads, head_dim]`, as `values`.
            scale: factor of the scores; None means `head_dim ** -0.5`.
            window: how many of the latest positions a row sees, its own included; None for all.

        Returns:
            `[rows, num_heads * head_dim]`.
        """
        places = torch.arange(rows.max_length, device=keys.device)
        lengths = rows.lengths.unsqueeze(1)
        is_seen = places < lengths
        if window is not None:
            is_seen &= places >= lengths - window
        slots = (rows.starts[:-1].unsqueeze(1) + places).clamp_(max=len(keys) - 1)
        own_keys, own_values = (memory[slots].transpose(1, 2) for memory in (keys, values))
        folded = queries.unflatten(1, (keys.shape[1], -1))
        mask = is_seen[:, None, None]
        attended = functional.scaled_dot_product_attention(folded, own_keys, own_values, attn_mask=mask, scale=scale)
        return attended.flatten(1)

    def pack_int4(self, quantized: Tensor) -> Tensor:
        """Packs int32 values 0…15, `[out_features, in_features]`, for `int4_product`.

        Raises:
            NotImplementedError: there is no kernel for this device or shape.
        """
        raise NotImplementedError(f"no INT4 kernel for {self.device.type}")

    def int4_product(self, inputs: Tensor, packed: Tensor, group_size: int, scales_and_zeros: Tensor) -> Tensor:
        """Returns `[rows, out_features]`; scales and zeros are `[groups, out_features, 2]`."""
        raise NotImplementedError(f"no INT4 kernel for {self.device.type}")
