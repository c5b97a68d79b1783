"""`dash-policy quantize`: INT4 and INT3 weights, rounded by the inputs that they get.

Knows options and files; the rounding is in training/.
"""

import argparse

from dash_runtime.actions import Action
from dash_runtime.commands.spoken import say
from dash_runtime.errors import ConfigError
from dash_runtime.linears.rounding_file import save_rounding
from dash_runtime.training.loaded_model import LoadedModel
from dash_runtime.training.quantize import is_changed_by_int4, quantize

HELD_OUT_SEQUENCES = 24


def run_quantize(options: argparse.Namespace) -> None:
    """Rounds the weights of each action, prints what that wins on other text, and keeps what wins for later starts."""
    model = LoadedModel(options.model_options, say, (Action.FULL,))
    if not set(options.actions) <= set(model.supported):
        raise ConfigError("model", f"{options.model} has matrices of a size that {model.device} has no kernels for")
    actions = [own for own in options.actions if own is not Action.INT4 or is_changed_by_int4(model)]
    if actions != options.actions:
        print("INT4 hardly changes these weights, as those of a file of four bits: not rounded")
    if not actions:
        return
    sequences = model.sequences(options.sequences + HELD_OUT_SEQUENCES)
    if len(sequences) <= HELD_OUT_SEQUENCES:
        raise ConfigError("data", f"must have more than {HELD_OUT_SEQUENCES} sequences, which judge the rounding")
    text, held_out = sequences[HELD_OUT_SEQUENCES:], sequences[:HELD_OUT_SEQUENCES]
    print(f"rounding by {len(text)} sequences; {HELD_OUT_SEQUENCES} others judge it")
    kept = {action: own for action, own in model.rounding.items() if action not in actions}
    for action, own in quantize(model, actions, text, held_out, print).items():
        wins = own.divergence < own.nearest_divergence
        figures = f"{own.divergence:.4f} nats from full depth instead of {own.nearest_divergence:.4f}"
        print(f"{action.name} everywhere is {figures}{'' if wins else ': not kept'}")
        if wins:
            kept[action] = own.matrices
    if kept.keys() & set(actions):
        save_rounding(model.rounding_file, kept, model.fingerprint)
        print(f"kept in {model.rounding_file}, for later starts and commands")
