"""The differences between devices. A new device is a file here and a line in `_DEVICES`."""

from collections.abc import Iterable, Sequence
from functools import cache

import torch

from dash_runtime.devices.cpu import CpuDevice
from dash_runtime.devices.cuda import CudaDevice
from dash_runtime.devices.device import Device
from dash_runtime.devices.stretches import Stretch, stretches_of
from dash_runtime.errors import ConfigError

__all__ = [
    "CpuDevice",
    "CudaDevice",
    "Device",
    "Stretch",
    "describe_devices",
    "device_of",
    "find_device",
    "find_devices",
    "num_devices",
    "stretches_of",
]

_DEVICES: dict[str, type[Device]] = {"cpu": CpuDevice, "cuda": CudaDevice}
"""Devices by torch's name. Others run as the base class does: eagerly, with torch's own kernels for them."""


@cache
def device_of(device: torch.device) -> Device:
    """Returns the runtime's description of a torch device."""
    return _DEVICES.get(device.type, Device)(device)


def find_device(name: str) -> torch.device:
    """Returns the device called `name`; `auto` is CUDA if there is one, else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError("device", f"{name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def find_devices(names: Sequence[str]) -> list[torch.device]:
    """Returns the devices with these names, which share a model's layers.

    Raises:
        ConfigError: there is no such device, one is named twice, or they are of several kinds.
    """
    found = [find_device(name) for name in names]
    if len(found) == 1:
        return found
    # A name without a number, such as `cuda`, means one of the devices that have one.
    devices = [torch.empty(0, device=device).device for device in found]
    for place, device in enumerate(devices):
        if device in devices[:place]:
            raise ConfigError("devices", f"{names[place]!r} is the same device as {names[devices.index(device)]!r}")
        if device.type != devices[0].type:
            raise ConfigError("devices", f"must be of one kind, got {names[0]!r} and {names[place]!r}")
    return devices


def describe_devices(devices: Iterable[torch.device]) -> str:
    """Returns the devices in words."""
    return ", ".join(device_of(device).describe() for device in devices)


def num_devices(name: str) -> int:
    """Returns how many devices of a kind there are to share out among workers; 0 if all workers use the same one."""
    return torch.cuda.device_count() if name in ("auto", "cuda") else 0
