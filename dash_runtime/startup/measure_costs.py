"""Measures what each action costs on this device: by whole decode steps, as an engine serves them.

An engine of its own runs short requests in many plans, shuffled in each round: every action in all layers, mixtures,
and a learned policy. What an action costs is what its share in a plan adds to the step, with the caches, waits and
calls of a served step. A loop over one layer's kernel says less: its weights and its code are warm.
Knows the decoder and policies; knows no files.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from dash_runtime.actions import Action, CostTable
from dash_runtime.config import EngineConfig, GenerationRequest, SkipOptions, StoppingParameters
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.bursts import MOST_IN_BURST
from dash_runtime.engine.cost_fit import GROUP, STANDARD_POSITIONS, MeasuredCosts, fit_costs
from dash_runtime.engine.engine import Engine
from dash_runtime.engine.lanes import make_lane
from dash_runtime.engine.step_times import StepTime
from dash_runtime.events import CostStatus
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Compensation
from dash_runtime.passes import PassPlan
from dash_runtime.policy.catalog import Assignment
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy import FixedPlan, cheapest_kernel, full_depth
from dash_runtime.startup.estimates import EVALUATION_SHARE
from dash_runtime.startup.measure import filled_caches, timed
from dash_runtime.startup.model_facts import model_facts

ROUNDS = 8
SECONDS = 9.0
"""Beside a busy process a step may take thirty times as long, since threads wait for each other. Measuring then ends
with what it has, whose spread says how little that is."""
_MIXTURES = 4
_POLICY_RUNS = 2
_DEAREST = 1e6
"""A price of compute at which a policy chooses what is cheapest, whatever it predicts."""
_GUESS_ROUNDS = 3


@dataclass
class _DealtPlans:
    """The catalog of the measuring engine: it assigns what is measured next."""

    full_depth: Assignment
    dealt: Assignment = field(init=False)

    def assign(self, skip: SkipOptions) -> Assignment:
        return self.dealt


class _Steps:
    """The watch of the measuring engine: it keeps the steps of one request."""

    status = CostStatus()

    def __init__(self) -> None:
        self.taken: list[StepTime] = []

    def observe(self, step: StepTime) -> None:
        self.taken.append(step)

    def seconds_until_idle_work(self) -> float:
        return float("inf")

    def work_idly(self) -> None:
        pass


class StepMeasurement:
    """Measures steps one at a time, so that it can stop after any. Learned policies: the first one is evaluated."""

    def __init__(
        self, decoder: Decoder, compensation: Compensation, learned: Sequence[LearnedPolicy] = (), seed: int = 0
    ) -> None:
        self._decoder = decoder
        self.compensation = compensation
        """Of skips that no policy decides."""
        self._learned = learned[:1]
        self._random = random.Random(seed)
        # One token is the prompt's, the first step is cold, and the last, which may be a burst, has no next one.
        num_new = max(1, min(GROUP + 2 + 2 * MOST_IN_BURST, decoder.context_length - 1))
        room = min(STANDARD_POSITIONS + 1, decoder.context_length - num_new)
        # All but one token of the prompt come from the prefix cache.
        num_prompt = (room - 1) // decoder.row_block * decoder.row_block + 1
        self._request_tokens = (num_prompt, num_new)
        num_layers = decoder.num_layers  # costs that nobody reads
        actions = decoder.actions
        self._costs = CostTable(num_layers, dict.fromkeys(actions, 1 / num_layers), dict.fromkeys(decoder.heads, 0.0))
        self._catalog = _DealtPlans(
            Assignment(full_depth(num_layers, decoder.highest, decoder.finest_head), self._costs)
        )
        self._steps = _Steps()
        self._engine = self._make_engine()
        self._plans: list[Assignment] = []

    def step(self) -> list[StepTime] | None:
        """Runs one step. Returns the step times of a plan once it is done, and None before."""
        if not self._engine.has_work:
            if not self._plans:
                self._plans = self._shuffled()
            self._catalog.dealt = self._plans.pop()
            self._steps.taken.clear()
            num_prompt, num_new = self._request_tokens
            stopping = StoppingParameters(num_new, ignore_eos=True)
            self._engine.submit(
                GenerationRequest("measured", [0] * num_prompt, stopping, skip=self._engine.facts.deepest)
            )
        self._engine.step()
        if len(self._steps.taken) > GROUP:
            self._engine.cancel("measured")
        return None if self._engine.has_work else self._steps.taken[1 : GROUP + 1]

    @property
    def is_between_rounds(self) -> bool:
        """True if the next step begins a round."""
        return not self._plans and not self._engine.has_work

    def abandon(self) -> None:
        """Gives up a round that was interrupted."""
        self._engine.cancel("measured")
        self._plans = []

    def rounds(
        self, most: int = ROUNDS, seconds: float = SECONDS, now: Callable[[], float] = time.monotonic
    ) -> Iterator[list[StepTime]]:
        """Yields rounds of step times, the last one unfinished if `seconds` are over."""
        ends_at = now() + seconds
        for _ in range(most):
            steps: list[StepTime] = []
            while True:
                steps += self.step() or ()
                if self.is_between_rounds or now() >= ends_at:
                    break
            yield steps
            if now() >= ends_at:
                self.abandon()
                return

    def guess(self) -> CostTable:
        """Returns a table from which a fit can start."""
        return _guess(self._decoder, self.compensation, bool(self._learned))

    def _shuffled(self) -> list[Assignment]:
        """Returns the plans of a round, in random order."""
        num_layers, actions, heads = self._decoder.num_layers, self._decoder.actions, tuple(self._decoder.heads)
        plans: list[tuple[tuple[Action, ...], Action]] = []
        for action in actions:
            if action is not self._decoder.highest:
                # A model that skips all layers writes nonsense, which takes a head several times as long as text.
                both = cheapest_kernel(actions) if action is Action.SKIP else action, action
                plans.append((tuple(both[layer % 2] for layer in range(num_layers)), self._random.choice(heads)))
        for _ in range(_MIXTURES):
            rates = [self._random.random() for _ in actions]
            mixture = tuple(self._random.choices(actions, rates, k=num_layers))
            plans.append((mixture, self._random.choice(heads)))
        full = (self._decoder.highest,) * num_layers
        assignments = [self._catalog.full_depth, *(self._assignment(full, head) for head in heads)]
        assignments += [self._assignment(*plan) for plan in plans]
        for policy in self._learned:
            # An evaluation is a small part of a token: it shows beside the same plan without one, where least runs.
            costs = policy.costs.layer
            cheapest = min(policy.score_actions, key=lambda action: costs[action])
            plan = tuple(policy.pinned.get(layer, cheapest) for layer in range(num_layers))
            pair = Assignment(policy, policy.costs, _DEAREST), self._assignment(plan, policy.head, policy.compensation)
            assignments += pair * _POLICY_RUNS
        self._random.shuffle(assignments)
        return assignments

    def _assignment(
        self, plan: tuple[Action, ...], head: Action, compensation: Compensation | None = None
    ) -> Assignment:
        name = f"measured {plan[0].name}" if len(set(plan)) == 1 else "measured mixture"
        return Assignment(FixedPlan(plan, name, head, compensation or self.compensation), self._costs)

    def _make_engine(self) -> Engine:
        decoder, (num_prompt, num_new) = self._decoder, self._request_tokens
        config = EngineConfig(
            num_slots=1, cache_tokens=num_prompt + num_new, prefix_cache_tokens=num_prompt, group_planner=False
        )
        facts = model_facts(decoder, config, (), decoder.context_length, frozenset())
        lane = make_lane(None, *decoder.placed_on, graphs=decoder.graphs)
        return Engine(decoder, self._catalog, lane, facts, config, cost_watch=self._steps)


def measure_costs(
    measurement: StepMeasurement,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    now: Callable[[], float] = time.monotonic,
) -> MeasuredCosts:
    """Measures for `seconds` at most, and returns the table that fits best."""
    next(measurement.rounds(1, seconds / 4, now), None)  # warms up
    measurement.abandon()
    taken = list(measurement.rounds(rounds, seconds, now))
    table, spread = fit_costs(measurement.guess(), taken)
    return MeasuredCosts(table, spread, len(taken), time.time())


@torch.inference_mode()
def _guess(decoder: Decoder, compensation: Compensation, has_policy: bool) -> CostTable:
    """Times each part by itself, in a loop.

    That also says how the part of a token that is the same for every plan divides into layers, head and the rest. Whole
    steps do not show that.
    """
    kernels = [cheapest_kernel(decoder.actions)]
    batch = decoder.batch(PassKind.DECODE, filled_caches(decoder), [1], [compensation], kernels)
    plans = {action: PassPlan.of((action,) * decoder.num_layers) for action in decoder.actions}
    output = decoder.embed([0]).to(decoder.devices[-1])
    logits = decoder.logits(output, (decoder.finest_head,))

    works: dict[object, Callable[[], object]] = {
        **{("layers", action): partial(decoder.run_pass, plans[action], [0], batch) for action in decoder.actions},
        **{("head", precision): partial(decoder.logits, output, (precision,)) for precision in decoder.heads},
        "fixed": lambda: (decoder.embed([0]), logits.argmax(-1).tolist()),
    }
    rounds = [{name: timed(decoder, work) for name, work in works.items()} for _ in range(_GUESS_ROUNDS)]
    seconds = {name: min(own[name] for own in rounds) for name in works}
    return CostTable.from_seconds(
        decoder.num_layers,
        {action: seconds["layers", action] / decoder.num_layers for action in decoder.actions},
        {precision: seconds["head", precision] for precision in decoder.heads},
        seconds["fixed"],
        seconds["layers", decoder.highest] / decoder.num_layers * EVALUATION_SHARE if has_policy else 0.0,
    )
