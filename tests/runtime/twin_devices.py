"""Devices that are made of the CPU and kept apart: an operation whose operands lie on two of them is refused.

A tensor of such a device has the CPU's numbers in it and says another device, `cpu:1` or `cpu:2`. As with CUDA, the
host's tensors are refused too, except numbers, indices and copies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dash_runtime import devices
from dash_runtime.devices import CpuDevice, Device, device_of

TWINS = [torch.device("cpu", 1), torch.device("cpu", 2)]
_COPIES = ("aten::copy_", "aten::to.", "aten::_to_copy")
_INDEXING = ("aten::index.", "aten::index_put", "aten::_index_put")


class TwinTensor(Tensor):
    """A tensor of a twin device; `inner` has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> "TwinTensor":
        made: TwinTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on a twin device, outside of `twin_devices`")


class TwinOperations(TorchDispatchMode):
    """Runs operations on the CPU's numbers, if their operands lie on one device."""

    def __init__(self) -> None:
        super().__init__()
        self.num_moved = 0
        """Copies from one twin to another."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        own = _operands_device(func, [*tree_leaves(args), *tree_leaves(kwargs)])
        asked = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
        device = asked[0] if asked else own
        if asked and device in TWINS and own in TWINS and device != own:
            self.num_moved += 1
        args, kwargs = tree_map(_inner, (args, kwargs))
        outputs = func(*args, **kwargs)
        if asked and device != own and func.name().startswith(_COPIES):
            outputs = outputs.clone()  # on the CPU there was nothing to move
        return tree_map(lambda output: _on(output, device), outputs)


class _Calls(TorchFunctionMode):
    """Makes tensors of Python's numbers on twin devices, and reads them: torch does neither by an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") in TWINS:
            return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        if func is Tensor.tolist and isinstance(args[0], TwinTensor):
            return args[0].inner.tolist()
        return func(*args, **kwargs)


def _operands_device(func: Any, leaves: list[Any]) -> torch.device | None:
    """Returns the twin device that the operands lie on, None for the host."""
    name = func.name()
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    on_twins = {leaf.device for leaf in tensors if isinstance(leaf, TwinTensor)}
    if name.startswith(_COPIES):
        return tensors[0].device if isinstance(tensors[0], TwinTensor) else None
    on_host = [leaf for leaf in tensors if not isinstance(leaf, TwinTensor) and leaf.dim()]
    if name.startswith(_INDEXING):
        on_host = []
    if len(on_twins) > 1 or (on_twins and on_host):
        places = sorted(map(str, on_twins)) + ["the host"] * bool(on_host)
        raise RuntimeError(f"{name}: operands on {' and '.join(places)}")
    return next(iter(on_twins), None)


def _inner(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return leaf.inner if isinstance(leaf, TwinTensor) else leaf


def _on(output: Any, device: torch.device | None) -> Any:
    is_plain = isinstance(output, Tensor) and not isinstance(output, TwinTensor)
    return TwinTensor(output, device) if is_plain and device in TWINS else output


class TwinDevice(CpuDevice):
    """The CPU's kernels, with memory of its own that the host cannot see."""

    has_packed_products = False
    runs_native_code = False
    zeros = Device.zeros
    upload = Device.upload
    download = Device.download
    likeliest = Device.likeliest


@contextmanager
def twin_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwinOperations]:
    """Makes the devices `TWINS` usable, in inference mode all along: their tensors cannot go into it or out of it."""
    made = {"cpu": lambda device: TwinDevice(device) if device in TWINS else CpuDevice(device)}
    monkeypatch.setattr(devices, "_DEVICES", made)
    device_of.cache_clear()
    try:
        with torch.inference_mode(), _Calls(), TwinOperations() as operations:
            yield operations
    finally:
        monkeypatch.undo()
        device_of.cache_clear()
