"""`dash-policy costs`: shows what each action costs on this device, how surely, since when; measures again if asked.

Knows the table that a server with the same model and device would use; knows no policies.
"""

import argparse
import sys
import time
from datetime import UTC, datetime
from functools import partial

from dash_runtime.checkpoints import resolve_checkpoint
from dash_runtime.config import EngineConfig
from dash_runtime.engine.cost_fit import MeasuredCosts
from dash_runtime.startup.build import BuildOptions, build_engine
from dash_runtime.startup.cost_keeper import CostKeeper
from dash_runtime.training.loaded_model import ModelOptions


def run_costs(options: argparse.Namespace) -> None:
    """Prints the table, as a server here would start with."""
    model: ModelOptions = options.model_options
    progress = partial(print, file=sys.stderr)
    folder = resolve_checkpoint(model.model, model.revision, model.cache_folder, progress)
    chosen = BuildOptions([model.device], measures_costs=options.measure)
    engine = build_engine(folder, model.cache_folder, chosen, EngineConfig(num_slots=1), progress)
    assert isinstance(engine.cost_watch, CostKeeper)
    print(f"{engine.facts.name} on {engine.facts.device}")
    print(table_of(engine.cost_watch.costs, time.time()))
    engine.close()


def table_of(costs: MeasuredCosts, now: float) -> str:
    """Returns the costs as lines of text; `now` is in seconds since 1970."""
    table, spread = costs.table, costs.spread
    rows = [(f"layer {action.name}", cost, spread.layer[action]) for action, cost in table.layer.items()]
    rows += [(f"head {precision.name}", cost, spread.head[precision]) for precision, cost in table.head.items()]
    rows += [("rest of a token", table.fixed, spread.fixed)]
    rows += [("policy evaluation", table.evaluation, spread.evaluation)] if table.evaluation else []
    lines = [f"{'share of a full-depth token':28} {'cost':>8} {'± s.d.':>8}"]
    lines += [f"{name:28} {cost:8.4f} {sd:8.4f}" for name, cost, sd in rows]
    made = datetime.fromtimestamp(costs.measured_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    rounds = f"{costs.num_rounds} rounds" if costs.num_rounds else "served steps"
    lines.append(f"from {rounds}, {made}, {_age(max(0.0, now - costs.measured_at))} ago")
    return "\n".join(lines)


def _age(seconds: float) -> str:
    for name, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if (count := int(seconds // length)) > 0:
            return f"{count} {name}{'s' if count > 1 else ''}"
    return "less than a minute"
