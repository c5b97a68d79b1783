"""Made-up devices for tests of cost tables: steps that take what a table says, at some speed."""

import random
from collections.abc import Iterator, Sequence

from dash_runtime.actions import Action, CostTable
from dash_runtime.engine.cost_fit import STANDARD_POSITIONS, CostSpread, MeasuredCosts
from dash_runtime.engine.step_times import StepTime

NUM_LAYERS = 10
LAYER_SECONDS = {Action.SKIP: 0.1, Action.INT3: 0.35, Action.INT4: 0.4, Action.INT8: 0.6, Action.FULL: 1.0}
TRUE = CostTable.from_seconds(NUM_LAYERS, LAYER_SECONDS, {Action.INT8: 1.0, Action.FULL: 2.0}, 0.5, 0.05)
WRONG = CostTable.from_seconds(
    NUM_LAYERS, LAYER_SECONDS | {Action.INT4: 0.15, Action.SKIP: 0.02}, {Action.INT8: 0.7, Action.FULL: 2.0}, 0.5, 0.05
)
"""A table as a disturbed start measures it: INT4 seems cheap beside a FULL that others held up."""
FULL_PLAN = bytes([Action.FULL] * NUM_LAYERS)
INT4_PLAN = bytes([Action.FULL, *[Action.INT4] * (NUM_LAYERS - 2), Action.FULL])
SKIP_PLAN = bytes([Action.FULL, *[Action.SKIP] * (NUM_LAYERS - 2), Action.FULL])


def measured(costs: CostTable) -> MeasuredCosts:
    return MeasuredCosts(costs, CostSpread.around(costs, 0.15), 8, 1.0)


def steps(
    source: str,
    plan: bytes,
    head: Action = Action.FULL,
    count: int = 8,
    *,
    costs: CostTable = TRUE,
    speed: float = 0.01,
    num_evaluations: int = 0,
    noise: float = 0.0,
    num_positions: int = STANDARD_POSITIONS,
    rng: random.Random | None = None,
) -> list[StepTime]:
    """Returns steps that take what `costs` says; `speed` is the seconds of a full-depth token."""
    rng = rng or random.Random(0)
    cost = costs.token_cost([Action(number) for number in plan], head, num_evaluations)
    return [
        StepTime(source, plan, head, num_evaluations, num_positions, speed * cost * rng.lognormvariate(0, noise))
        for _ in range(count)
    ]


def mixed_round(
    rng: random.Random, noise: float = 0.02, costs: CostTable = TRUE, speed: float = 0.01
) -> list[StepTime]:
    """Returns the steps of a measuring round over all actions, heads and evaluations."""
    plans: list[tuple[bytes, Action, int]] = [(bytes([action] * NUM_LAYERS), Action.INT8, 0) for action in Action]
    plans.append((FULL_PLAN, Action.FULL, 0))
    for number in range(5):
        plan = bytes(rng.choices([int(action) for action in Action], [rng.random() for _ in Action], k=NUM_LAYERS))
        plans.append((plan, rng.choice((Action.INT8, Action.FULL)), 7 * (number % 2)))
    rng.shuffle(plans)
    taken: list[StepTime] = []
    for number, (plan, head, num_evaluations) in enumerate(plans):
        own = steps(
            f"plan {number}",
            plan,
            head,
            costs=costs,
            speed=speed,
            num_evaluations=num_evaluations,
            noise=noise,
            rng=rng,
        )
        taken += own
    return taken


def said(costs: CostTable) -> Iterator[tuple[str, float]]:
    """Yields what tokens of some plans cost by a table."""
    plans: Sequence[tuple[str, bytes, Action, int]] = (
        ("full", FULL_PLAN, Action.FULL, 0),
        ("int4", INT4_PLAN, Action.INT8, 0),
        ("skip", SKIP_PLAN, Action.FULL, 0),
        ("adaptive", INT4_PLAN, Action.INT8, 7),
    )
    for name, plan, head, num_evaluations in plans:
        yield name, costs.token_cost([Action(number) for number in plan], head, num_evaluations)
