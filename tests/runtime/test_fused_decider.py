"""A policy that the layers' programs evaluate decides what it decides by itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config
from dash_runtime.config import LaneKind
from dash_runtime.decoder.backends.inductor import InductorBackend
from dash_runtime.decoder.backends.needed_programs import program_specs
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.fused_decider import FusedDecider
from dash_runtime.engine.lanes import InlineLane
from dash_runtime.engine.step import Decider, StepOutput, decode_step
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import PackedLowRank
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy import Token
from dash_runtime.startup.policy_programs import PolicyPrograms
from tests.runtime.compiled_model import SIZES, UncompiledProgram, random_policy
from tests.runtime.support import ALL_ACTIONS, full_plan, run_rows, some_low_rank
from tests.runtime.test_compiled import decoder_of
from tests.tiny_models import save_tiny_model

PROMPTS = [[1, 2, 3], [7, 8], [4, 5, 6, 7]]


@dataclass(frozen=True)
class Setting:
    """A decoder whose rows run alone, and a policy with its programs, uncompiled."""

    decoder: Decoder
    policy: LearnedPolicy


@pytest.fixture(scope="module", params=["affine", "low rank"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = save_tiny_model(tmp_path_factory.mktemp("fused") / "llama", "llama", **SIZES)
    config = load_model_config(folder)
    policy = random_policy(folder, block_size=1)
    specs = program_specs(config, ALL_ACTIONS, 1)
    decoder = decoder_of(folder, config, InductorBackend(config, _uncompiled(specs), shares_products=False))
    if request.param == "low rank":
        low_rank = some_low_rank(decoder, rank=16)
        policy = replace(policy, compensation=PackedLowRank.from_low_rank(low_rank, torch.bfloat16))
    programs = PolicyPrograms(config, policy, 1, None)
    own = _uncompiled([*specs, *programs.specs])
    decoder = decoder_of(folder, config, InductorBackend(config, own, shares_products=False))
    return Setting(decoder, programs.attached(own))


def _uncompiled(specs: Sequence) -> dict:  # type: ignore[type-arg]
    return {spec: UncompiledProgram(spec) for spec in specs}


def prefilled(decoder: Decoder) -> list[SequenceCache]:
    caches = decoder.caches([32] * len(PROMPTS))
    for cache, prompt in zip(caches, PROMPTS, strict=True):
        run_rows(decoder, [cache], [prompt], [full_plan(decoder)])
    return caches


def step(
    setting: Setting, kind: type[Decider], caches: Sequence[SequenceCache], token_ids: Sequence[int], price: float
) -> tuple[StepOutput, Decider]:
    policy, count = setting.policy, len(caches)
    tokens = [Token(0, cache.length, price) for cache in caches]
    decider = kind(policy, range(count), tokens, policy.costs, count)
    batch = setting.decoder.batch(
        PassKind.DECODE, caches, [1] * count, [policy.compensation] * count, [policy.kv_action] * count
    )
    return decode_step(setting.decoder, InlineLane(), batch, token_ids, [decider]), decider


@torch.inference_mode()
def test_fused_and_separate_evaluations_give_the_same_plans_scores_and_logits(setting: Setting) -> None:
    fused_caches, other_caches = prefilled(setting.decoder), prefilled(setting.decoder)
    taken: set[int] = set()
    for number, price in enumerate((0.1, 1.0, 5.0, 40.0)):
        token_ids = [10 * number + row for row in range(len(PROMPTS))]
        fused, fused_decider = step(setting, FusedDecider, fused_caches, token_ids, price)
        other, decider = step(setting, Decider, other_caches, token_ids, price)
        assert fused.plans == other.plans
        torch.testing.assert_close(fused.logits, other.logits)
        assert [block.layers for block in fused_decider.blocks] == [block.layers for block in decider.blocks]
        for own, expected in zip(fused_decider.blocks, decider.blocks, strict=True):
            assert own.ticket is None
            assert own.scores is not None
            scores = torch.tensor([memoryview(row).cast("f").tolist() for row in own.scores]).unsqueeze(1)
            torch.testing.assert_close(scores, expected.scores, rtol=1e-4, atol=1e-4)
        taken |= {action for plan in fused.plans for action in plan}
    assert len(taken) >= 3


@torch.inference_mode()
def test_a_rows_decisions_do_not_depend_on_its_neighbours(setting: Setting) -> None:
    together, alone = prefilled(setting.decoder), prefilled(setting.decoder)
    for number in range(3):
        token_ids = [20 * number + row for row in range(len(PROMPTS))]
        output, _ = step(setting, FusedDecider, together, token_ids, 1.0)
        for row, cache in enumerate(alone):
            own, _ = step(setting, FusedDecider, [cache], token_ids[row : row + 1], 1.0)
            assert own.plans == output.plans[row : row + 1]
            assert torch.equal(own.logits, output.logits[row : row + 1])


@pytest.mark.parametrize(
    ("changes", "lane", "expected"),
    [
        ({}, None, set(Action)),
        ({}, LaneKind.INLINE, set(Action)),
        ({}, LaneKind.THREAD, set()),
        ({"lookahead": 2}, None, set()),
        ({"block_size": 2}, None, set()),
        ({"actions": (Action.SKIP, Action.INT4)}, None, {Action.SKIP, Action.INT4, Action.FULL}),
    ],
)
def test_layers_evaluate_only_policies_that_decide_the_next_layer_and_that_no_other_lane_was_asked_for(
    setting: Setting, changes: dict[str, object], lane: LaneKind | None, expected: set[Action]
) -> None:
    policy = replace(setting.policy, spec=replace(setting.policy.spec, **changes))  # type: ignore[arg-type]
    specs = PolicyPrograms(setting.decoder.config, policy, 1, lane).specs
    assert {spec.action if spec.kind == "layer" else Action.SKIP for spec in specs if spec.policy} == expected
