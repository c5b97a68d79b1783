"""Measures what a skipped layer and a policy's evaluation cost within whole decode steps.

A layer alone would be measured with warm caches and without what surrounds it. So steps with more and fewer skipped
layers take turns, and so do steps with a policy in them and the same steps without. Knows plans; knows no requests.
"""

import statistics
import time
from random import Random

import torch

from benchmarks.figures import Report
from benchmarks.rounds import Effort, progress
from benchmarks.setting import Setting
from dash_runtime.actions import Action
from dash_runtime.engine.decider import Decider, plan_of
from dash_runtime.engine.engine import Engine
from dash_runtime.engine.lanes import InlineLane
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Compensation
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.native.code_files import load_native_code
from dash_runtime.policy.budgets import BudgetCalibration, PricePoint
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.network import PolicyNetwork
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy import Actions, FixedPlan, Token
from dash_runtime.startup.measure import filled_caches
from dash_runtime.startup.native_code import with_native_code

_CONTEXT_TOKENS = 64
_STEPS_PER_ROUND = 12
_NUM_SKIPPED = (0, 4, 8, 12, 16)
_WIDTHS = (64, 32)
_HEAD = Action.INT8


def measure_skips(report: Report, setting: Setting, effort: Effort) -> None:
    """Adds `skip_vs_int4` for each compensation at hand, and the share of a token that evaluations take."""
    engine = setting.engine
    learned = [policy.compensation for policy in engine._catalog._learned.values()]
    for compensation in {own.kind: own for own in (*learned, engine._catalog._compensation)}.values():
        progress(f"skipped layers: {compensation.kind}")
        with report.attempt(f"skipped layers, {compensation.kind}"):
            _measure_skipped_layers(report, engine, compensation, effort.rounds)
    progress("evaluations of a policy")
    with report.attempt("evaluations"):
        _measure_evaluations(report, setting, effort.rounds)
    report.note(
        "skip_vs_int4: what each further skipped layer saves of a step in INT4, taken from a layer's share of that "
        "step; by the kind of compensation. evaluations_share: what deciding every layer but the edges adds to a step "
        f"in INT4, by a network of {_WIDTHS[0]} and {_WIDTHS[1]} features, as a share of the step"
    )


def _measure_skipped_layers(report: Report, engine: Engine, compensation: Compensation, rounds: int) -> None:
    decoder, rng = engine._decoder, Random(1)
    (cache,) = filled_caches(decoder, num_tokens=_CONTEXT_TOKENS)
    ratios: list[float] = []
    for _ in range(rounds):
        seconds: dict[int, list[float]] = {count: [] for count in _NUM_SKIPPED}
        layers_seconds: list[float] = []
        for _ in range(_STEPS_PER_ROUND):
            for count in rng.sample(_NUM_SKIPPED, len(_NUM_SKIPPED)):
                skipped = rng.sample(range(1, decoder.num_layers), count)
                plan = (Action.SKIP if layer in skipped else Action.INT4 for layer in range(decoder.num_layers))
                step = _Step(engine, cache, _plan(tuple(plan), compensation))
                step.run()  # the first of a plan has to say what it is
                elapsed, in_layers = step.run()
                seconds[count].append(elapsed)
                if not count:
                    layers_seconds.append(in_layers)
        saved = statistics.linear_regression(_NUM_SKIPPED, [statistics.median(own) for own in seconds.values()]).slope
        int4 = statistics.median(layers_seconds) / decoder.num_layers
        ratios.append((int4 + saved) / int4)
    report.add(f"skip_vs_int4_{compensation.kind}", ratios, "≤ 0.12")


def _measure_evaluations(report: Report, setting: Setting, rounds: int) -> None:
    engine = setting.engine
    decoder, (cache,) = engine._decoder, filled_caches(engine._decoder, num_tokens=_CONTEXT_TOKENS)
    policy = _int4_policy(engine)
    library = load_native_code(setting.cache_folder / "native", progress)
    if library is None:
        return
    policy = with_native_code(policy, library, None)
    plan = _plan((Action.INT4,) * decoder.num_layers, policy.compensation)
    steps = [_Step(engine, cache, policy), _Step(engine, cache, plan)]
    shares: list[float] = []
    for _ in range(rounds):
        seconds: list[list[float]] = [[], []]
        for number in range(4 * _STEPS_PER_ROUND):
            for place in (0, 1) if number % 2 else (1, 0):
                seconds[place].append(steps[place].run()[0])
        with_policy, without = map(statistics.median, seconds)
        shares.append((with_policy - without) / with_policy)
    report.add("evaluations_share", shares, "≤ 0.01")


class _Step:
    """A decode step of one row, again and again, as an engine keeps it."""

    def __init__(self, engine: Engine, cache: SequenceCache, policy: LearnedPolicy | FixedPlan) -> None:
        self._decoder, self._cache = engine._decoder, cache
        self._decider = Decider(policy, InlineLane(), [0], [self._token], engine._catalog._costs, 1)
        own = [policy.compensation], [policy.kv_action]
        self._batch = self._decoder.batch(PassKind.DECODE, [cache], [1], *own)
        self._plan = plan_of([self._decider], None)

    @property
    def _token(self) -> Token:
        return Token(0, self._cache.length, 1.0)

    @torch.inference_mode()
    def run(self) -> tuple[float, float]:
        """Decodes a token and takes it back. Returns the seconds of the step, and of its layers."""
        started, length = time.perf_counter_ns(), self._cache.length
        self._batch.move_on()
        self._decider.begin([self._token])
        result = self._decoder.run_pass(self._plan, [5], self._batch)
        self._batch.commit()
        elapsed, times = time.perf_counter_ns() - started, result.record.layer_times(0)
        self._cache.truncate(length)
        return elapsed / 1e9, (times[-1] - times[0]) / 1e9


def _plan(plan: Actions, compensation: Compensation) -> FixedPlan:
    return FixedPlan(plan, "plan", _HEAD, compensation)


def _int4_policy(engine: Engine) -> LearnedPolicy:
    """A policy that reads everything and always chooses INT4, so that its steps differ in nothing but deciding."""
    decoder, catalog = engine._decoder, engine._catalog
    num_layers, hidden_size = decoder.num_layers, decoder.config.hidden_size
    spec = PlanSpec(
        actions=(Action.SKIP, Action.INT4, Action.FULL),
        pinned=dict.fromkeys((0, num_layers - 1), Action.INT4),
        lookahead=1,
        block_size=1,
        head=_HEAD,
        costs=catalog._costs,
    )
    sizes = (len(spec.decision_blocks), 1, len(spec.actions), hidden_size, len(Action), *_WIDTHS)
    generator = torch.Generator().manual_seed(1)
    shapes = PolicyNetwork.shapes(*sizes)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["output_weight"] = torch.zeros(shapes["output_weight"])
    tensors["output_bias"] = torch.tensor([5.0, -9.0, 5.0]).expand(shapes["output_bias"]).contiguous()
    network = PolicyNetwork(**tensors)
    calibration = BudgetCalibration((PricePoint(0.0, {Action.INT4: float(num_layers)}, 0.0, 1.0),))
    return LearnedPolicy("always INT4", network, spec, catalog._compensation, calibration)
