"""One decode step: when each layer is decided, from which state, and by which policy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.config import LaneKind
from dash_runtime.decoder.backends.loop import LayerLoop
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.devices import CpuDevice, CudaDevice
from dash_runtime.engine.decider import Decider, plan_of
from dash_runtime.engine.lanes import CudaStreamLane, InlineLane, Lane, make_lane
from dash_runtime.errors import ConfigError
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Identity
from dash_runtime.layers.heads import Heads
from dash_runtime.passes import PassResult
from dash_runtime.policy.policy import Decision, FixedPlan, Pending, RandomPlan, State, Token, full_depth
from tests.runtime.support import CPU, full_plan, load_decoder, loop_ends, new_cache, run_rows, some_affine, some_costs

NUM_LAYERS = 6
EDGES = dict.fromkeys((0, NUM_LAYERS - 1), Action.FULL)


class RecordingPolicy:
    """Skips rows whose observed state has a positive sum, and records every state that it sees."""

    name = "recording"
    head = Action.FULL
    compensation = Identity()
    block_size = 1
    num_evaluations = 0

    def __init__(
        self, lookahead: int = 1, pinned: frozenset[int] = frozenset(EDGES), journal: list[Any] | None = None
    ) -> None:
        self.lookahead = lookahead
        self.pinned = dict.fromkeys(pinned, Action.FULL)
        self.journal: list[Any] = [] if journal is None else journal

    def start(self, layer: int, state: State) -> Pending:
        self.journal.append(("decide", layer, state))
        chosen = tuple(Action.SKIP if value > 0 else Action.INT8 for value in state.hidden.float().sum(-1))
        return lambda: Decision((chosen,))


class JournalLoop(LayerLoop):
    """Runs a real decoder's layers, and writes that into a journal."""

    def __init__(self, decoder: Decoder, journal: list[Any]) -> None:
        super().__init__(loop_ends(decoder))
        self.logits = Heads(decoder.heads)
        self._decoder = decoder
        self._journal = journal

    def run_layer(self, layer: int, actions: Sequence[Action], hidden: torch.Tensor, batch: Any) -> torch.Tensor:
        self._journal.append(("run", layer, tuple(actions), hidden))
        return self._decoder.run_layer(layer, actions, hidden, batch)


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> Decoder:
    return load_decoder(tiny_folder, torch.bfloat16)


def step(decoder: Decoder, lane: Lane, policies: dict[int, Any], token_ids: list[int]) -> PassResult:
    """Runs one decode step after prompts of three tokens; row i has `policies[i]`."""
    caches = [new_cache(decoder) for _ in token_ids]
    for row, cache in enumerate(caches):
        run_rows(decoder, [cache], [[row, 2, 3]], [full_plan(decoder)])
    rows_of: dict[int, list[int]] = {}
    for row in range(len(token_ids)):
        rows_of.setdefault(id(policies[row]), []).append(row)
    deciders = [
        Decider(
            policies[rows[0]],
            lane,
            rows,
            [Token(seed=row, position=3, price=1.0) for row in rows],
            some_costs(),
            len(token_ids),
        )
        for rows in rows_of.values()
    ]
    batch = decoder.batch(
        PassKind.DECODE, caches, [1] * len(caches), [policies[row].compensation for row in range(len(caches))]
    )
    return decoder.run_pass(plan_of(deciders, None), token_ids, batch)


@torch.inference_mode()
@pytest.mark.parametrize("lookahead", [1, 2, 3])
def test_a_layer_is_decided_from_the_input_of_the_layer_lookahead_before_while_that_one_is_still_to_run(
    decoder: Decoder, lookahead: int
) -> None:
    journal: list[Any] = []
    policy = RecordingPolicy(lookahead, frozenset((*range(lookahead), *EDGES)), journal)
    caches = [new_cache(decoder)]
    batch = decoder.batch(PassKind.PREFILL, caches, [1], [Identity()])
    decider = Decider(policy, InlineLane(), [0], [Token(0, 0, 1.0)], some_costs(), 1)  # type: ignore[arg-type]
    JournalLoop(decoder, journal).run(plan_of([decider], None), [9], batch)
    runs = {entry[1]: entry for entry in journal if entry[0] == "run"}
    decided = [entry for entry in journal if entry[0] == "decide"]
    assert [layer for _, layer, _ in decided] == [layer for layer in range(NUM_LAYERS) if layer not in policy.pinned]
    for entry in decided:
        _, layer, state = entry
        observed_run = runs[layer - lookahead]
        assert state.observed == layer - lookahead
        assert torch.equal(state.hidden, observed_run[3])
        assert state.actions == observed_run[2]
        assert journal.index(entry) < journal.index(observed_run)


@torch.inference_mode()
def test_the_cost_spent_counts_every_layer_up_to_the_observed_one(decoder: Decoder) -> None:
    policy = RecordingPolicy()
    output = step(decoder, InlineLane(), {0: policy}, [5])
    costs = some_costs().layer
    for _, layer, state in policy.journal:
        spent = sum(costs[Action(action)] for action in output.plans[0][:layer])
        assert state.cost_spent == [pytest.approx(spent)]


@torch.inference_mode()
def test_each_row_follows_its_own_policy_and_gets_the_numbers_it_gets_alone(decoder: Decoder) -> None:
    affine = some_affine(decoder)
    rates = dict.fromkeys(Action, 0.25)
    fixed = FixedPlan((Action.FULL, *[Action.INT4] * 4, Action.FULL), "fixed", Action.INT8, affine)
    random = RandomPlan([rates] * NUM_LAYERS, "random", Action.INT8, affine, EDGES)
    full, closed_loop = full_depth(NUM_LAYERS), RecordingPolicy()
    policies = dict(enumerate([random, full, closed_loop, fixed, random, closed_loop]))
    token_ids = [11, 22, 33, 44, 55, 66]
    together = step(decoder, InlineLane(), policies, token_ids)
    assert together.plans[1] == bytes([Action.FULL] * NUM_LAYERS)
    assert together.plans[3] == bytes(fixed.plan)
    for row, policy in policies.items():
        # Alone, but in the same place, so that seeds and prompts are the same.
        others = {other: full_depth(NUM_LAYERS) for other in policies if other != row}
        alone = step(decoder, InlineLane(), others | {row: policy}, token_ids)
        assert alone.plans[row] == together.plans[row]
        assert torch.equal(alone.logits[row], together.logits[row])


def test_a_lane_counts_the_time_that_the_decoder_loses() -> None:
    state = State([Token(0, 0, 1.0)], torch.zeros(1, 2), 0, (Action.FULL,), [0.0])
    lane = InlineLane()
    lane.result(lane.submit(RecordingPolicy(), 1, state))
    assert lane.exposed_ns > 0


def test_the_default_lane_of_a_cpu_is_inline_and_a_stream_is_refused_there() -> None:
    assert isinstance(make_lane(None, CpuDevice(CPU)), InlineLane)
    with pytest.raises(ConfigError, match="lane"):
        make_lane(LaneKind.CUDA_STREAM, CpuDevice(CPU))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_a_cuda_stream_lane_decides_what_the_inline_lane_does() -> None:
    hidden = torch.randn(2, 8, device="cuda")
    state = State([Token(0, 0, 1.0)] * 2, hidden, 0, (Action.FULL,) * 2, [0.0, 0.0])
    lane = CudaStreamLane(CudaDevice(torch.device("cuda")))
    asynchronous = lane.result(lane.submit(RecordingPolicy(), 1, state))
    assert asynchronous.plan == RecordingPolicy().start(1, state)().plan
