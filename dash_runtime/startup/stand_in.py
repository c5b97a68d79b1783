"""The differences of an engine that only stands in for a compiled one, while programs are compiled.

It is to serve within seconds, and for some minutes: so it takes guesses instead of measurements, and keeps none of
them. Knows calibrations and memory; knows no processes.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dash_runtime.actions import Action, CostTable
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.cost_fit import CostSpread, MeasuredCosts
from dash_runtime.layers.compensation import Compensation
from dash_runtime.policy.fixed_plans import MeasuredPlan
from dash_runtime.progress import Progress
from dash_runtime.startup.calibration import DeviceCalibration, search_task
from dash_runtime.startup.measure_costs import StepMeasurement
from dash_runtime.startup.placement import CACHE, ModelBytes, Room, place_layers
from dash_runtime.startup.plan_search import uniform_plans

_SPREAD = 0.5
"""Standard deviation of a guessed cost, as a share of it."""
_WORKER_BYTES = 1 << 30
"""What a worker takes beside weights and cache: libraries, and what passes leave behind."""
_COMPILER_BYTES = 1 << 30
"""What each process that compiles takes."""
_COPIES_OF_WEIGHTS = 2
"""Eager layers keep some matrices in a second form."""


def has_room_for_two(needs: ModelBytes, room: Room, num_compilers: int) -> bool:
    """Returns True if the free memory holds an engine that stands in and, beside it, first the compilers and then the
    engine that follows."""
    if room.free is None:
        return True
    (place,) = place_layers(needs, [room])
    follows = place.required + place.needs[CACHE] + _WORKER_BYTES
    stands_in = follows + (_COPIES_OF_WEIGHTS - 1) * place.required
    return stands_in + max(follows, num_compilers * _COMPILER_BYTES) <= room.free


def guessed_costs(measurement: StepMeasurement) -> MeasuredCosts:
    """Returns what each part of a token takes by itself, in a loop of a second. Served steps correct it."""
    table = measurement.guess()
    return MeasuredCosts(table, CostSpread.around(table, _SPREAD), 0, time.time())


class GuessedCalibration(DeviceCalibration):
    """Shares the compensation, which is the same for every engine of the model. Reads and keeps nothing else."""

    def costs(
        self,
        actions: Sequence[Action],
        heads: Sequence[Action],
        measure: Callable[[], MeasuredCosts],
        progress: Progress,
        *,
        has_policy: bool = False,
        measures_again: bool = False,
    ) -> MeasuredCosts:
        return measure()

    def keep_costs(self, costs: MeasuredCosts) -> None:
        pass

    def plans(
        self,
        supported: Sequence[Action],
        eager_decoder: Callable[[], Decoder],
        tokenizer: Path,
        costs: CostTable,
        compensation: Compensation,
        progress: Progress,
    ) -> tuple[MeasuredPlan, ...]:
        """Returns the plans with one kernel everywhere."""
        task, sequences = search_task(eager_decoder(), tokenizer, costs, compensation)
        return uniform_plans(task, sequences) if sequences else ()

    def verification_costs(self, decoder: Decoder, progress: Progress) -> dict[int, float]:
        """Returns none: EXACT does not draft."""
        return {}
