"""Fits and measures a model on a device once, and keeps the results beside the converted models.

Later starts read them, so a plan drawn for a budget is the same from one start to the next. Each start compares the
kept tables with a quick measurement, so a table that a disturbed start measured is not kept for ever. Knows folders;
knows no requests.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dash_runtime.actions import Action, CostTable, LatencyTable
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.errors import ConfigError, DashRuntimeError
from dash_runtime.files.disk_cache import digest, keep
from dash_runtime.layers.compensation import Compensation, make_compensation
from dash_runtime.policy.draft_length import DRAFT_LENGTHS
from dash_runtime.policy.fixed_plans import MeasuredPlan
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.progress import Progress
from dash_runtime.rollout.task import Task
from dash_runtime.startup.default_text import default_token_sequences
from dash_runtime.startup.fit_compensation import NUM_SEQUENCES, SEQUENCE_LENGTH, fit_compensation
from dash_runtime.startup.measure import measure_costs, measure_verification
from dash_runtime.startup.measure_latency import measure_latencies
from dash_runtime.startup.plan_search import search_plans

_Table = TypeVar("_Table", CostTable, LatencyTable)
_Kept = TypeVar("_Kept")
_Entry = tuple[object, object]
_Ratios = Mapping[_Entry, float]
_VERSION = 5
_SEARCH_SEQUENCES = 3
_SEARCH_LENGTH = 128
_QUICK_ROUNDS = 2
_QUICK_ROWS = (1, 8)
_MARGIN = 1.5
"""Kept and measured ratios that differ by more than this factor contradict each other. Less is usual: with the memory
speed that neighbours on a shared host leave, INT4's share of FULL moves by a factor of 1.3."""
_LEAST_DIFFERENCE = 0.1
"""Smaller differences, as a share of FULL, hardly change a plan. They are also common: the time of a skip is
short, and part of it is a difference of two long ones."""


