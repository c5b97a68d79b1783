"""The `dash-policy` command: trains, evaluates and describes policies.

Exit codes: 0 done, 2 something that the user can mend, 130 interrupted (training goes on from its last checkpoint).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import (
    check_weights,
    default_cache_folder,
    load_model_config,
    open_weights,
    resolve_checkpoint,
    tokenizer_file,
)
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.measure import measure_costs
from dash_runtime.decoder.quantization import supported_actions
from dash_runtime.engine.build import find_device, matrix_shapes
from dash_runtime.errors import ConfigError, DashRuntimeError
from dash_runtime.evaluation.controls import Row, evaluate
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy import edges
from dash_runtime.policy.policy_file import load_policy, model_fingerprint, save_policy
from dash_runtime.training.data import default_token_sequences, file_token_sequences
from dash_runtime.training.linear_compensation import fit_low_rank
from dash_runtime.training.ppo import Outcome, Task
from dash_runtime.training.rollout import full_path
from dash_runtime.training.train import TrainSettings, calibrate, train

SEQUENCE_LENGTH = 128
_MAX_SEQUENCES = 1200
_FIT_SEQUENCES = 32
_CALIBRATION_SEQUENCES = 8
_SEARCH_SEQUENCES = 2


class _Model:
    """A checkpoint opened for training or evaluation."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder = resolve_checkpoint(options.model, options.revision, options.cache_folder, print)
        self.config = load_model_config(self.folder)
        self.weights = open_weights(self.folder)
        check_weights(self.weights, self.config)
        device = find_device(options.device)
        actions = supported_actions(device, torch.bfloat16, matrix_shapes(self.config))
        self.decoder = Decoder(
            self.config, self.weights, actions, dtype=torch.bfloat16, device=device, context_length=SEQUENCE_LENGTH * 4
        )
        self.fingerprint = model_fingerprint(self.config, self.weights)

    def sequences(self, data: Path | None) -> list[list[int]]:
        if data is None:
            return default_token_sequences(tokenizer_file(self.folder), _MAX_SEQUENCES, SEQUENCE_LENGTH)
        return file_token_sequences(data, tokenizer_file(self.folder), SEQUENCE_LENGTH)[:_MAX_SEQUENCES]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except DashRuntimeError as error:
        print(f"dash-policy: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dash-policy: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _train(options: argparse.Namespace) -> None:
    model = _Model(options)
    actions = _actions(options.actions, model.decoder)
    sequences = model.sequences(options.data)
    held_out, training = sequences[:_CALIBRATION_SEQUENCES], sequences[_CALIBRATION_SEQUENCES:]
    if not training:
        raise ConfigError("data", f"has {len(sequences)} sequences; more than {_CALIBRATION_SEQUENCES} are needed")
    options.out.mkdir(parents=True, exist_ok=True)
    pinned = edges(model.config.num_layers)
    print(f"fitting compensation of rank {options.rank} on {min(len(training), _FIT_SEQUENCES)} sequences")
    paths = [full_path(model.decoder, [ids]) for ids in training[:_FIT_SEQUENCES]]
    compensation = fit_low_rank(
        model.decoder, [(path, torch.arange(1, SEQUENCE_LENGTH)) for path in paths], options.rank
    )
    costs = measure_costs(model.decoder, compensation)
    print(
        "costs over a full layer: "
        + ", ".join(f"{a.name} {c / costs.layer[Action.FULL]:.3f}" for a, c in costs.layer.items())
    )
    task = Task(model.decoder, actions, pinned, 1, Action.FULL, compensation, costs, options.prompt_tokens)
    settings = TrainSettings(iterations=options.iterations, seed=options.seed)
    log = options.out / "training.jsonl"
    started = time.monotonic()

    def progress(iteration: int, price: float, outcome: Outcome) -> None:
        row = {
            "iteration": iteration,
            "price": price,
            "cost": outcome.cost,
            "divergence": outcome.divergence,
            "agreement": outcome.agreement,
        }
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if iteration % 10 == 0:
            seconds = time.monotonic() - started
            print(
                f"{iteration:5} of {settings.iterations}  λ {price:5.2f}  cost {outcome.cost:.3f}  "
                f"divergence {outcome.divergence:.3f}  {seconds:.0f} s",
                flush=True,
            )

    network = train(task, training, settings, options.out / "checkpoint.safetensors", progress)
    calibration = calibrate(task, network, held_out)
    policy = LearnedPolicy(options.name, network, actions, pinned, 1, Action.FULL, compensation, costs, calibration)
    path = options.out / "policy.safetensors"
    save_policy(path, policy, model.fingerprint)
    print(f"{path}: budgets {calibration.lowest_budget:.3f} to {calibration.points[-1][0]:.3f}")


def _evaluate(options: argparse.Namespace) -> None:
    model = _Model(options)
    policy = load_policy(
        options.policy, model.config, model.fingerprint, dtype=torch.bfloat16, device=model.decoder.device
    )
    sequences = model.sequences(options.data)[: options.sequences]
    budgets = [float(text) for text in options.budgets.split(",")]
    search = default_token_sequences(tokenizer_file(model.folder), _SEARCH_SEQUENCES, SEQUENCE_LENGTH)
    rows = evaluate(model.decoder, policy, sequences, search, budgets, options.prompt_tokens)
    print(f"{'name':22} {'budget':>6} {'cost':>6} {'divergence':>10} {'agreement':>9} {'tokens':>7}")
    for row in rows:
        print(
            f"{row.name:22} {row.budget:6.2f} {row.cost_share:6.3f} {row.divergence:10.4f} "
            f"{row.agreement:9.3f} {row.tokens:7}"
        )
    if options.json is not None:
        options.json.write_text(json.dumps([Row.to_json(row) for row in rows], indent=1) + "\n")


def _inspect(options: argparse.Namespace) -> None:
    model = _Model(options)
    policy = load_policy(
        options.policy, model.config, model.fingerprint, dtype=torch.bfloat16, device=model.decoder.device
    )
    facts = {
        "name": policy.name,
        "actions": [action.name for action in policy.actions],
        "pinned": sorted(policy.pinned),
        "lookahead": policy.lookahead,
        "head": policy.head.name,
        "compensation": policy.compensation.kind.value,
        "layer_costs": {a.name: round(c / policy.costs.layer[Action.FULL], 4) for a, c in policy.costs.layer.items()},
        "calibration": [[round(budget, 4), round(log_price, 4)] for budget, log_price in policy.calibration.points],
    }
    print(json.dumps(facts, indent=1))


def _actions(text: str, decoder: Decoder) -> tuple[Action, ...]:
    try:
        actions = tuple(sorted(Action[name.strip().upper()] for name in text.split(",")))
    except KeyError as error:
        raise ConfigError("actions", f"{error.args[0]!r} is not one of {', '.join(a.name for a in Action)}") from None
    if Action.FULL not in actions or not set(actions) <= set(decoder.actions):
        raise ConfigError("actions", f"must hold FULL and be among {', '.join(a.name for a in decoder.actions)}")
    return actions


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dash-policy", description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", default="embedded", help="embedded, a folder, a GGUF file or a hub id")
    common.add_argument("--revision", help="of a hub model")
    common.add_argument("--device", default="auto")
    common.add_argument("--cache-folder", type=Path, default=default_cache_folder(os.environ))
    common.add_argument(
        "--data", type=Path, help=".txt or .jsonl file, or a folder of them; default: Python's own help"
    )
    common.add_argument("--prompt-tokens", type=int, default=16, help="tokens of each sequence that run in full")
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", parents=[common], help="train a policy, or go on with a stopped run")
    training.add_argument("--out", type=Path, required=True, help="folder for checkpoint, curve and policy")
    training.add_argument("--name", default="learned")
    training.add_argument("--actions", default="skip,int4,int8,full")
    training.add_argument("--iterations", type=int, default=240)
    training.add_argument("--rank", type=int, default=32, help="of the compensation")
    training.add_argument("--seed", type=int, default=0)
    training.set_defaults(run=_train)
    evaluation = commands.add_parser("evaluate", parents=[common], help="compare a policy with its controls")
    evaluation.add_argument("--policy", type=Path, required=True)
    evaluation.add_argument("--budgets", default="0.9,0.8,0.7")
    evaluation.add_argument("--sequences", type=int, default=24)
    evaluation.add_argument("--json", type=Path, help="write the rows there")
    evaluation.set_defaults(run=_evaluate)
    inspection = commands.add_parser("inspect", parents=[common], help="show what a policy file holds")
    inspection.add_argument("--policy", type=Path, required=True)
    inspection.set_defaults(run=_inspect)
    return parser


if __name__ == "__main__":
    sys.exit(main())
