"""`dash-policy fit` and `dash-policy train`: from options to files in a folder.

Knows options, files and the display; knows no learning, which is in training/.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dash_runtime.actions import Action, CostTable
from dash_runtime.commands.cost_files import read_costs
from dash_runtime.commands.spoken import say
from dash_runtime.errors import ConfigError
from dash_runtime.evaluation.plots import has_matplotlib, plot_curve
from dash_runtime.layers.compensation import Compensation, CompensationKind, Identity, LowRank, packed, unpacked
from dash_runtime.policy.budgets import BudgetCalibration, PricePoint
from dash_runtime.policy.compensation_file import save_compensation
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.network import PolicyNetwork
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy_file import load_compensation_of, save_policy
from dash_runtime.rollout.task import Task
from dash_runtime.startup.process_memory import keep_few_kernels, keep_freed_memory
from dash_runtime.training.calibrate import calibrated, describe_budgets
from dash_runtime.training.checkpoint import num_rounds_done
from dash_runtime.training.curve import CurveRow, TrainingCurve, write_curve_json, write_whole
from dash_runtime.training.damage_model import DamageModel, FitSettings
from dash_runtime.training.head_map import with_narrow_head
from dash_runtime.training.ladder import climb, fit_linear
from dash_runtime.training.loaded_model import LoadedModel
from dash_runtime.training.progress_display import ProgressDisplay
from dash_runtime.training.prune import pin_settled_layers
from dash_runtime.training.train import Reached, Trained, Trainer, TrainSettings

CALIBRATION_SEQUENCES = 24
FIT_SEQUENCES = 128
_TAIL_SCALE = 0.4
"""Nats of the damages that skips at usual prices are made of, for the most part."""


def run_fit(options: argparse.Namespace) -> None:
    """Prints the ladder of compensations. Writes the table and the last low-rank one to a folder."""
    model = LoadedModel(options.model_options, say, (Action.SKIP, Action.FULL))
    held_out, fitting = _split(model.sequences())
    options.out.mkdir(parents=True, exist_ok=True)
    task = _task(model, (Action.SKIP, Action.FULL), options)
    ladder = climb(task, fitting[:FIT_SEQUENCES], held_out, options.ranks, print)
    rungs, compensations = zip(*ladder, strict=True)
    low_rank = [own for own in compensations if own.kind is CompensationKind.LOW_RANK]
    save_compensation(options.out / "compensation.safetensors", low_rank[-1], model.fingerprint)
    print(f"{'compensation':24} {'cost':>6} {'divergence':>10} {'kilobytes':>9}")
    for rung in rungs:
        print(f"{rung.name:24} {rung.cost:6.3f} {rung.divergence:10.4f} {rung.kilobytes:9.0f}")
    table = json.dumps([rung.to_json() for rung in rungs], indent=1)
    write_whole(options.out / "ladder.json", f"{table}\n".encode())


def run_train(options: argparse.Namespace) -> None:
    """Trains a policy in a folder, or resumes a run that was stopped there."""
    keep_freed_memory()
    keep_few_kernels()
    head, pinned_action = Action[options.head], Action[options.pinned_action.upper()]
    model = LoadedModel(options.model_options, say)
    actions = model.actions if options.actions is None else options.actions
    if not {*actions, head, pinned_action} <= set(model.actions):
        raise ConfigError("actions", f"must be among {', '.join(action.name for action in model.actions)}")
    held_out, training = _split(model.sequences())
    head_map = None
    if head is Action.SKIP:
        model, head_map = with_narrow_head(model, training, options.prompt_tokens)
    options.out.mkdir(parents=True, exist_ok=True)
    task = _task(model, actions, options)
    task = replace(task, spec=replace(task.spec, head=head, pinned=dict.fromkeys(task.spec.pinned, pinned_action)))
    print(
        f"{len(training)} sequences to train on, {len(held_out)} to calibrate on; compensation of rank {options.rank}"
    )
    if options.compensation is not None:
        start = load_compensation_of(
            options.compensation, model.config, model.fingerprint, dtype=torch.bfloat16, device=model.device
        )
        start = unpacked(start)
        if not isinstance(start, LowRank):
            raise ConfigError("compensation", f"{options.compensation} is {start.kind.value}; training needs low_rank")
    else:
        start = fit_linear(task, training[:FIT_SEQUENCES]).low_rank(options.rank)
    if options.costs is None:
        costs = _kept_costs(options.out / "costs.json", model, task, packed(start, model.decoder.dtype))
    else:
        costs = read_costs(options.costs)
    for what, action, table in (("pinned-action", pinned_action, costs.layer), ("head", head, costs.head)):
        if action not in table:
            raise ConfigError(what, f"{action.name} has no cost on this device")
    relative = {action.name: cost / costs.layer[Action.FULL] for action, cost in costs.layer.items()}
    print("costs over a full layer: " + ", ".join(f"{name} {cost:.3f}" for name, cost in relative.items()))
    spec = replace(task.spec, costs=costs)
    trained = _train(spec, start, model, training, held_out, options)
    spec, network = pin_settled_layers(spec, trained.network, trained.rates)
    print(f"deciding {len(spec.free_layers)} layers; in the others an evaluation would cost more than it saves")
    task = replace(task, spec=spec, compensation=packed(trained.compensation, model.decoder.dtype))
    path = options.out / "policy.safetensors"
    print("calibrating, and searching the best fixed plans on the same text")
    policy = _policy(task, network, options.name, options.drafter)
    policy = calibrated(replace(policy, head_map=head_map), task, held_out, model.rounding.identity, say)
    print(describe_budgets(policy))
    save_policy(path, policy, model.fingerprint)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def _train(
    spec: PlanSpec,
    start: LowRank,
    model: LoadedModel,
    training: list[list[int]],
    held_out: list[list[int]],
    options: argparse.Namespace,
) -> Trained:
    settings = TrainSettings(
        rounds=options.rounds,
        batches=options.batches,
        num_prompt_tokens=options.prompt_tokens,
        price_range=_price_range(spec, options.tail),
        seed=options.seed,
        fit=FitSettings(tail=options.tail),
    )
    checkpoint = options.out / "checkpoint.safetensors"
    done = num_rounds_done(checkpoint)
    curve = TrainingCurve(options.out / "training.jsonl", done)
    with ProgressDisplay(settings.rounds * settings.batches, done * settings.batches) as display:
        progress = _Progress(display, curve)
        decoder = model.dense_decoder(spec.actions)
        trained = Trainer(spec, decoder, training, held_out, start, settings, progress).run(checkpoint)
    write_curve_json(curve.rows(), options.out / "curve.json")
    if has_matplotlib():
        plot_curve(curve.rows(), options.out / "curve.png")
    return trained


def _price_range(spec: PlanSpec, tail: float) -> tuple[float, float]:
    """Returns the prices to train at: those by which the usual range is as dear, where skipping saves less, or harms
    more than its damage."""
    low, high = TrainSettings().price_range
    layer = spec.costs.layer
    saved = layer[spec.kv_action] - layer[Action.SKIP] if Action.SKIP in spec.actions else 0.0
    scale = max(1.0, (layer[Action.FULL] - layer[Action.SKIP]) / saved) if saved > 0 else 1.0
    scale *= 1 + _TAIL_SCALE / tail
    return low * scale, high * scale


class _Progress:
    """Shows training to a person, and writes its curve."""

    def __init__(self, display: ProgressDisplay, curve: TrainingCurve) -> None:
        self._display = display
        self._curve = curve
        self._before, self._started = curve.seconds, time.monotonic()

    def batch(self, done: int, num_labels: int) -> None:
        self._display.update(done, f"{num_labels:,} labels")

    def round(self, number: int, num_labels: int, reached: Sequence[Reached]) -> None:
        outcomes = ", ".join(f"{own.divergence:.3f} at a cost of {own.cost:.3f}" for own in reached)
        self._display.note(f"round {number + 1}: {num_labels:,} labels; divergence {outcomes}")
        low, middle, high = ((own.cost, own.divergence) for own in reached)
        seconds = self._before + time.monotonic() - self._started
        self._curve.append(CurveRow(number, num_labels, *low, *middle, *high, seconds))


def _policy(task: Task, network: PolicyNetwork, name: str, is_drafter: bool) -> LearnedPolicy:
    return LearnedPolicy(
        name=name,
        network=network,
        spec=task.spec,
        compensation=task.compensation,
        calibration=BudgetCalibration(()),
        is_drafter=is_drafter,
    )


def _task(model: LoadedModel, actions: tuple[Action, ...], options: argparse.Namespace) -> Task:
    """Returns a task with the full head and no compensation; all actions cost the same until they are measured."""
    num_layers = model.config.num_layers
    pinned = {*range(options.lookahead), num_layers - 1}
    spec = PlanSpec(
        actions=actions,
        pinned=dict.fromkeys(sorted(pinned), Action.FULL),
        lookahead=options.lookahead,
        block_size=min(options.block_size, num_layers),
        head=Action.FULL,
        costs=CostTable(num_layers, dict.fromkeys(Action, 1 / num_layers), {Action.FULL: 0.0}),
    )
    return Task(decoder=model.decoder, spec=spec, compensation=Identity(), num_prompt_tokens=options.prompt_tokens)


def _kept_costs(path: Path, model: LoadedModel, task: Task, compensation: Compensation) -> CostTable:
    """Returns the run's cost table, measured once: a resumed run must keep the table that it began with."""
    if path.exists():
        return read_costs(path, "out", f"{path} is damaged; remove the folder to start again")
    untrained = DamageModel(task.spec, model.config.hidden_size, FitSettings()).network()
    counts = {task.decoder.highest: float(model.config.num_layers)}
    policy = replace(
        _policy(replace(task, compensation=compensation), untrained, "untrained", is_drafter=False),
        calibration=BudgetCalibration((PricePoint(0.0, counts, 0.0, 1.0),)),
    )
    costs = model.measured_costs(compensation, [policy])
    write_whole(path, json.dumps(costs.to_json(), indent=1).encode())
    return costs


def _split(sequences: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Returns the sequences to calibrate and judge on, and those to learn from."""
    if len(sequences) <= CALIBRATION_SEQUENCES:
        raise ConfigError("data", f"has {len(sequences)} sequences; more than {CALIBRATION_SEQUENCES} are needed")
    return sequences[:CALIBRATION_SEQUENCES], sequences[CALIBRATION_SEQUENCES:]
