"""A wrong cost table is replaced, by what is served and by what is measured when nothing is; a right one stays."""

import random
from collections.abc import Iterator

import pytest

from dash_runtime.actions import Action, CostTable
from dash_runtime.engine.cost_fit import MeasuredCosts
from dash_runtime.engine.step_times import StepTime
from dash_runtime.startup.cost_keeper import CostKeeper, Measurement
from tests.runtime.cost_samples import FULL_PLAN, INT4_PLAN, SKIP_PLAN, TRUE, WRONG, measured, mixed_round, said, steps


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class FakeMeasurement:
    """Gives the steps of made-up rounds, a group each fourth call."""

    def __init__(self, clock: Clock, seconds_per_step: float) -> None:
        self.num_abandoned = 0
        self.seconds = 0.0
        self._seconds_per_step = seconds_per_step
        self._clock = clock
        self._random = random.Random(7)
        self._left: list[StepTime] = []
        self._num_calls = 0

    @property
    def is_between_rounds(self) -> bool:
        return not self._left

    def step(self) -> list[StepTime] | None:
        self._clock.seconds += self._seconds_per_step
        self.seconds += self._seconds_per_step
        if not self._left:
            self._left = mixed_round(self._random)
        self._num_calls += 1
        if self._num_calls % 4:
            return None
        done, self._left = self._left[:8], self._left[8:]
        return done

    def abandon(self) -> None:
        self.num_abandoned += 1
        self._left = []


class Watched:
    """A keeper with all that it says and does."""

    def __init__(self, costs: CostTable, *, idles: bool = False, seconds_per_step: float = 0.01) -> None:
        self.clock = Clock()
        self.words: list[str] = []
        self.replaced: list[MeasuredCosts] = []
        self.measurement = FakeMeasurement(self.clock, seconds_per_step)
        measurement: Measurement | None = self.measurement if idles else None
        self.keeper = CostKeeper(measured(costs), measurement, self.replaced.append, self.words.append, self.clock)

    def serve(self, *groups: list[StepTime]) -> None:
        for group in groups:
            for step in group:
                self.clock.seconds += step.seconds
                self.keeper.observe(step)

    def idle(self, seconds: float) -> None:
        ends_at = self.clock.seconds + seconds
        while self.clock.seconds + self.keeper.seconds_until_idle_work() < ends_at:
            self.clock.seconds += self.keeper.seconds_until_idle_work()
            self.keeper.work_idly()


def in_turn(rng: random.Random, rounds: int, drift: float = 0.0) -> Iterator[list[StepTime]]:
    """Yields answers of three plans; `drift` is the standard deviation of the log speed between answers."""
    plans = ("full-depth", FULL_PLAN, Action.FULL), ("int4", INT4_PLAN, Action.INT8), ("skip", SKIP_PLAN, Action.FULL)
    for _ in range(rounds):
        for plan in plans:
            speed = 0.01 * rng.lognormvariate(0, drift)
            yield steps(*plan, count=32, noise=0.03, rng=rng, speed=speed)


def assert_said_is_taken(costs: CostTable) -> None:
    assert dict(said(costs)) == pytest.approx(dict(said(TRUE)), abs=0.04)


def test_a_wrong_table_is_replaced_from_served_steps() -> None:
    watched = Watched(WRONG)
    watched.serve(*in_turn(random.Random(0), 60))
    assert_said_is_taken(watched.keeper.costs.table)
    assert watched.replaced[-1] == watched.keeper.costs
    assert watched.keeper.status.num_replacements == len(watched.replaced) == len(watched.words)
    assert all("the cost table is replaced" in words and "\n" not in words for words in watched.words)
    assert len(watched.replaced) <= 4


def test_a_right_table_stays() -> None:
    watched = Watched(TRUE, idles=True)
    watched.serve(*in_turn(random.Random(1), 100))
    watched.idle(60)
    assert (watched.replaced, watched.words) == ([], [])
    assert watched.keeper.status.error < 0.02


@pytest.mark.parametrize("seed", range(4))
def test_a_right_table_stays_where_speed_wanders_from_answer_to_answer(seed: int) -> None:
    watched = Watched(TRUE)
    for group in in_turn(random.Random(seed), 200, drift=0.3):
        watched.serve(group)
        watched.clock.seconds += 0.5
    assert watched.words == []


def test_a_wrong_table_is_replaced_when_nothing_is_served() -> None:
    watched = Watched(WRONG, idles=True)
    watched.idle(60)
    assert watched.replaced
    assert_said_is_taken(watched.keeper.costs.table)


def test_idle_rounds_become_rare() -> None:
    watched = Watched(TRUE, idles=True)
    watched.idle(60)
    assert watched.keeper.seconds_until_idle_work() > 60


def test_slow_rounds_leave_an_idle_server_mostly_idle() -> None:
    watched = Watched(TRUE, idles=True, seconds_per_step=0.5)
    watched.idle(600)
    assert 0 < watched.measurement.seconds < 0.25 * 600


def test_a_round_that_a_request_interrupted_is_begun_again() -> None:
    watched = Watched(TRUE, idles=True)
    watched.clock.seconds += watched.keeper.seconds_until_idle_work()
    watched.keeper.work_idly()
    assert watched.keeper.seconds_until_idle_work() == 0
    watched.serve(steps("full-depth", FULL_PLAN, count=300))
    watched.keeper.work_idly()
    assert watched.measurement.num_abandoned == 1


def test_without_a_measurement_there_is_no_idle_work() -> None:
    watched = Watched(TRUE)
    assert watched.keeper.seconds_until_idle_work() == float("inf")
    watched.keeper.work_idly()
