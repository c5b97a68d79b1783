"""`python -m benchmarks.served_divergence`: divergence from full depth of what is served, on given text.

Sequences of 128 tokens, of which the first 16 are the prompt, are read token by token in the engine, as it serves:
in INT8, in INT4, and by a policy at some budgets. Prints the mean over tokens of KL(full depth ‖ this) in nats, and the
cost that the answers report. Beside it stands the same path's rollout (`rollout/`), at the same price of compute: the
price that buys a budget depends on what each action costs on a machine, so rows of tables that were made with other
costs are not comparable at equal budgets.
"""

import argparse
import os
from pathlib import Path

import numpy

from benchmarks.divergence import divergence, read_answer
from benchmarks.rounds import progress
from benchmarks.setting import FULL_DEPTH, INT4, INT8, PLAIN
from dash_runtime.actions import Action
from dash_runtime.checkpoints import EMBEDDED, default_cache_folder, resolve_checkpoint
from dash_runtime.config import Mode, SkipOptions
from dash_runtime.decoder.full_path import full_outputs
from dash_runtime.events import DepthStatistics
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy import FixedPlan
from dash_runtime.rollout.task import Task, greedy_outcome, path_outcome
from dash_runtime.startup.build import BuildOptions, build_engine
from dash_runtime.training.loaded_model import LoadedModel, ModelOptions

_PROMPT = 16


class Rollouts:
    """The model as rollouts run it, beside the engine that serves it."""

    def __init__(self, loaded: LoadedModel, catalog: PolicyCatalog, sequences: list[list[int]]) -> None:
        self._decoder = loaded.with_head_of(list(catalog._learned.values())).decoder
        self._catalog, self._sequences = catalog, sequences
        self._full = full_outputs(self._decoder, sequences)

    def told(self, skip: SkipOptions) -> str:
        """Returns the divergence and the skips a token of what these options are assigned."""
        assignment = self._catalog.assign(skip)
        policy = assignment.policy
        if isinstance(policy, LearnedPolicy):
            task = Task(self._decoder, policy.spec, policy.compensation, _PROMPT)
            outcome, actions = greedy_outcome(task, policy.network, self._sequences, assignment.price, self._full)
        else:
            assert isinstance(policy, FixedPlan)
            spec = PlanSpec.fixed(policy.plan, policy.head, assignment.costs)
            task = Task(self._decoder, spec, policy.compensation, _PROMPT)
            outcome, actions = path_outcome(task, self._sequences, full=self._full)
        skips = float((actions == int(Action.SKIP)).sum(dim=0).float().mean())
        return f"rollout {outcome.divergence:.4f} nats, {skips:4.1f} skips"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.served_divergence", description=__doc__)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--data", type=Path, required=True, help="HELD_OUT of `python -m benchmarks.quality_text`")
    parser.add_argument("--policy", help="its name; default: the shipped default")
    parser.add_argument("--policy-file", type=Path, help="a policy to serve; default: the shipped one")
    parser.add_argument("--budgets", default="", help="as shares of full depth's cost, like 0.36,0.34")
    parser.add_argument("--shares", default="", help="budgets as shares of the cost of INT4 everywhere, like 0.95,0.9")
    parser.add_argument("--sequences", type=int, default=24)
    options = parser.parse_args()
    cache_folder = default_cache_folder(os.environ)
    folder = resolve_checkpoint(options.model, None, cache_folder, progress)
    build = BuildOptions(["cpu"], policy_file=options.policy_file)
    engine = build_engine(folder, cache_folder, build, PLAIN, progress)
    assert isinstance(engine._catalog, PolicyCatalog)
    loaded = LoadedModel(ModelOptions(options.model, None, "cpu", cache_folder, options.data), progress)
    sequences = loaded.sequences(options.sequences)
    rollouts = Rollouts(loaded, engine._catalog, sequences)
    texts = [(own[:_PROMPT], own[_PROMPT:]) for own in sequences]
    references = [read_answer(engine, FULL_DEPTH, *text) for text in texts]

    def measure(name: str, skip: SkipOptions) -> float:
        depths: list[DepthStatistics] = []
        values = [
            divergence(exact, own)
            for text, reference in zip(texts, references, strict=True)
            for exact, own in list(zip(reference, read_answer(engine, skip, *text, depths=depths), strict=True))[1:]
        ]  # without the first token, which the prompt makes
        error, cost = numpy.std(values) / numpy.sqrt(len(values)), float(numpy.mean([own.mean_cost for own in depths]))
        skips = sum(own.action_counts[Action.SKIP] for own in depths) / sum(own.num_decode_tokens for own in depths)
        told = f"cost {cost:.3f}, {skips:4.1f} skips a token"
        told += f", {numpy.mean(values):.4f} nats (standard error {error:.4f})"
        progress(f"{name:18} {told}; {rollouts.told(skip)}")
        return cost

    measure("INT8", INT8)
    int4_cost = measure("INT4", INT4)
    budgets = {f"policy at {own}": float(own) for own in filter(None, options.budgets.split(","))}
    budgets |= {f"at {own} of INT4": float(own) * int4_cost for own in filter(None, options.shares.split(","))}
    for name, budget in budgets.items():
        measure(name, SkipOptions(Mode.ADAPTIVE, budget, options.policy))


if __name__ == "__main__":
    main()
