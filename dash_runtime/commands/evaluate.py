"""`dash-policy evaluate`, `calibrate` and `inspect`: compares policies with their controls and shows their files.

Knows options, files and tables; the figures come from evaluation/ and training/.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from dash_runtime.actions import Action, CostTable
from dash_runtime.commands.cost_files import read_costs
from dash_runtime.commands.spoken import say
from dash_runtime.commands.task_quality import EngineOf, evaluate_tasks
from dash_runtime.config import EngineConfig
from dash_runtime.engine.engine import Engine
from dash_runtime.errors import ConfigError
from dash_runtime.evaluation.accuracy import Accuracy
from dash_runtime.evaluation.controls import Evaluation, RefitStatic, Row, policy_task, with_dominated
from dash_runtime.evaluation.plots import ParetoPoint, has_matplotlib, plot_action_rates, plot_pareto
from dash_runtime.evaluation.serving import measure_serving, own_text
from dash_runtime.layers.compensation import Compensation, LowRank, packed, unpacked
from dash_runtime.model_config import ModelConfig
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.policy.fixed_plans import usable
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy_file import find_policies, load_policy, save_policy
from dash_runtime.rollout.choices import action_rates
from dash_runtime.rollout.task import Task, greedy_outcome
from dash_runtime.startup.build import SHIPPED_POLICIES
from dash_runtime.startup.measured_engine import assemble_engine
from dash_runtime.startup.plan_search import search_text
from dash_runtime.training.calibrate import calibrated, describe_budgets
from dash_runtime.training.curve import write_whole
from dash_runtime.training.head_map import with_narrow_head
from dash_runtime.training.loaded_model import SEQUENCE_LENGTH, LoadedModel, ServedDecoder
from dash_runtime.training.trained_compensation import refit_plan

_SEARCH_SEQUENCES = 4
_NUM_SLOTS = 16
_SPEED_TOKENS = 64


def run_evaluate(options: argparse.Namespace) -> None:
    """Prints the tables of policies and of tasks; writes them as JSON and as plots if options ask for it."""
    if options.plots is not None and not has_matplotlib():
        raise ConfigError("plots", "needs matplotlib: pip install 'dash-llm[train]'")
    has_tasks = options.tasks is not None or options.last_words is not None
    if options.no_table and not has_tasks:
        raise ConfigError("no-table", "leaves nothing to evaluate without --tasks or --last-words")
    model = LoadedModel(options.model_options, say)
    policies = _policies(options, model)
    model = model.with_head_of(policies)
    engine_of = partial(judged_engine, cache(model.served_decoder))
    rows = [] if options.no_table else _table(options, model, policies, engine_of)
    accuracies: list[Accuracy] = []
    if has_tasks:
        accuracies = evaluate_tasks(options, model, policies, engine_of)
    _write(options, policies, rows, accuracies)


def _table(
    options: argparse.Namespace, model: LoadedModel, policies: list[LearnedPolicy], engine_of: EngineOf
) -> list[Row]:
    """Prints and returns the rows of policies and controls, and plots the policies' actions if options ask for it."""
    rows: list[Row] = []
    everything = model.sequences()
    needed = options.sequences + _SEARCH_SEQUENCES
    if len(everything) < needed:
        raise ConfigError(
            "data", f"has {len(everything)} sequences; {needed} are needed, {_SEARCH_SEQUENCES} to search on"
        )
    sequences, search = everything[: options.sequences], everything[options.sequences : needed]
    search = search_text(model.config, search)
    # The controls are refitted on all text that they are not judged on.
    refit = _refit_static(options, model, everything[options.sequences :])
    for policy in policies:
        say(f"searching fixed plans to compare {policy.name} with")
        evaluation = Evaluation(model.decoder, policy, sequences, search, options.prompt_tokens, refit)
        engine = None if options.no_serving else engine_of(policy, policy.costs)
        say("each kernel in all layers")
        own = evaluation.uniform()
        for budget in options.budgets:
            say(f"{policy.name} at a budget of {budget:g}, and its controls")
            row, actions = evaluation.learned(budget)
            if engine is not None:
                row = _with_serving(row, evaluation.task, engine, policy, budget, sequences)
            own += [row, *evaluation.controls(budget, row.cost_share, actions)]
            if options.plots is not None:
                options.plots.mkdir(parents=True, exist_ok=True)
                names = [action.name for action in Action]
                path = options.plots / f"actions-{policy.name}-{budget:.2f}.png"
                plot_action_rates(action_rates(actions).tolist(), names, path)
        own = with_dominated(own)
        _print_table(own)
        rows += own
    return rows


