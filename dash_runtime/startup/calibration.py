"""What is fitted and measured once for a model on a device, and kept beside the converted models.

So every later start reads it, and a plan drawn for a budget is the same from one start to the next. Knows
folders; knows no requests.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dash_runtime.actions import CostTable, LatencyTable
from dash_runtime.decoder.compensation import Compensation, make_compensation
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.errors import ConfigError, DashRuntimeError
from dash_runtime.files.disk_cache import digest, keep
from dash_runtime.policy.draft_length import DRAFT_LENGTHS
from dash_runtime.startup.default_text import default_token_sequences
from dash_runtime.startup.fit_compensation import NUM_SEQUENCES, SEQUENCE_LENGTH, fit_compensation
from dash_runtime.startup.measure import measure_costs, measure_verification
from dash_runtime.startup.measure_latency import measure_latencies

Progress = Callable[[str], None]
_Table = TypeVar("_Table", CostTable, LatencyTable)
_Kept = TypeVar("_Kept")
_VERSION = 5


class Calibration:
    """Compensation and costs of one model on one device, read where they were kept, made otherwise.

    Args:
        model: what identifies the model and its precision.
        device: what identifies the device, and how layers run on it.
    """

    def __init__(self, folder: Path, model: tuple[str, ...], device: tuple[str, ...]) -> None:
        key = (_VERSION, *model, torch.__version__)
        self._compensation_file = folder / f"compensation-{digest(key)}.safetensors"
        self._costs_file = folder / f"costs-{digest((*key, *device))}.json"
        self._verification_file = folder / f"verification-{digest((*key, *device))}.json"
        self._row_costs_file = folder / f"row-costs-{digest((*key, *device))}.json"

    def compensation(self, decoder: Decoder, tokenizer: Path, progress: Progress) -> Compensation:
        shape = (decoder.num_layers, decoder.config.hidden_size)
        try:
            kept = load_file(self._compensation_file)
            on_device = {name: t.to(decoder.device, decoder.dtype) for name, t in kept.items()}
            return make_compensation("affine", on_device, *shape)
        except (OSError, SafetensorError, DashRuntimeError):
            progress("fitting the compensation of skipped layers (kept for later starts)")
        length = min(SEQUENCE_LENGTH, decoder.config.context_length)
        affine = fit_compensation(decoder, default_token_sequences(tokenizer, NUM_SEQUENCES, length)).affine
        tensors = {name: tensor.cpu().contiguous() for name, tensor in affine.tensors().items()}
        keep(self._compensation_file, lambda path: save_file(tensors, path))
        return affine

    def costs(self, decoder: Decoder, compensation: Compensation, progress: Progress) -> CostTable:
        """Costs at one row, as shares of a full-depth token."""
        kept = _read(self._costs_file, CostTable.from_json)
        if kept is not None and set(kept.layer) == set(decoder.actions) and set(kept.head) == set(decoder.heads):
            return kept
        progress("measuring what each action costs here (kept for later starts)")
        return self._keep(self._costs_file, measure_costs(decoder, compensation))

    def row_costs(self, decoder: Decoder, compensation: Compensation, progress: Progress) -> LatencyTable:
        """Seconds by action and number of rows."""
        kept = _read(self._row_costs_file, LatencyTable.from_json)
        if kept is not None and set(kept.seconds) == set(decoder.actions):
            return kept
        progress("measuring what each action takes here by number of rows (kept for later starts)")
        return self._keep(self._row_costs_file, measure_latencies(decoder, compensation))

    def verification_costs(self, decoder: Decoder, progress: Progress) -> dict[int, float]:
        """Of verifying a draft, by its length, as shares of a full-depth token."""
        kept = _read(self._verification_file, _verification_from_json)
        if kept is not None:
            return kept
        progress("measuring what verifying a draft takes here (kept for later starts)")
        costs = measure_verification(decoder, DRAFT_LENGTHS)
        self._write_json(self._verification_file, {str(length): cost for length, cost in costs.items()})
        return costs

    def _keep(self, path: Path, table: _Table) -> _Table:
        self._write_json(path, table.to_json())
        return table

    def _write_json(self, path: Path, facts: dict[str, Any]) -> None:
        keep(path, lambda partial: partial.write_text(json.dumps(facts, indent=1)))


def _verification_from_json(facts: dict[str, Any]) -> dict[int, float]:
    costs = {int(length): float(cost) for length, cost in facts.items()}
    if not set(costs) <= set(DRAFT_LENGTHS) or any(not 0 < cost < math.inf for cost in costs.values()):
        raise ValueError
    return costs


def _read(path: Path, parse: Callable[[dict[str, Any]], _Kept]) -> _Kept | None:
    """None where the file is not there, or damaged: then it is made again."""
    try:
        return parse(json.loads(path.read_text()))
    except (OSError, ValueError, ArithmeticError, KeyError, TypeError, AttributeError, RecursionError, ConfigError):
        return None
