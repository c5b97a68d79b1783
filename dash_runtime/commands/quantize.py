"""`dash-policy quantize`: INT4 weights for a model whose file has more bits, rounded by the inputs that they get.

Knows options and files; the rounding is in training/.
"""

import argparse

from dash_runtime.actions import Action
from dash_runtime.commands.spoken import say
from dash_runtime.errors import ConfigError
from dash_runtime.linears.int4_file import save_int4
from dash_runtime.training.loaded_model import LoadedModel
from dash_runtime.training.quantize import is_changed_by_int4, quantize

HELD_OUT_SEQUENCES = 24


def run_quantize(options: argparse.Namespace) -> None:
    """Rounds the INT4 weights, prints what that wins on other text, and keeps them for later starts if it wins."""
    model = LoadedModel(options.model_options, say, (Action.FULL,))
    if Action.INT4 not in model.supported:
        raise ConfigError("model", f"{options.model} has matrices of a size for which {model.device} has no INT4")
    if not is_changed_by_int4(model):
        print("nothing to round: INT4 hardly changes these weights, as those of a file of four bits")
        return
    sequences = model.sequences(options.sequences + HELD_OUT_SEQUENCES)
    if len(sequences) <= HELD_OUT_SEQUENCES:
        raise ConfigError("data", f"must have more than {HELD_OUT_SEQUENCES} sequences, which judge the rounding")
    text, held_out = sequences[HELD_OUT_SEQUENCES:], sequences[:HELD_OUT_SEQUENCES]
    print(f"rounding by {len(text)} sequences; {HELD_OUT_SEQUENCES} others judge it")
    quantized = quantize(model, text, held_out, print)
    figures = f"{quantized.divergence:.4f} nats from full depth instead of {quantized.nearest_divergence:.4f}"
    if quantized.divergence >= quantized.nearest_divergence:
        print(f"INT4 everywhere is {figures}: not kept")
        return
    save_int4(model.int4_file, quantized.matrices, model.fingerprint)
    print(f"INT4 everywhere is {figures}: kept in {model.int4_file}, for later starts and commands")