def run_calibrate(options: argparse.Namespace) -> None:
    """Calibrates a policy's budgets anew on the given text and writes the result to another file."""
    model = LoadedModel(options.model_options, say)
    (policy,) = _policies(options, model)
    sequences = model.sequences()
    if options.head is not None:
        policy = replace(policy, spec=replace(policy.spec, head=Action[options.head]))
    if options.head == Action.SKIP.name:
        model, head_map = with_narrow_head(model, sequences[options.sequences :], options.prompt_tokens)
        policy = replace(policy, head_map=head_map)
    else:
        model = model.with_head_of([policy])
    if policy.head not in policy.costs.head or policy.head not in model.decoder.heads:
        raise ConfigError("head", f"{policy.head.name} is not in the policy's costs, or has no kernel here")
    task = policy_task(model.decoder, policy, options.prompt_tokens)
    policy = calibrated(policy, task, sequences[: options.sequences], model.rounding.identity, say)
    save_policy(options.out, policy, model.fingerprint)
    print(f"{options.out}: {describe_budgets(policy)}")


def run_inspect(options: argparse.Namespace) -> None:
    """Prints the metadata of the policy files."""
    model = LoadedModel(options.model_options, say, (Action.SKIP, Action.FULL))
    for policy in _policies(options, model):
        layer, budgets = policy.costs.layer, policy.budgets(policy.costs)
        facts = {
            "name": policy.name,
            "actions": [action.name for action in policy.spec.actions],
            "pinned": {str(layer): action.name for layer, action in sorted(policy.pinned.items())},
            "lookahead": policy.lookahead,
            "block_size": policy.block_size,
            "head": policy.head.name,
            "is_drafter": policy.is_drafter,
            "compensation": policy.compensation.kind.value,
            "layer_costs": {action.name: round(cost / layer[Action.FULL], 4) for action, cost in layer.items()},
            "multiply_adds_share": round(multiply_adds_share(policy, model.config), 5),
            "recommended_budget": round(policy.recommended_budget(policy.costs), 4),
            "calibration": [
                {
                    "budget": round(point.cost, 4),
                    "price": round(math.exp(point.log_price), 4),
                    "divergence": round(point.divergence, 4),
                }
                for point in budgets.points
            ],
            "plans": [
                {
                    "name": plan.name,
                    "budget": round(plan.cost(policy.costs), 4),
                    "divergence": round(plan.divergence, 4),
                }
                for plan in usable(policy.plans, policy.costs)
            ],
        }
        print(json.dumps(facts, indent=1))


def _policies(options: argparse.Namespace, model: LoadedModel) -> list[LearnedPolicy]:
    """Returns the policies named in the options, or else the shipped ones; `--actions` filters the latter."""
    files: Sequence[Path] = options.policy or find_policies(SHIPPED_POLICIES, model.fingerprint)
    policies = [
        load_policy(file, model.config, model.fingerprint, dtype=torch.bfloat16, device=model.device) for file in files
    ]
    if options.actions is not None and not options.policy:
        policies = [policy for policy in policies if set(policy.spec.actions) == set(options.actions)]
    for policy in policies:
        if missing := policy.lacks(model.actions):
            names = ", ".join(action.name for action in sorted(missing))
            raise ConfigError("policy", f"{policy.name} needs {names}; dash-policy quantize makes INT3's weights")
    if not policies:
        raise ConfigError("policy", "none is shipped for this model and these actions; name a file with --policy")
    return policies if options.costs is None else [_at_costs(policy, read_costs(options.costs)) for policy in policies]


def _at_costs(policy: LearnedPolicy, costs: CostTable) -> LearnedPolicy:
    """Returns the policy on terms of another cost table."""
    actions, spec = {*policy.spec.actions, *policy.pinned.values()}, policy.spec
    if costs.num_layers != spec.num_layers or not actions <= set(costs.layer) or policy.head not in costs.head:
        raise ConfigError("costs", f"do not fit {policy.name}: other layers, or an action or a head without a cost")
    return replace(policy, spec=replace(spec, costs=costs))


def multiply_adds_share(policy: LearnedPolicy, config: ModelConfig) -> float:
    """Returns the multiply-adds of deciding one layer, as a share of those of a full layer's matrices on average."""
    network = policy.network
    matrices = (network.hidden_weight, network.fact_weight[0], network.inner_weight, network.output_weight[0])
    of_layers = sum(map(config.num_weights_read, range(config.num_layers)))
    return sum(matrix.numel() for matrix in matrices) / policy.block_size * config.num_layers / of_layers


