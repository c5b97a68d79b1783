"""Fits and measures a model on a device once, and keeps the results beside the converted models.

Later starts read them, so a plan drawn for a budget is the same from one start to the next. What was measured beside
other work is measured again by the next start. Served steps correct the costs (`cost_keeper.py`), and each start
compares the latencies with a quick measurement. Knows folders; knows no requests.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from dash_runtime.actions import Action, CostTable, LatencyTable
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.cost_fit import CostSpread, MeasuredCosts
from dash_runtime.errors import DashRuntimeError
from dash_runtime.files.disk_cache import digest, keep
from dash_runtime.layers.compensation import Compensation, make_compensation
from dash_runtime.policy.draft_length import MEASURED_LENGTHS
from dash_runtime.policy.fixed_plans import MeasuredPlan
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy import cheapest_kernel
from dash_runtime.progress import Progress
from dash_runtime.rollout.task import Task
from dash_runtime.startup.default_text import default_token_sequences
from dash_runtime.startup.fit_compensation import NUM_SEQUENCES, SEQUENCE_LENGTH, fit_compensation
from dash_runtime.startup.kept_tables import Facts, KeptTable, KeptTables
from dash_runtime.startup.measure import measure_rounds, measure_second_row, measure_verification
from dash_runtime.startup.measure_latency import measure_latencies
from dash_runtime.startup.measure_prompts import measure_prompts, prefill_actions
from dash_runtime.startup.plan_search import search_plans, search_text
from dash_runtime.startup.quiet import Quiet, quietness

_Value = TypeVar("_Value")
_Entry = tuple[object, object]
_Ratios = Mapping[_Entry, float]
_VERSION = 11
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
_DISTURBED_SPREAD = 1.0
"""What a disturbed start says of costs may be all wrong: served steps correct it soon."""


@dataclass(frozen=True, slots=True)
class Finding(Generic[_Value]):
    """Something that is measured once: what was kept of it, and how it is made, which also keeps it."""

    kept: _Value | None
    make: Callable[[], _Value]

    def get(self) -> _Value:
        """Returns what was kept, or makes it."""
        return self.make() if self.kept is None else self.kept


class DeviceCalibration:
    """Compensation, costs and latencies of one model on one device: read if they were kept, else made.

    Args:
        model: identifies the model and its precision.
        device: identifies the device, and how layers run on it.
        rounding: identifies the rounded weights, if not all are those to the nearest.
        checks_kept: measure again what a disturbed start kept, and compare kept latencies with a quick measurement.
        measure_latencies: as in `measure_latency.py`.
        quietness: as in `quiet.py`.
    """

    def __init__(
        self,
        folder: Path,
        model: tuple[str, ...],
        device: tuple[str, ...],
        rounding: str | None = None,
        *,
        checks_kept: bool = True,
        measure_latencies: Callable[..., LatencyTable] = measure_latencies,
        quietness: Callable[[], AbstractContextManager[Quiet]] = quietness,
    ) -> None:
        self._folder = folder
        self._model = (_VERSION, *model, torch.__version__)
        self._device = (*self._model, *device)
        self._rounding = () if rounding is None else (rounding,)
        self._checks_kept = checks_kept
        self._measure_latencies = measure_latencies
        self._tables = KeptTables(checks_kept, quietness)

    def compensation(self, decoder: Decoder, tokenizer: Path, progress: Progress) -> Finding[Compensation]:
        """What a skipped layer adds to the hidden state instead of its output."""
        shape = (decoder.num_layers, decoder.config.hidden_size)
        # States of another action than FULL have another fit.
        named = self._model if decoder.highest is Action.FULL else (*self._model, decoder.highest.name)
        file = self._folder / f"compensation-{digest(named)}.safetensors"

        def fit() -> Compensation:
            progress("fitting the compensation of skipped layers (kept for later starts)")
            length = min(SEQUENCE_LENGTH, decoder.config.context_length)
            sequences = default_token_sequences(tokenizer, NUM_SEQUENCES, length)
            affine = fit_compensation(decoder, sequences).affine
            tensors = {name: tensor.cpu().contiguous() for name, tensor in affine.tensors().items()}
            keep(file, lambda path: path.write_bytes(save(tensors)))  # `save_file` raises errors of its own
            return affine

        try:
            on_device = {name: t.to(decoder.device, decoder.dtype) for name, t in load_file(file).items()}
            return Finding(make_compensation("affine", on_device, *shape), fit)
        except (OSError, SafetensorError, DashRuntimeError):
            return Finding(None, fit)

    def costs(
        self,
        actions: Sequence[Action],
        heads: Sequence[Action],
        measure: Callable[[], MeasuredCosts],
        progress: Progress,
        *,
        has_policy: bool = False,
        measures_again: bool = False,
    ) -> Finding[MeasuredCosts]:
        """The costs at one row, as shares of a full-depth token.

        Args:
            has_policy: a learned policy is loaded, whose evaluations must have a cost.
            measures_again: measure even if a table was kept.
        """
        kept = None if measures_again else self._tables.read(self._costs)
        if kept is not None:
            has_all = set(kept.table.layer) == set(actions) and set(kept.table.head) == set(heads)
            kept = kept if has_all and (kept.table.evaluation > 0 or not has_policy) else None
        return Finding(kept, lambda: self._tables.measure(self._costs, measure, progress, _doubted))

    def keep_costs(self, costs: MeasuredCosts) -> None:
        """Keeps the costs for later starts."""
        self._tables.write(self._costs, costs)

    def plans(
        self,
        decoder: Decoder,
        tokenizer: Path,
        costs: Callable[[], tuple[CostTable, Compensation]],
        progress: Progress,
    ) -> Finding[tuple[MeasuredPlan, ...]]:
        """The best fixed plans by ascending cost, searched on a little text.

        Args:
            costs: says at what costs, and with which compensation.
        """
        actions = [action.name for action in decoder.actions]
        table = KeptTable(
            self._folder / f"plans-{digest((*self._device, *self._rounding))}.json",
            partial(_plans_from_json, actions=actions),
            lambda plans: {"actions": actions, "plans": [plan.to_json() for plan in plans]},
            "the best fixed plans",
        )

        def search() -> tuple[MeasuredPlan, ...]:
            length = min(_SEARCH_LENGTH, decoder.config.context_length)
            sequences = search_text(decoder.config, default_token_sequences(tokenizer, _SEARCH_SEQUENCES, length))
            if not sequences:
                return ()
            progress("searching the best fixed plans (kept for later starts)")
            own, compensation = costs()
            spec = PlanSpec.fixed((decoder.highest,) * decoder.num_layers, decoder.finest_head, own)
            plans = search_plans(Task(decoder, spec, compensation, num_prompt_tokens=length // 8), sequences)
            self._tables.write(table, plans)
            return plans

        return Finding(self._tables.read(table), search)

    def latencies(
        self, decoder: Decoder, compensation: Callable[[], Compensation], progress: Progress
    ) -> Finding[LatencyTable]:
        """The seconds of a layer by action and number of rows."""
        what = "what each action takes by number of rows"
        table = KeptTable(self._file("latencies"), LatencyTable.from_json, LatencyTable.to_json, what)
        kept = self._tables.read(table)
        if kept is not None and set(kept.seconds) != set(decoder.actions):
            kept = None

        def measure() -> LatencyTable:
            return self._measure_latencies(decoder, compensation())

        return Finding(kept, lambda: self._tables.measure(table, measure, progress))

    def checked_latencies(
        self, kept: LatencyTable, decoder: Decoder, compensation: Compensation, progress: Progress
    ) -> LatencyTable:
        """Returns kept latencies, or new ones if a quick measurement contradicts them."""
        if not self._checks_kept:
            return kept
        quick = self._measure_latencies(decoder, compensation, rows=_QUICK_ROWS, rounds=_QUICK_ROUNDS)
        if not _do_contradict(_latency_ratios(kept), _latency_ratios(quick)):
            return kept
        what = "what each action takes by number of rows"
        table = KeptTable(self._file("latencies"), LatencyTable.from_json, LatencyTable.to_json, what)
        progress(f"{what} no longer fits what was kept: measuring it again")
        # Other work on the machine only ever adds time, but not to everything alike.
        least = self._measure_latencies(decoder, compensation).least(kept)
        if least != kept:
            self._tables.write(table, least)
        return least

    def second_row(self, decoder: Decoder, progress: Progress) -> Finding[float]:
        """What a second row adds to a drafting pass, as a share of the first."""
        what = "what a second row of a draft takes"
        table = KeptTable(self._file("second-row"), _second_row_from_json, lambda share: {"share": share}, what)
        return self._finding(table, partial(measure_second_row, decoder), progress)

    def round_seconds(
        self, decoder: Decoder, counts: tuple[int, ...], progress: Progress
    ) -> Finding[tuple[LatencyTable, ...]]:
        """The seconds of passes of so many sequences that draft in step; see `measure_rounds`."""

        def parse(facts: Facts) -> tuple[LatencyTable, ...]:
            passes = tuple(map(LatencyTable.from_json, facts["passes"]))
            actions = {decoder.highest, cheapest_kernel(decoder.actions)}
            if not passes or any(own.rows != counts or set(own.seconds) != actions for own in passes):
                raise ValueError("other passes than those here")
            return passes

        def to_json(passes: tuple[LatencyTable, ...]) -> Facts:
            return {"passes": [own.to_json() for own in passes]}

        table = KeptTable(self._file("rounds"), parse, to_json, "what drafting together takes")
        return self._finding(table, partial(measure_rounds, decoder, counts), progress)

    def prompt_seconds(self, decoder: Decoder, progress: Progress) -> Finding[dict[Action, float]]:
        """The seconds of a prompt's pass in each action that it may have."""

        def parse(facts: Facts) -> dict[Action, float]:
            seconds = {Action[name]: float(own) for name, own in facts.items()}
            if set(seconds) != set(prefill_actions(decoder)) or any(not 0 < own < math.inf for own in seconds.values()):
                raise ValueError("other actions than those here")
            return seconds

        def to_json(seconds: dict[Action, float]) -> Facts:
            return {action.name: own for action, own in seconds.items()}

        table = KeptTable(self._file("prompts"), parse, to_json, "what a prompt takes in each precision")
        return self._finding(table, partial(measure_prompts, decoder), progress)

    def verification_costs(self, decoder: Decoder, progress: Progress) -> Finding[dict[int, float]]:
        """The cost of verifying drafts of some lengths, as shares of a full-depth token."""
        table = KeptTable(
            self._file("verification", MEASURED_LENGTHS),
            _verification_from_json,
            lambda costs: {str(length): cost for length, cost in costs.items()},
            "what verifying a draft takes",
        )
        return self._finding(table, partial(measure_verification, decoder, MEASURED_LENGTHS), progress)

    def _finding(self, table: KeptTable[_Value], measure: Callable[[], _Value], progress: Progress) -> Finding[_Value]:
        return Finding(self._tables.read(table), lambda: self._tables.measure(table, measure, progress))

    @property
    def _costs(self) -> KeptTable[MeasuredCosts]:
        return KeptTable(self._file("costs"), MeasuredCosts.from_json, MeasuredCosts.to_json, "what each action costs")

    def _file(self, name: str, *further: object) -> Path:
        """Returns the file of what was measured of this model on this device."""
        return self._folder / f"{name}-{digest((*self._device, *further))}.json"


