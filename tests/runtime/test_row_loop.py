"""A row that native code takes through all layers has the numbers that it has layer by layer."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config
from dash_runtime.decoder.backends.inductor import InductorBackend
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.fused_decider import FusedDecider
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Compensation, Identity, PackedLowRank
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.layers.pass_plan import PassPlan, PassRun
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.programs.row_calls import RowCalls, RowShape
from dash_runtime.programs.row_loop import RowLoop, load_row_loop
from dash_runtime.startup.policy_programs import PolicyPrograms
from tests.runtime import test_fused_decider as fused
from tests.runtime.compiled_model import BUDGETS, NUM_THREADS, CompiledModel, UncompiledProgram, random_policy
from tests.runtime.support import ALL_ACTIONS, full_plan, new_cache, run_rows, some_affine, some_low_rank
from tests.runtime.test_compiled import decoder_of

pytestmark = pytest.mark.alone
PROMPT = [5, 80, 7, 12]


@dataclass(frozen=True)
class Pair:
    """One model twice: called layer by layer, and by the native loop."""

    by_layer: Decoder
    whole: Decoder
    loop: RowLoop
    policy: LearnedPolicy


@pytest.fixture(scope="module")
def pair(compiled_model: CompiledModel) -> Pair:
    said: list[str] = []
    loop = load_row_loop(compiled_model.cache_folder / "programs", said.append)
    assert loop is not None, said
    folder, programs = compiled_model.folder, compiled_model.programs
    config = load_model_config(folder)
    by_layer, whole = (
        decoder_of(folder, config, InductorBackend(config, programs, False, own)) for own in (None, loop)
    )
    policy = random_policy(folder, BUDGETS, block_size=1)
    return Pair(by_layer, whole, loop, PolicyPrograms(config, policy, NUM_THREADS, None).attached(programs))


class MissingProgram(UncompiledProgram):
    """A program whose file was removed after it was loaded."""

    path = Path("/no/such/program.pt2")


def prefilled(decoder: Decoder) -> SequenceCache:
    cache = new_cache(decoder)
    run_rows(decoder, [cache], [PROMPT], [full_plan(decoder)])
    return cache


def run_whole(
    decoder: Decoder, cache: SequenceCache, token_id: int, plan: PassPlan, compensation: Compensation
) -> PassRun | None:
    batch = decoder.batch(PassKind.DECODE, [cache], [1], [compensation], [Action.INT8])
    run = decoder.run_pass(plan, decoder.embed([token_id]), batch)
    if run is not None:
        batch.commit()
    return run


@pytest.mark.parametrize("kind", ["none", "affine", "low rank"])
@torch.inference_mode()
def test_any_plan_has_the_numbers_and_leaves_the_keys_that_it_does_layer_by_layer(pair: Pair, kind: str) -> None:
    compensation = {
        "none": Identity(),
        "affine": some_affine(pair.by_layer),
        "low rank": PackedLowRank.from_low_rank(some_low_rank(pair.by_layer, rank=16), torch.bfloat16),
    }[kind]
    own, other = prefilled(pair.whole), prefilled(pair.by_layer)
    generator = torch.Generator().manual_seed(2)
    for token_id in range(16):  # beyond the model's windows
        choices = torch.randint(len(ALL_ACTIONS), (pair.whole.num_layers,), generator=generator).tolist()
        plan = [ALL_ACTIONS[choice] for choice in choices]
        run = run_whole(pair.whole, own, token_id, PassPlan(dict(enumerate(plan))), compensation)
        expected = run_rows(pair.by_layer, [other], [[token_id]], [plan], compensation, kv_action=Action.INT8)
        assert run is not None
        assert list(run.plan) == plan
        assert torch.equal(pair.whole.logits(run.hidden, [Action.FULL]), expected)
        assert list(run.layer_times) == sorted(run.layer_times)
        assert 0 < run.layer_times[0] < run.layer_times[-1]
    assert torch.equal(own.memory[:, :, : own.length], other.memory[:, :, : other.length])


@torch.inference_mode()
def test_a_policy_decides_what_it_decides_layer_by_layer(pair: Pair) -> None:
    caches = [prefilled(decoder) for decoder in (pair.whole, pair.by_layer)]
    settings = [fused.Setting(decoder, pair.policy) for decoder in (pair.whole, pair.by_layer)]
    taken: set[int] = set()
    for token_id, price in enumerate((0.1, 1.0, 5.0, 40.0, 5.0, 1.0, 0.1) * 2):
        each = zip(settings, caches, strict=True)
        (own, decider), (other, expected) = [
            fused.step(setting, FusedDecider, [cache], [token_id], price) for setting, cache in each
        ]
        assert own.plans == other.plans
        assert torch.equal(own.logits, other.logits)
        assert decider.blocks == expected.blocks
        assert decider.num_evaluations == expected.num_evaluations > 0
        taken |= set(own.plans[0])
    assert len(taken) >= 3


@torch.inference_mode()
def test_a_row_alone_and_rows_of_a_batch_take_turns_with_one_policy(pair: Pair) -> None:
    whole, by_layer = ([prefilled(decoder) for _ in range(2)] for decoder in (pair.whole, pair.by_layer))
    for token_id, count in enumerate((1, 2, 1, 1, 2, 1)):
        own, other = (
            fused.step(fused.Setting(decoder, pair.policy), FusedDecider, caches[:count], [token_id] * count, 2.0)[0]
            for decoder, caches in ((pair.whole, whole), (pair.by_layer, by_layer))
        )
        assert own.plans == other.plans
        assert torch.equal(own.logits, other.logits)


@torch.inference_mode()
def test_rows_to_verify_have_the_numbers_that_they_have_layer_by_layer(
    pair: Pair, compiled_model: CompiledModel
) -> None:
    config, programs = pair.whole.config, compiled_model.programs
    config = replace(config, sliding_window=(None,) * config.num_layers)
    whole, by_layer = (
        decoder_of(compiled_model.folder, config, InductorBackend(config, programs, False, own))
        for own in (pair.loop, None)
    )
    own, other = prefilled(whole), prefilled(by_layer)
    is_whole: list[bool] = []
    for count in (4, 1, 8, 3, 12, 2):
        ids = [(17 * row + count) % 250 for row in range(count)]
        verified = []
        for decoder, cache in ((whole, own), (by_layer, other)):
            batch = decoder.batch(PassKind.VERIFY, [cache], [count], [Identity()])
            plan = PassPlan(dict.fromkeys(range(decoder.num_layers), Action.FULL))
            is_whole.append(decoder.run_pass(plan, decoder.embed(ids), batch) is not None)
            verified.append(decoder.run_layers(Action.FULL, decoder.embed(ids), batch).clone())
            batch.commit()
        assert torch.equal(*verified)
    assert torch.equal(own.memory[:, :, : own.length], other.memory[:, :, : other.length])
    assert is_whole[::2] == [True, True, True, False, False, False]  # counts that have no program of their own
    assert not any(is_whole[1::2])


@torch.inference_mode()
def test_what_native_code_cannot_run_is_left_to_the_loop_over_layers(pair: Pair, compiled_model: CompiledModel) -> None:
    plan = PassPlan(dict.fromkeys(range(pair.whole.num_layers), Action.FULL))
    assert run_whole(pair.by_layer, prefilled(pair.by_layer), 1, plan, Identity()) is None
    no_program = some_low_rank(pair.whole)
    assert run_whole(pair.whole, prefilled(pair.whole), 1, plan, no_program) is None
    uncompiled = {spec: UncompiledProgram(spec) for spec in compiled_model.programs}
    config = pair.whole.config
    decoder = decoder_of(compiled_model.folder, config, InductorBackend(config, uncompiled, False, pair.loop))
    assert run_whole(decoder, prefilled(decoder), 1, plan, Identity()) is None
    gone = load_row_loop(compiled_model.cache_folder / "programs", print)
    assert gone is not None
    missing = {spec: MissingProgram(spec) for spec in compiled_model.programs}
    decoder = decoder_of(compiled_model.folder, config, InductorBackend(config, missing, False, gone))
    assert run_whole(decoder, prefilled(decoder), 1, plan, Identity()) is None


def test_a_layer_without_a_program_for_its_action_is_an_error_that_names_it(pair: Pair) -> None:
    config = pair.whole.config
    shape = RowShape(1, config.hidden_size, torch.bfloat16, [0], [0])
    calls = RowCalls(pair.loop, shape, [({}, {})])
    table = torch.zeros(1, 1, config.head_dim, dtype=torch.bfloat16)
    memory = new_cache(pair.whole).memory
    with pytest.raises(RuntimeError, match="layer 0"):
        calls.run(torch.zeros(1, config.hidden_size), memory, 1, [(table, table)], bytes([Action.INT4]), {})


def test_a_machine_that_cannot_have_the_loop_says_so_and_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    no_folder = tmp_path / "file"
    no_folder.write_text("")
    assert load_row_loop(no_folder, said.append) is None
    assert len(said) == 1
    assert said[0].startswith("layers are called one by one: ")


def test_a_damaged_loop_is_compiled_again(tmp_path: Path) -> None:
    said: list[str] = []
    assert load_row_loop(tmp_path, said.append) is not None
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:1000] + bytes(8) + whole[1008:])
    assert load_row_loop(tmp_path, said.append) is not None
    assert not said


def test_a_policys_last_actions_are_forgotten_at_each_token(pair: Pair) -> None:
    policy = replace(pair.policy)
    (evaluation,) = policy.row_evaluations(1)
    num_known = evaluation.exchange.num_known
    evaluation.exchange.tensor[:num_known] = 1.0  # as native code leaves it
    evaluation.begin(fused.Token(0, 1, 1.0), policy.costs)
    assert evaluation.exchange.tensor[:num_known].tolist() == [0.0] * num_known
