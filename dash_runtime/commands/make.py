"""`dash-policy make`: rounded weights, a policy, a judgement and a card for a model, with the best settings that are
known.

Each step is a command of its own. What a step has made is not made again, so that the same command goes on after a
stop. Knows options and files; knows no learning.
"""

import argparse
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dash_runtime.actions import Action
from dash_runtime.commands.spoken import say
from dash_runtime.errors import ConfigError
from dash_runtime.linears.grouped_matrix import is_packable
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy_file import load_policy
from dash_runtime.training.curve import write_whole
from dash_runtime.training.loaded_model import LoadedModel

_SHARES = (0.95, 0.9, 0.8, 0.7)
"""Budgets that are judged, as shares of what INT4 everywhere costs with its own head."""
_TAIL = "0.2"
"""In nats. A policy that was trained without it, and without code in its text, spoiled half of the programs that full
depth solves (docs/policies.md)."""
Run = Callable[[Sequence[str]], None]
"""Runs another command of `dash-policy` by its arguments."""


def run_make(options: argparse.Namespace, run: Run) -> None:
    """Makes what is missing in the folder that the options name, and writes the card."""
    model = LoadedModel(options.model_options, say, (Action.SKIP, Action.FULL))
    if options.held_out is not None and options.data is None:
        raise ConfigError("data", "is needed beside held-out text")
    common = ["--model", options.model, "--device", options.device, "--cache-folder", str(options.cache_folder)]
    if options.revision is not None:
        common += ["--revision", options.revision]
    learning = common if options.data is None else [*common, "--data", str(options.data)]
    judging = learning if options.held_out is None else [*common, "--data", str(options.held_out)]
    out: Path = options.out
    policy_file, rows_file = out / "policy.safetensors", out / "quality.json"

    if Action.INT3 in model.rounding:
        print("step 1 of 4: weights are rounded already")
    else:
        print("step 1 of 4: rounding weights", flush=True)
        run(["quantize", *learning])
    if policy_file.exists():
        print(f"step 2 of 4: {policy_file} is there already")
    else:
        print("step 2 of 4: training a policy", flush=True)
        has_narrow = is_packable(model.config.vocab_size, model.config.hidden_size)
        head = Action.SKIP if has_narrow else Action.INT8
        chosen = ["--pinned-action", "int4", "--head", head.name, "--tail", _TAIL]
        chosen += ["--rounds", str(options.rounds), "--batches", str(options.batches)]
        run(["train", *learning, "--out", str(out), "--name", options.name, *chosen])
    policy = load_policy(policy_file, model.config, model.fingerprint, dtype=torch.bfloat16, device=model.device)
    if rows_file.exists():
        print(f"step 3 of 4: {rows_file} is there already")
    else:
        print("step 3 of 4: judging it", flush=True)
        # On a tiny model or a busy machine INT4 may cost more than full depth.
        shares = dict.fromkeys(min(1.0, share * _int4_cost(policy)) for share in _SHARES)
        budgets = ",".join(f"{budget:.4f}" for budget in shares)
        judged = ["--policy", str(policy_file), "--budgets", budgets, "--no-serving", "--json", str(rows_file)]
        run(["evaluate", *judging, *judged])
    card = out / "README.md"
    write_whole(card, _card(options, policy, json.loads(rows_file.read_text())).encode())
    print(f"step 4 of 4: {card}\nserve it: DASH_MODEL={shlex.quote(options.model)} DASH_POLICY_FILE={policy_file}")


def _int4_cost(policy: LearnedPolicy) -> float:
    costs = policy.costs
    return costs.token_cost((Action.INT4,) * costs.num_layers, Action.INT4)


def _card(options: argparse.Namespace, policy: LearnedPolicy, rows: Sequence[dict[str, object]]) -> str:
    whole, layer = _int4_cost(policy), policy.costs.layer
    text = "text that it was calibrated on"
    if options.held_out is not None:
        text = f"`{options.held_out}`, from which nothing was learned"
    lines = [
        f"# {policy.name}",
        "",
        f"A policy for {options.model}: {', '.join(action.name for action in policy.spec.actions)}, "
        f"{len(policy.spec.free_layers)} of {policy.spec.num_layers} layers decided, the head in {policy.head.name}.",
        f"Judged on {text}. Costs are shares of INT4 in all layers with its own head; divergence is in nats a token "
        "from full depth. Evaluations of the policy are counted.",
        "",
        "| | cost | divergence |",
        "| --- | --- | --- |",
    ]
    table: list[str] = []
    for row in rows:
        cost, divergence = float(str(row["cost_share"])) / whole, float(str(row["divergence"]))
        mark = " (dominated by a fixed plan)" if row["dominated"] and row["kind"] == "policy" else ""
        table.append(f"| {row['name']}{mark} | {cost:.3f} | {divergence:.4f} |")
    lines += dict.fromkeys(table)  # a policy may reach no more than one of several budgets
    costs = ", ".join(f"{action.name} {cost / layer[Action.INT4]:.2f}" for action, cost in layer.items())
    lines += ["", f"What a layer costs on the machine that made it, INT4 = 1: {costs}.", ""]
    return "\n".join(lines)
