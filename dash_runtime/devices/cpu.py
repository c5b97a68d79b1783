"""The CPU. Knows torch's CPU kernels."""

import contextlib
import mmap
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from dash_runtime.devices.device import Device

_SYSTEM = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


class CpuDevice(Device):
    """All cores that torch has threads for."""

    row_block = 64
    """Smaller blocks let more of a prompt be reused, but make prefill some per cent slower (`benchmarks/prefix.py`)."""
    runs_native_code = True
    has_packed_products = True
    has_int8_rows = True
    unpacks_for_many_rows = True
    norms_as_layer_norm = True
    fills_lazily = True

    def describe(self) -> str:
        return f"{torch.backends.cpu.get_cpu_capability()} CPU, {torch.get_num_threads()} threads"

    def free_bytes(self) -> int | None:
        limits = map(_text_of, memory_limit_files(_text_of(_OWN_GROUPS)))
        return available_bytes(_text_of(_SYSTEM), limits)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # torch would write its zeros. The pages of an anonymous map are zeros already, and take no room until touched.
        # Linux gives huge ones on request, if nobody shares them.
        pages = mmap.mmap(-1, torch.Size(shape).numel() * dtype.itemsize, access=mmap.ACCESS_COPY)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # of a system without them
                pages.madvise(mmap.MADV_HUGEPAGE)
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


def available_bytes(system: str, group_limits: Iterable[str]) -> int | None:
    """Returns the memory that a process can have at most: what is free or can be freed, no more than its control group
    may have, and swap.

    Args:
        system: the text of `/proc/meminfo`; without it nobody can tell.
        group_limits: the limits of the process's control group as text; what is no number is no limit.
    """
    sizes = {name: 1024 * int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB$", system, re.MULTILINE)}
    if "MemAvailable" not in sizes:
        return None
    limits = [int(limit) for limit in group_limits if limit.strip().isdecimal()]
    return min([sizes["MemAvailable"], *limits]) + sizes.get("SwapFree", 0)


def memory_limit_files(own_groups: str) -> Iterator[Path]:
    """Yields where a process's control group and those around it have their limits of memory, in both versions of
    control groups. Some are not there: in a container a group's path may be the host's, so the root comes, too.

    Args:
        own_groups: the text of `/proc/self/cgroup`.
    """
    for line in own_groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounted, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            yield _GROUPS / mounted / group.relative_to("/") / name


def _text_of(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
