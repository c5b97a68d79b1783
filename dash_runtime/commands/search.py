"""`dash-policy search`: the frontier of fixed plans of a model on this device.

Knows options, files and tables; the search is in startup/.
"""

import argparse
import json

import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import tokenizer_file
from dash_runtime.commands.cost_files import read_costs
from dash_runtime.commands.spoken import say
from dash_runtime.errors import ConfigError
from dash_runtime.layers.compensation import Compensation, LowRank, packed
from dash_runtime.policy.fixed_plans import not_dominated
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy_file import load_compensation_of
from dash_runtime.rollout.task import Task
from dash_runtime.startup.default_text import default_token_sequences
from dash_runtime.startup.fit_compensation import NUM_SEQUENCES, fit_compensation
from dash_runtime.startup.plan_search import search_plans
from dash_runtime.training.curve import write_whole
from dash_runtime.training.loaded_model import SEQUENCE_LENGTH, LoadedModel


def run_search(options: argparse.Namespace) -> None:
    """Prints the best fixed plans by cost; writes them as JSON if the options ask for it."""
    model = LoadedModel(options.model_options, say)
    decoder, sequences = model.decoder, _sequences(options, model)
    heads = None if options.head is None else [Action[options.head]]
    if heads is not None and not set(heads) <= set(decoder.heads):
        raise ConfigError("head", f"{options.head} has no kernel here")
    if options.compensation is None:
        # Text that the plans are not searched on, if there is enough.
        compensation: Compensation = fit_compensation(decoder, sequences[-NUM_SEQUENCES:]).affine
    else:
        compensation = load_compensation_of(
            options.compensation, model.config, model.fingerprint, dtype=torch.bfloat16, device=model.device
        )
        if isinstance(compensation, LowRank):
            compensation = packed(compensation, decoder.dtype)
    costs = model.measured_costs(compensation) if options.costs is None else read_costs(options.costs)
    if costs.num_layers != decoder.num_layers or not set(decoder.actions) <= set(costs.layer):
        raise ConfigError("costs", f"{options.costs} is of another model or another device")
    spec = PlanSpec.fixed((Action.FULL,) * decoder.num_layers, Action.FULL, costs)
    task = Task(decoder, spec, compensation, options.prompt_tokens)
    say(f"searching fixed plans on {min(options.sequences, len(sequences))} sequences")
    plans = search_plans(task, sequences[: options.sequences], heads)
    best = not_dominated(plans, costs)
    print(f"  {'name':24} {'cost':>6} {'divergence':>10}  {'head':4}  layers")
    for plan in plans:
        mark = " " if plan in best else "×"
        figures = f"{plan.cost(costs):6.3f} {plan.divergence:10.4f}"
        print(f"{mark} {plan.name:24} {figures}  {plan.head.name:4}  {plan.letters}")
    print(
        "×: dominated; another plan costs no more and diverges no more. Layers: . SKIP, 3 INT3, 4 INT4, 8 INT8, F FULL"
    )
    if options.json is not None:
        rows = [plan.to_json() | {"cost_share": plan.cost(costs), "dominated": plan not in best} for plan in plans]
        write_whole(options.json, f"{json.dumps({'costs': costs.to_json(), 'plans': rows}, indent=1)}\n".encode())


def _sequences(options: argparse.Namespace, model: LoadedModel) -> list[list[int]]:
    """Returns the text to search on, and behind it some to fit compensation on.

    Without `--data` it is Python's help, as at a server's first start.
    """
    if options.data is not None:
        return model.sequences()
    count = options.sequences + NUM_SEQUENCES
    return default_token_sequences(tokenizer_file(model.folder), count, min(SEQUENCE_LENGTH, model.context_length))
