"""A policy that native code evaluates decides the same within a row's pass, for rows between layers, and eagerly."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional

from dash_runtime.actions import Action, LatencyTable
from dash_runtime.config import LaneKind
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.decider import Decider, plan_of
from dash_runtime.engine.lanes import InlineLane
from dash_runtime.engine.planner import GroupPlanner
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Identity, PackedLowRank
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.native.library import NativeLibrary
from dash_runtime.native.structs import MOST_NUMBERS
from dash_runtime.passes import PassResult, Planner
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.network import PolicyNetwork
from dash_runtime.policy.policy import Token
from dash_runtime.startup.native_code import with_native_code
from tests.runtime.native_model import SIZES, native_decoder
from tests.runtime.random_policy import random_policy
from tests.runtime.support import full_plan, run_rows, some_low_rank
from tests.tiny_models import save_tiny_model

PROMPTS = [[1, 2, 3], [7, 8], [4, 5, 6, 7]]
PRICES = (0.1, 1.0, 5.0, 40.0, 5.0, 1.0)


@dataclass(frozen=True)
class Setting:
    """A native decoder, and a policy that native code evaluates."""

    folder: Path
    decoder: Decoder
    policy: LearnedPolicy
    library: NativeLibrary


@pytest.fixture(scope="module", params=["affine", "low rank"])
def setting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, native_library: NativeLibrary
) -> Setting:
    folder = save_tiny_model(tmp_path_factory.mktemp("fused") / "llama", "llama", **SIZES)
    decoder = native_decoder(folder, native_library)
    policy = random_policy(folder, block_size=1)
    if request.param == "low rank":
        low_rank = some_low_rank(decoder, rank=16)
        policy = replace(policy, compensation=PackedLowRank.from_low_rank(low_rank, torch.bfloat16))
    return Setting(folder, decoder, with_native_code(policy, native_library, None), native_library)


def prefilled(decoder: Decoder, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[SequenceCache]:
    caches = decoder.caches([32] * len(prompts))
    for cache, prompt in zip(caches, prompts, strict=True):
        run_rows(decoder, [cache], [prompt], [full_plan(decoder)])
    return caches


class Step(NamedTuple):
    """A pass, and who decided."""

    result: PassResult
    decider: Decider


def step(
    setting: Setting,
    in_pass: bool,
    caches: Sequence[SequenceCache],
    token_ids: Sequence[int],
    price: float | Sequence[float],
    policy: LearnedPolicy | None = None,
    planner: Planner | None = None,
) -> Step:
    policy, count = setting.policy if policy is None else policy, len(caches)
    policy = replace(policy, decides_in_pass=in_pass)
    prices = [price] * count if isinstance(price, float) else price
    tokens = [Token(0, cache.length, own) for cache, own in zip(caches, prices, strict=True)]
    decider = Decider(policy, InlineLane(), range(count), tokens, policy.costs, count)
    batch = setting.decoder.batch(
        PassKind.DECODE, caches, [1] * count, [policy.compensation] * count, [policy.kv_action] * count
    )
    result = setting.decoder.run_pass(plan_of([decider], planner), token_ids, batch)
    batch.commit()
    return Step(result, decider)


def scores_of(own: Step, row: int) -> list[list[float]]:
    """Returns a row's scores by decided layer."""
    decider = own.decider
    in_pass, size = own.result.record.scores(row), len(decider.policy.score_actions)
    if in_pass is not None:
        scores = memoryview(in_pass).cast("f").tolist()
        free = [layer for layer in range(len(scores) // size) if layer not in decider.policy.pinned]
        return [scores[layer * size : (layer + 1) * size] for layer in free]
    assert all(block.scores is not None for block in decider.blocks)
    return [block.scores[row].flatten().tolist() for block in decider.blocks]  # type: ignore[index]


@torch.inference_mode()
def test_a_rows_pass_decides_what_is_decided_for_rows_between_layers(setting: Setting) -> None:
    """Bit for bit, so that a row's decisions do not depend on its neighbours."""
    together, alone = prefilled(setting.decoder), prefilled(setting.decoder)
    taken: set[int] = set()
    for number, price in enumerate(PRICES):
        token_ids = [10 * number + row for row in range(len(PROMPTS))]
        output, decider = layered = step(setting, False, together, token_ids, price)
        for row, cache in enumerate(alone):
            own, fused = in_pass = step(setting, True, [cache], token_ids[row : row + 1], price)
            assert own.plans == output.plans[row : row + 1]
            assert torch.equal(own.logits, output.logits[row : row + 1])
            assert not fused.blocks
            assert scores_of(in_pass, 0) == scores_of(layered, row)
            assert fused.num_evaluations == decider.num_evaluations > 0
        taken |= {action for plan in output.plans for action in plan}
    assert len(taken) >= 3


def some_latencies(seed: int) -> LatencyTable:
    """Returns a table in which it sometimes pays to agree, but never in FULL: rows that a pass raises to it attend as
    in INT8."""
    random = Random(seed)
    counts = (1, 2, 4, 8)
    weights = {action: 10 if action is Action.FULL else int(action) for action in Action}
    seconds = {
        action: tuple(weight * (1 + 0.2 * count) * random.uniform(0.5, 1.5) for count in counts)
        for action, weight in weights.items()
    }
    return LatencyTable(counts, seconds, split_seconds=random.uniform(0, 2))


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("has_planner", [False, True])
@torch.inference_mode()
def test_a_pass_of_several_rows_decides_and_agrees_as_the_loop_over_layers(
    setting: Setting, has_planner: bool, num_threads: int
) -> None:
    """Each row at a price of its own; bit for bit."""
    decoder = native_decoder(setting.folder, setting.library, num_threads=num_threads)
    several = replace(setting, decoder=decoder)
    prompts = [[1 + row, 2, 3 + row] for row in range(11)]
    layered, fused = prefilled(setting.decoder, prompts), prefilled(decoder, prompts)
    raised = 0
    for number in range(6):
        planner = GroupPlanner(some_latencies(number)) if has_planner else None
        count = (11, 4, 2, 11, 9, 3)[number]
        token_ids = [10 * number + row for row in range(count)]
        prices = [PRICES[(number + row) % len(PRICES)] for row in range(count)]
        expected, _ = by_layer = step(setting, False, layered[:count], token_ids, prices, planner=planner)
        output, _ = in_pass = step(several, True, fused[:count], token_ids, prices, planner=planner)
        assert output.plans == expected.plans
        assert torch.equal(output.logits, expected.logits)
        assert output.token_ids == expected.token_ids
        for row in range(count):
            assert scores_of(in_pass, row) == scores_of(by_layer, row)
        raised += len({bytes(plan) for plan in output.plans}) < count
    assert raised or not has_planner


@torch.inference_mode()
def test_native_code_scores_as_the_network_does(setting: Setting) -> None:
    native, eager = prefilled(setting.decoder), prefilled(setting.decoder)
    for number, price in enumerate(PRICES):
        token_ids = [10 * number + row for row in range(len(PROMPTS))]
        own_step = step(setting, False, native, token_ids, price)
        other_step = step(setting, False, eager, token_ids, price, replace(setting.policy, evaluator=None))
        assert own_step.result.plans == other_step.result.plans
        for row in range(len(PROMPTS)):
            own, others = (torch.tensor(scores_of(one, row)) for one in (own_step, other_step))
            torch.testing.assert_close(own, others, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("block_size", "lookahead"), [(2, 1), (3, 1), (1, 2), (2, 2)])
@torch.inference_mode()
def test_blocks_and_lookahead_are_decided_natively_as_by_the_network(
    setting: Setting, block_size: int, lookahead: int
) -> None:
    policy = random_policy(setting.folder, block_size=block_size, lookahead=lookahead)
    own = with_native_code(policy, setting.library, None)
    assert own.evaluator is not None
    caches = [prefilled(setting.decoder) for _ in range(2)]
    for number, price in enumerate(PRICES):
        token_ids = [10 * number + row for row in range(len(PROMPTS))]
        native, eager = (
            step(setting, False, each, token_ids, price, one) for each, one in zip(caches, (own, policy), strict=True)
        )
        assert native.result.plans == eager.result.plans
        for row in range(len(PROMPTS)):
            for scores, others in zip(scores_of(native, row), scores_of(eager, row), strict=True):
                assert scores == pytest.approx(others, rel=1e-4, abs=1e-4)


@torch.inference_mode()
def test_a_tokens_decisions_do_not_depend_on_the_tokens_that_the_policy_saw_before(setting: Setting) -> None:
    cache, fresh = prefilled(setting.decoder)[0], prefilled(setting.decoder)[0]
    used = replace(setting.policy)
    for token_id, price in enumerate(PRICES):
        own, _ = step(setting, True, [cache], [token_id], price, used)
        other, _ = step(setting, True, [fresh], [token_id], price, replace(setting.policy))
        assert own.plans == other.plans
        assert torch.equal(own.logits, other.logits)


@torch.inference_mode()
def test_passes_of_one_row_and_of_several_take_turns_with_one_policy(setting: Setting) -> None:
    turns, rows = prefilled(setting.decoder), prefilled(setting.decoder)
    for token_id, count in enumerate((1, 2, 1, 1, 3, 1)):
        own, _ = step(setting, count == 1, turns[:count], [token_id] * count, 2.0)
        other, _ = step(setting, False, rows[:count], [token_id] * count, 2.0)
        assert own.plans == other.plans
        assert torch.equal(own.logits, other.logits)


def widened(network: PolicyNetwork, num_more: int) -> PolicyNetwork:
    """Returns a network with more features, which are always 0."""
    return replace(
        network,
        hidden_weight=functional.pad(network.hidden_weight, (0, 0, 0, num_more)),
        hidden_bias=functional.pad(network.hidden_bias, (0, num_more)),
        fact_weight=functional.pad(network.fact_weight, (0, num_more)),
        inner_weight=functional.pad(network.inner_weight, (0, num_more)),
    )


@torch.inference_mode()
def test_a_network_that_native_code_has_no_room_for_is_evaluated_eagerly(setting: Setting) -> None:
    wide = replace(setting.policy, network=widened(setting.policy.network, MOST_NUMBERS))
    wide = with_native_code(wide, setting.library, None)
    assert wide.evaluator is None
    assert not wide.decides_in_pass
    own, other = prefilled(setting.decoder), prefilled(setting.decoder)
    for token_id, price in enumerate(PRICES):
        outputs = [
            step(setting, False, caches, [token_id] * len(caches), price, policy)[0]
            for caches, policy in ((own, wide), (other, None))
        ]
        assert outputs[0].plans == outputs[1].plans


def test_a_pass_evaluates_only_policies_that_decide_the_next_layer_and_that_no_other_lane_was_asked_for(
    setting: Setting,
) -> None:
    policy, spec = setting.policy, setting.policy.spec
    for lane, expected in ((None, True), (LaneKind.INLINE, True), (LaneKind.CUDA_STREAM, False)):
        assert with_native_code(policy, setting.library, lane).decides_in_pass is expected, lane
    others = {
        "lookahead": replace(policy, spec=replace(spec, lookahead=2)),
        "blocks": random_policy(setting.folder, block_size=2),
        "a float map": replace(policy, compensation=some_low_rank(setting.decoder)),
    }
    for name, other in others.items():
        assert not with_native_code(other, setting.library, None).decides_in_pass, name
    assert with_native_code(replace(policy, compensation=Identity()), setting.library, None).decides_in_pass
