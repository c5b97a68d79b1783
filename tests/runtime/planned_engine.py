"""An engine over a small decoder with SKIP and FULL, whose fixed plans skip one to four of its six layers."""

from collections.abc import Mapping

from dash_runtime.actions import Action, CostTable
from dash_runtime.config import EngineConfig, Mode, SkipOptions
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.constraints import ConstraintCompiler
from dash_runtime.engine.engine import Engine
from dash_runtime.passes import Planner
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.policy.draft_costs import RoundCosts
from dash_runtime.policy.draft_length import LEAST_GAIN, USUAL_SECOND_ROW
from dash_runtime.policy.fixed_plans import MeasuredPlan, named
from dash_runtime.startup.measured_engine import assemble_engine
from tests.runtime.support import some_affine

ACTIONS = (Action.SKIP, Action.FULL)
EOS = 256
"""The end of a sequence for the tokenizer whose tokens are bytes."""
MODES = {
    "full": SkipOptions(Mode.FULL_DEPTH),
    "exact": SkipOptions(Mode.EXACT, compute_budget=0.8),
    "adaptive": SkipOptions(Mode.ADAPTIVE, compute_budget=0.8),
    "fixed": SkipOptions(Mode.FIXED, fixed_action=Action.SKIP),
}
COSTS = CostTable.from_seconds(6, {Action.SKIP: 0.1, Action.FULL: 1.0}, {Action.FULL: 2.0}, 0.2)
PLANS = named(
    [
        MeasuredPlan("", (Action.FULL, *[Action.SKIP] * count, *[Action.FULL] * (5 - count)), Action.FULL, 0.1 * count)
        for count in range(1, 5)
    ],
    COSTS,
)
NEARLY_FREE = {1: 0.5, 3: 0.5, 7: 0.5}
"""Verifications so cheap that the engine drafts whatever is accepted."""


def make_engine(
    decoder: Decoder,
    eos: frozenset[int] = frozenset(),
    verification_costs: Mapping[int, float] = NEARLY_FREE,
    least_gain: float = LEAST_GAIN,
    constraints: ConstraintCompiler | None = None,
    second_row: float = USUAL_SECOND_ROW,
    round_costs: RoundCosts | None = None,
    planner: Planner | None = None,
    **options: int,
) -> Engine:
    config = EngineConfig(**options)  # type: ignore[arg-type]
    drafting = verification_costs, least_gain, PLANS, second_row
    catalog = PolicyCatalog(COSTS, ACTIONS, some_affine(decoder), (), 0.8, *drafting)
    own = {"planner": planner, "constraints": constraints, "round_costs": round_costs}
    return assemble_engine(decoder, catalog, config, 512, eos, **own)  # type: ignore[arg-type]