def _doubted(costs: MeasuredCosts) -> MeasuredCosts:
    return replace(costs, spread=CostSpread.around(costs.table, _DISTURBED_SPREAD))


def _do_contradict(kept: _Ratios, measured: _Ratios) -> bool:
    """Returns True if an entry differs too much."""
    return any(
        abs(ratio - kept[entry]) > _LEAST_DIFFERENCE and max(ratio, kept[entry]) > _MARGIN * min(ratio, kept[entry])
        for entry, ratio in measured.items()
    )


def _latency_ratios(table: LatencyTable) -> _Ratios:
    """Returns each action's seconds at the quickly measured numbers of rows as a share of the highest one's, and that
    one's of those of the fewest rows."""
    highest = max(table.seconds)
    full = {rows: table.cost(highest, rows) or math.inf for rows in _QUICK_ROWS}
    ratios: dict[_Entry, float] = {
        (action, rows): table.cost(action, rows) / full[rows] for action in table.seconds for rows in full
    }
    return ratios | {(highest, rows): seconds / full[_QUICK_ROWS[0]] for rows, seconds in full.items()}


def _plans_from_json(facts: Facts, actions: list[str]) -> tuple[MeasuredPlan, ...]:
    plans = tuple(MeasuredPlan.from_json(plan) for plan in facts["plans"])
    if not plans or facts["actions"] != actions:
        raise ValueError
    return plans


def _verification_from_json(facts: Facts) -> dict[int, float]:
    costs = {int(length): float(cost) for length, cost in facts.items()}
    if not set(costs) <= set(MEASURED_LENGTHS) or any(not 0 < cost < math.inf for cost in costs.values()):
        raise ValueError
    return costs


def _second_row_from_json(facts: Facts) -> float:
    share = float(facts["share"])
    if not 0 <= share < math.inf:
        raise ValueError
    return share
