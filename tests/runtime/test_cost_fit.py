"""A cost table fitted to step times: right whatever the machine's speed, its disturbances and its first guess."""

import random
from dataclasses import replace

import pytest

from dash_runtime.actions import Action
from dash_runtime.engine.cost_fit import CostFit, CostSpread, fit_costs
from dash_runtime.engine.step_times import StepClock, StepTime
from tests.runtime.cost_samples import FULL_PLAN, INT4_PLAN, SKIP_PLAN, TRUE, WRONG, mixed_round, said, steps


def watching(costs=WRONG) -> CostFit:
    return CostFit(costs, CostSpread.around(costs, 0.15))


def add(fit: CostFit, *groups: list[StepTime]) -> None:
    for group in groups:
        for step in group:
            fit.add(step)


def test_any_guess_becomes_the_table_that_steps_follow() -> None:
    rng = random.Random(1)
    table, _ = fit_costs(WRONG, [mixed_round(rng, noise=0.02) for _ in range(8)])
    assert dict(said(table)) == pytest.approx(dict(said(TRUE)), abs=0.015)


def test_a_machine_whose_speed_changes_between_rounds_gives_the_same_table() -> None:
    rng = random.Random(2)
    table, _ = fit_costs(
        WRONG, [mixed_round(rng, 0.01, speed=speed) for speed in (0.01, 0.03, 0.008, 0.02, 0.01, 0.04)]
    )
    assert dict(said(table)) == pytest.approx(dict(said(TRUE)), abs=0.02)


def test_steps_that_something_held_up_do_not_count() -> None:
    rng = random.Random(3)
    rounds = [mixed_round(rng, 0.01) for _ in range(8)]
    held_up = [
        [
            StepTime(
                s.source, s.plan, s.head, s.num_evaluations, s.num_positions, s.seconds * (9 if place % 7 == 3 else 1)
            )
            for place, s in enumerate(own)
        ]
        for own in rounds
    ]
    table, _ = fit_costs(WRONG, held_up)
    assert dict(said(table)) == pytest.approx(dict(said(TRUE)), abs=0.02)


def test_the_spread_says_how_little_a_few_steps_tell() -> None:
    rng = random.Random(4)
    _, few = fit_costs(WRONG, [mixed_round(rng)[:24]])
    _, many = fit_costs(WRONG, [mixed_round(rng) for _ in range(8)])
    assert few.layer[Action.SKIP] > 2 * many.layer[Action.SKIP]


def test_a_single_plan_says_nothing_against_a_table() -> None:
    fit = watching()
    add(fit, *(steps("int4", INT4_PLAN, Action.INT8) for _ in range(40)))
    assert fit.errors()["int4"][0] == pytest.approx(0, abs=1e-6)
    assert dict(said(fit.estimate()[0])) == pytest.approx(dict(said(WRONG)))


def test_plans_served_in_turn_show_how_far_a_table_is_off() -> None:
    fit = watching()
    for _ in range(10):
        add(fit, steps("full-depth", FULL_PLAN), steps("int4", INT4_PLAN, Action.INT8))
    error, sd = fit.errors()["int4"]
    off = dict(said(TRUE))["int4"] - dict(said(WRONG))["int4"]
    assert error == pytest.approx(off, abs=0.05)
    assert sd < 0.02


def test_evaluations_that_vanish_in_noise_keep_a_cost() -> None:
    # A start measures anew what was measured without a policy, whose evaluations cost nothing.
    fit = watching()
    for _ in range(10):
        free = steps("adaptive", SKIP_PLAN, num_evaluations=7, costs=replace(TRUE, evaluation=0.0), speed=0.009)
        add(fit, free, steps("skips", SKIP_PLAN), steps("full-depth", FULL_PLAN))
    table, _ = fit.estimate()
    assert 0 < table.evaluation < 1e-4


def test_long_contexts_make_no_plan_dearer() -> None:
    fit = watching(TRUE)
    for _ in range(20):
        long = [
            StepTime(s.source, s.plan, s.head, 0, 1256, s.seconds + 0.01 * 0.1 * TRUE.layer[Action.FULL] * 10)
            for s in steps("int4", INT4_PLAN, Action.INT8)
        ]
        add(fit, long, steps("full-depth", FULL_PLAN), steps("int4", INT4_PLAN, Action.INT8))
    error, _ = fit.errors()["int4"]
    assert abs(error) < 0.01


def test_old_evidence_fades() -> None:
    fit = watching(TRUE)
    for costs in (WRONG, TRUE):
        for _ in range(60):
            add(fit, steps("full-depth", FULL_PLAN, costs=costs), steps("int4", INT4_PLAN, Action.INT8, costs=costs))
            fit.end_epoch()
    assert abs(fit.errors()["int4"][0]) < 0.01


def test_a_step_lasts_until_the_next_one_of_its_request_begins() -> None:
    time = 0.0
    taken: list[StepTime] = []
    clock = StepClock(taken.append, lambda: time)

    def step(request_id: str, at: float) -> None:
        nonlocal time
        time = at
        clock.begin(request_id)
        clock.ran("int4", INT4_PLAN, Action.INT8, 0, 9)

    step("a", 1.0)
    step("a", 3.0)
    step("b", 7.0)  # the last step of a request has no next one
    clock.begin(None)
    clock.ran("both", INT4_PLAN, Action.INT8, 0, 9)  # several rows
    step("b", 9.0)
    step("b", 10.0)
    assert [own.seconds for own in taken] == [2.0, 1.0]


def test_tokens_of_one_step_have_equal_shares_of_its_time() -> None:
    time = 1.0
    taken: list[StepTime] = []
    clock = StepClock(taken.append, lambda: time)
    clock.begin("a")
    for num_positions in (9, 10, 11, 12):
        clock.ran("int4", INT4_PLAN, Action.INT8, 0, num_positions)
    time = 3.0
    clock.begin("a")
    assert [(own.num_positions, own.seconds) for own in taken] == [(9, 0.5), (10, 0.5), (11, 0.5), (12, 0.5)]
