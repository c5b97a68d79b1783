"""`python -m benchmarks.served_divergence`: divergence from full depth of what is served, on given text.

Sequences of 128 tokens, of which the first 16 are the prompt, are read token by token in the engine, as it serves:
in INT8, in INT4, and by a policy at some budgets. Prints the mean over tokens of KL(full depth ‖ this) in nats, and the
cost that the answers report.
"""

import argparse
import os
from pathlib import Path

import numpy

from benchmarks.divergence import divergence, read_answer
from benchmarks.rounds import progress
from benchmarks.setting import FULL_DEPTH, INT4, INT8, PLAIN
from dash_runtime.actions import Action
from dash_runtime.checkpoints import EMBEDDED, default_cache_folder, resolve_checkpoint, tokenizer_file
from dash_runtime.checkpoints.chat_template import ChatTemplate
from dash_runtime.config import Mode, SkipOptions
from dash_runtime.events import DepthStatistics
from dash_runtime.startup.build import BuildOptions, build_engine
from dash_runtime.training.data import file_token_sequences

_LENGTH, _PROMPT = 128, 16


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.served_divergence", description=__doc__)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--data", type=Path, required=True, help="HELD_OUT of `python -m benchmarks.quality_text`")
    parser.add_argument("--policy", help="its name; default: the shipped default")
    parser.add_argument("--budgets", default="", help="as shares of full depth's cost, like 0.36,0.34")
    parser.add_argument("--shares", default="", help="budgets as shares of the cost of INT4 everywhere, like 0.95,0.9")
    parser.add_argument("--sequences", type=int, default=24)
    options = parser.parse_args()
    cache_folder = default_cache_folder(os.environ)
    folder = resolve_checkpoint(options.model, None, cache_folder, progress)
    engine = build_engine(folder, cache_folder, BuildOptions(["cpu"]), PLAIN, progress)
    sequences = file_token_sequences(options.data, tokenizer_file(folder), _LENGTH, ChatTemplate.load(folder))
    texts = [(own[:_PROMPT], own[_PROMPT:]) for own in sequences[: options.sequences]]
    references = [read_answer(engine, FULL_DEPTH, *text) for text in texts]

    def measure(name: str, skip: SkipOptions) -> float:
        depths: list[DepthStatistics] = []
        values = [
            divergence(exact, own)
            for text, reference in zip(texts, references, strict=True)
            for exact, own in zip(reference, read_answer(engine, skip, *text, depths=depths), strict=True)
        ]
        error, cost = numpy.std(values) / numpy.sqrt(len(values)), float(numpy.mean([own.mean_cost for own in depths]))
        skips = sum(own.action_counts[Action.SKIP] for own in depths) / sum(own.num_decode_tokens for own in depths)
        told = f"cost {cost:.3f}, {skips:4.1f} skips a token"
        progress(f"{name:18} {told}, {numpy.mean(values):.4f} nats (standard error {error:.4f})")
        return cost

    measure("INT8", INT8)
    int4_cost = measure("INT4", INT4)
    budgets = {f"policy at {own}": float(own) for own in filter(None, options.budgets.split(","))}
    budgets |= {f"at {own} of INT4": float(own) * int4_cost for own in filter(None, options.shares.split(","))}
    for name, budget in budgets.items():
        measure(name, SkipOptions(Mode.ADAPTIVE, budget, options.policy))


if __name__ == "__main__":
    main()
