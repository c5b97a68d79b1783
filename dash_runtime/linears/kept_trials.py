"""Keeps what was tried of a processor's products, so that later processes need not try again.

Knows files and the machine; knows no products.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dash_runtime.devices.processor import first_processor
from dash_runtime.files.disk_cache import digest, keep

_VERSION = 1
_MOST_BYTES = 1 << 16
_UNSTEADY = ("cpu MHz", "bogomips", "processor", "core id", "apicid", "initial apicid")


@dataclass(frozen=True, slots=True)
class KeptTrials:
    """Numbers by a key, in files of one folder. Without a folder, nothing is kept."""

    folder: Path | None = None

    def read(self, key: object) -> Sequence[int] | None:
        """Returns the numbers; None if none are kept, or not for this machine and torch."""
        if self.folder is None:
            return None
        try:
            with self._path(self.folder, key).open("rb") as file:
                numbers = json.loads(file.read(_MOST_BYTES))
        except (OSError, ValueError):
            return None
        is_sound = isinstance(numbers, list) and all(type(number) is int for number in numbers)
        return numbers if is_sound else None

    def keep(self, key: object, numbers: Sequence[int]) -> None:
        """Keeps the numbers, if there is a folder that can be written to."""
        if self.folder is not None:
            keep(self._path(self.folder, key), lambda path: path.write_text(json.dumps(list(numbers))))

    def _path(self, folder: Path, key: object) -> Path:
        own = (_VERSION, torch.__version__, torch.__config__.show(), torch.backends.cpu.get_cpu_capability())
        return folder / f"rows-{digest((*own, _processor(), key))}.json"


NO_TRIALS = KeptTrials()
"""Keeps nothing."""


def _processor() -> Sequence[str]:
    """Returns what the system says of the first processor and does not change while it runs, its caches included."""
    lines = first_processor() or (platform.machine(), platform.processor())
    return [line for line in lines if line.split("\t")[0].strip() not in _UNSTEADY]