def _refit_static(
    options: argparse.Namespace, model: LoadedModel, sequences: Sequence[Sequence[int]]
) -> RefitStatic | None:
    """Returns a function that trains the compensation of a plan on these sequences; None without
    `--refit-controls`."""
    if not options.refit_controls:
        return None
    decoder = model.dense_decoder()  # one for all plans

    def refit(task: Task, skipped: frozenset[int]) -> Compensation:
        if not skipped:
            return task.compensation
        start = unpacked(task.compensation)
        if not isinstance(start, LowRank):
            raise ConfigError("refit-controls", f"needs a policy with low_rank compensation, not {start.kind.value}")
        plan = [Action.SKIP if layer in skipped else Action.FULL for layer in range(task.decoder.num_layers)]
        spec = PlanSpec.fixed(plan, Action.FULL, task.spec.costs)
        refitted = refit_plan(decoder, spec, start, sequences, options.refit_controls, task.num_prompt_tokens)
        return packed(refitted, model.decoder.dtype)

    return refit


def judged_engine(served: Callable[[], ServedDecoder], policy: LearnedPolicy, costs: CostTable) -> Engine:
    """Returns an engine with this policy, and with fixed plans of the actions that `costs` price. Prompts run at full
    depth."""
    own = served()
    decoder, length = own.decoder, own.decoder.context_length
    actions = tuple(action for action in decoder.actions if action in costs.layer)
    catalog = PolicyCatalog(costs, actions, policy.compensation, [own.prepared(policy)])
    config = EngineConfig(_NUM_SLOTS, _NUM_SLOTS * length, length)
    return assemble_engine(decoder, catalog, config, length)


def _with_serving(
    row: Row, task: Task, engine: Engine, policy: LearnedPolicy, budget: float, sequences: Sequence[list[int]]
) -> Row:
    """Returns the row with an engine's figures at that budget, or unchanged if the policy cannot keep it."""
    budgets = policy.budgets(policy.costs)
    if budget < budgets.lowest:
        return row
    num_tokens = SEQUENCE_LENGTH - task.num_prompt_tokens
    prompts = [ids[: task.num_prompt_tokens] for ids in sequences]
    written = own_text(engine, prompts, budget, policy.name, num_tokens)
    outcome, _ = greedy_outcome(task, policy.network, written, budgets.price(budget))
    served = measure_serving(engine, prompts[0], budget, policy.name, _SPEED_TOKENS)
    return replace(
        row,
        free_running_divergence=outcome.divergence,
        speedup=served.speedup,
        policy_share=served.policy_share,
    )


def _write(
    options: argparse.Namespace, policies: list[LearnedPolicy], rows: list[Row], accuracies: list[Accuracy]
) -> None:
    if options.json is not None:
        table = [row.to_json() for row in rows] + [accuracy.to_json() for accuracy in accuracies]
        write_whole(options.json, f"{json.dumps(table, indent=1)}\n".encode())
    if options.plots is None:
        return
    names = {policy.name for policy in policies}
    points = [ParetoPoint(_line_of(row), row.cost_share, row.divergence, row.name in names) for row in rows]
    plot_pareto(points, options.plots / "pareto.png", "Divergence against cost")
    if accuracies:
        points = [ParetoPoint(own.name, own.cost_share, own.accuracy.mean, own.name in names) for own in accuracies]
        plot_pareto(points, options.plots / "accuracy.png", "Accuracy against cost", "accuracy", log=False)


def _line_of(row: Row) -> str:
    """Returns the line of the plot that a row belongs to: mixed plans, each of one cost, make one together."""
    name, comma, rest = row.name.partition(",")
    return f"best mixed plan{comma}{rest}" if name.startswith("plan-") else row.name


def _print_table(rows: list[Row]) -> None:
    print(
        f"{'':1} {'name':32} {'budget':>6} {'cost':>6} {'divergence':>10} {'agreement':>9} {'tokens':>6} "
        f"{'own text':>8} {'speedup':>7} {'policy':>6}"
    )
    for row in rows:
        served = ""
        if row.free_running_divergence is not None:
            served = f"{row.free_running_divergence:8.4f} {row.speedup:7.2f} {row.policy_share:6.1%}"
        print(
            f"{'×' if row.dominated else ' '} {row.name:32} {row.budget:6.3f} {row.cost_share:6.3f} "
            f"{row.divergence:10.4f} {row.agreement:9.3f} {row.tokens:6} {served}"
        )
    print("×: dominated; a fixed plan of this table costs no more and diverges no more", flush=True)