class DeviceCalibration:
    """Compensation, costs and latencies of one model on one device: read if they were kept, else made.

    Args:
        model: identifies the model and its precision.
        device: identifies the device, and how layers run on it.
        checks_kept: compare kept tables with a quick measurement.
        measure_costs, measure_latencies: as in `measure.py` and `measure_latency.py`.
    """

    def __init__(
        self,
        folder: Path,
        model: tuple[str, ...],
        device: tuple[str, ...],
        *,
        checks_kept: bool = True,
        measure_costs: Callable[..., CostTable] = measure_costs,
        measure_latencies: Callable[..., LatencyTable] = measure_latencies,
    ) -> None:
        key = (_VERSION, *model, torch.__version__)
        self._compensation_file = folder / f"compensation-{digest(key)}.safetensors"
        self._costs_file = folder / f"costs-{digest((*key, *device))}.json"
        self._plans_file = folder / f"plans-{digest((*key, *device))}.json"
        self._verification_file = folder / f"verification-{digest((*key, *device))}.json"
        self._latencies_file = folder / f"latencies-{digest((*key, *device))}.json"
        self._checks_kept = checks_kept
        self._measure_costs = measure_costs
        self._measure_latencies = measure_latencies

    def compensation(self, decoder: Decoder, tokenizer: Path, progress: Progress) -> Compensation:
        """Returns what a skipped layer adds to the hidden state instead of its output."""
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
        """Returns the costs at one row, as shares of a full-depth token."""
        kept = _read(self._costs_file, CostTable.from_json)
        if kept is not None and (set(kept.layer) != set(decoder.actions) or set(kept.head) != set(decoder.heads)):
            kept = None
        measure = partial(self._measure_costs, decoder, compensation)
        quick = partial(measure, rounds=_QUICK_ROUNDS) if self._checks_kept else None
        return _checked(self._costs_file, kept, measure, quick, _cost_ratios, "what each action costs here", progress)

    def plans(
        self, decoder: Decoder, tokenizer: Path, costs: CostTable, compensation: Compensation, progress: Progress
    ) -> tuple[MeasuredPlan, ...]:
        """Returns the best fixed plans by ascending cost, searched on a little text."""
        actions = [action.name for action in decoder.actions]
        kept = _read(self._plans_file, partial(_plans_from_json, actions=actions))
        if kept is not None:
            return kept
        length = min(_SEARCH_LENGTH, decoder.config.context_length)
        sequences = default_token_sequences(tokenizer, _SEARCH_SEQUENCES, length)
        if not sequences:
            return ()
        progress("searching the best fixed plans (kept for later starts)")
        spec = PlanSpec.fixed((Action.FULL,) * decoder.num_layers, Action.FULL, costs)
        plans = search_plans(Task(decoder, spec, compensation, num_prompt_tokens=length // 8), sequences)
        _write_json(self._plans_file, {"actions": actions, "plans": [plan.to_json() for plan in plans]})
        return plans

    def latencies(self, decoder: Decoder, compensation: Compensation, progress: Progress) -> LatencyTable:
        """Returns the seconds of a layer by action and number of rows."""
        kept = _read(self._latencies_file, LatencyTable.from_json)
        if kept is not None and set(kept.seconds) != set(decoder.actions):
            kept = None
        measure = partial(self._measure_latencies, decoder, compensation)
        quick = partial(measure, rows=_QUICK_ROWS, rounds=_QUICK_ROUNDS) if self._checks_kept else None
        what = "what each action takes here by number of rows"
        return _checked(self._latencies_file, kept, measure, quick, _latency_ratios, what, progress)

    def verification_costs(self, decoder: Decoder, progress: Progress) -> dict[int, float]:
        """Returns the cost of verifying a draft by its length, as a share of a full-depth token."""
        kept = _read(self._verification_file, _verification_from_json)
        if kept is not None:
            return kept
        progress("measuring what verifying a draft takes here (kept for later starts)")
        costs = measure_verification(decoder, DRAFT_LENGTHS)
        _write_json(self._verification_file, {str(length): cost for length, cost in costs.items()})
        return costs


def _checked(
    path: Path,
    kept: _Table | None,
    measure: Callable[[], _Table],
    measure_quickly: Callable[[], _Table] | None,
    ratios_of: Callable[[_Table], _Ratios],
    what: str,
    progress: Progress,
) -> _Table:
    """Returns the kept table unless there is none or two measurements contradict it; then measures and keeps another.

    Other work on the machine only ever adds time, but not to everything alike: a ratio errs upwards with its own time,
    downwards with FULL's. So a quick measurement alone proves nothing. It has to be confirmed by a whole one that finds
    the same entry wrong in the same direction.
    """
    if kept is None:
        progress(f"measuring {what} (kept for later starts)")
        return _keep_table(path, measure())
    doubts = _contradictions(ratios_of(kept), ratios_of(measure_quickly())) if measure_quickly else set()
    if not doubts:
        return kept
    progress(f"{what} no longer fits what was kept: measuring it again")
    measured = measure()
    is_wrong = bool(doubts & _contradictions(ratios_of(kept), ratios_of(measured)))
    return _keep_table(path, measured) if is_wrong else kept


def _contradictions(kept: _Ratios, measured: _Ratios) -> set[tuple[_Entry, bool]]:
    """Returns the entries that differ too much, each with True if the measured ratio is the larger one."""
    return {
        (entry, ratio > kept[entry])
        for entry, ratio in measured.items()
        if abs(ratio - kept[entry]) > _LEAST_DIFFERENCE and max(ratio, kept[entry]) > _MARGIN * min(ratio, kept[entry])
    }


def _cost_ratios(table: CostTable) -> _Ratios:
    """Returns each cost of a whole token as a share of all its layers in FULL."""
    layer = table.layer[Action.FULL] or math.inf
    ratios: dict[_Entry, float] = {("layer", action): cost / layer for action, cost in table.layer.items()}
    others = {("head", precision): cost for precision, cost in table.head.items()} | {("fixed", None): table.fixed}
    return ratios | {entry: cost / (layer * table.num_layers) for entry, cost in others.items()}


def _latency_ratios(table: LatencyTable) -> _Ratios:
    """Returns each action's seconds at the quickly measured numbers of rows as a share of FULL's, and FULL's of those
    of the fewest rows."""
    full = {rows: table.cost(Action.FULL, rows) or math.inf for rows in _QUICK_ROWS}
    ratios: dict[_Entry, float] = {
        (action, rows): table.cost(action, rows) / full[rows] for action in table.seconds for rows in full
    }
    return ratios | {(Action.FULL, rows): seconds / full[_QUICK_ROWS[0]] for rows, seconds in full.items()}


def _keep_table(path: Path, table: _Table) -> _Table:
    _write_json(path, table.to_json())
    return table


def _write_json(path: Path, facts: dict[str, Any]) -> None:
    keep(path, lambda unfinished: unfinished.write_text(json.dumps(facts, indent=1)))


def _plans_from_json(facts: dict[str, Any], actions: list[str]) -> tuple[MeasuredPlan, ...]:
    plans = tuple(MeasuredPlan.from_json(plan) for plan in facts["plans"])
    if not plans or facts["actions"] != actions:
        raise ValueError
    return plans


def _verification_from_json(facts: dict[str, Any]) -> dict[int, float]:
    costs = {int(length): float(cost) for length, cost in facts.items()}
    if not set(costs) <= set(DRAFT_LENGTHS) or any(not 0 < cost < math.inf for cost in costs.values()):
        raise ValueError
    return costs


def _read(path: Path, parse: Callable[[dict[str, Any]], _Kept]) -> _Kept | None:
    """Returns the kept table; None if the file is missing or damaged, so that it is made again."""
    try:
        return parse(json.loads(path.read_text()))
    except (OSError, ValueError, ArithmeticError, KeyError, TypeError, AttributeError, RecursionError, ConfigError):
        return None
