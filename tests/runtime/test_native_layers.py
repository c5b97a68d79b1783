"""Native code decodes with the numbers and caches of eager decoding, in every family that it can compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Affine, Compensation, Identity, LowRank, PackedLowRank, Scale
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.layers.narrow_head import HeadMap
from dash_runtime.native.library import NativeLibrary
from dash_runtime.passes import PassPlan, PassResult
from tests.runtime.native_model import (
    MAX_DIVERGENCE,
    SIZES,
    assert_same_cache,
    divergence,
    eager_decoder,
    native_decoder,
)
from tests.runtime.support import (
    ALL_ACTIONS,
    full_plan,
    load_decoder,
    new_cache,
    run_rows,
    some_affine,
    some_low_rank,
)
from tests.tiny_models import save_tiny_model

Plan = Sequence[Action]


@dataclass(frozen=True)
class Decoders:
    """One model twice: natively and eagerly."""

    native: Decoder
    eager: Decoder


FAMILIES = ("llama", "qwen2-sliding-window", "mistral-sliding-window", "olmo2", "gemma3", "granite", "qwen3-moe")
"""Each has something of its own; `test_layer_body.py` has every family."""
OVERRIDES = {"qwen3-moe": {"num_experts_per_tok": 8}}
"""All experts are chosen: rounding would choose others."""


@pytest.fixture(scope="module", params=FAMILIES)
def decoders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, native_library: NativeLibrary
) -> Decoders:
    folder = tmp_path_factory.mktemp("compiled") / request.param
    save_tiny_model(folder, request.param, **SIZES | OVERRIDES.get(request.param, {}))
    return Decoders(native_decoder(folder, native_library), eager_decoder(folder))


def prefilled(decoder: Decoder, prompt: Sequence[int]) -> SequenceCache:
    cache = new_cache(decoder)
    run_rows(decoder, [cache], [prompt], [full_plan(decoder)])
    return cache


def prefilled_together(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> list[SequenceCache]:
    """Returns prefilled caches of one pool, as in an engine."""
    caches = decoder.caches([64] * len(prompts))
    for cache, prompt in zip(caches, prompts, strict=True):
        run_rows(decoder, [cache], [prompt], [full_plan(decoder)])
    return caches


def mixed_plans(decoders: Decoders, count: int) -> list[Plan]:
    """Returns plans with any action in any layer; the last plan runs every layer in FULL.

    The second layer, and the last with its window, skip until then.
    """
    generator = torch.Generator().manual_seed(5)
    num_layers = decoders.eager.num_layers
    choices = torch.randint(len(ALL_ACTIONS), (count, num_layers), generator=generator).tolist()
    plans = [[ALL_ACTIONS[choice] for choice in row] for row in choices]
    for plan in plans[:-1]:
        plan[1] = plan[-1] = Action.SKIP
    plans[-1] = [Action.FULL] * num_layers
    return list(plans)


def decode(decoder: Decoder, cache: SequenceCache, plans: Sequence[Plan], affine: Affine | None = None) -> Tensor:
    """Decodes some tokens one after another with these plans; returns their logits."""
    tokens = [(37 * step + 11) % 250 for step in range(len(plans))]
    steps = zip(tokens, plans, strict=True)
    return torch.cat([run_rows(decoder, [cache], [[token]], [plan], affine) for token, plan in steps])


@torch.inference_mode()
def test_tokens_are_those_of_the_eager_decoder_for_mixed_plans_and_long_skips(decoders: Decoders) -> None:
    plans = mixed_plans(decoders, 21)
    affine = some_affine(decoders.eager)
    own, expected = (prefilled(decoder, range(1, 12)) for decoder in (decoders.native, decoders.eager))
    logits = decode(decoders.native, own, plans, affine)
    assert divergence(decode(decoders.eager, expected, plans, affine), logits) < MAX_DIVERGENCE
    assert_same_cache(own, expected)


@torch.inference_mode()
@pytest.mark.parametrize("first", range(3))
def test_the_tokens_after_a_prompt_of_one_are_those_of_the_eager_decoder(decoders: Decoders, first: int) -> None:
    plans = [(action,) * decoders.eager.num_layers for action in ALL_ACTIONS]
    plans = [*plans[first:], *plans[:first], full_plan(decoders.eager)]
    own, expected = (prefilled(decoder, [7]) for decoder in (decoders.native, decoders.eager))
    assert divergence(decode(decoders.eager, expected, plans), decode(decoders.native, own, plans)) < MAX_DIVERGENCE
    assert_same_cache(own, expected)


@torch.inference_mode()
def test_passes_of_several_rows_and_of_one_take_turns_on_a_cache_that_is_cut_between(decoders: Decoders) -> None:
    plans = mixed_plans(decoders, 7)[:-1]
    results: list[tuple[Tensor, SequenceCache]] = []
    for decoder in (decoders.eager, decoders.native):
        cache = prefilled(decoder, range(20))
        drafts = decode(decoder, cache, plans)
        cache.truncate(23)
        verified = run_rows(decoder, [cache], [[3, 4, 5]], [full_plan(decoder)])
        results.append((torch.cat((drafts, verified, decode(decoder, cache, plans))), cache))
    (expected, expected_cache), (logits, cache) = results
    assert divergence(expected, logits) < MAX_DIVERGENCE
    assert_same_cache(cache, expected_cache)


@torch.inference_mode()
@pytest.mark.parametrize("kv_action", ALL_ACTIONS[1:])
def test_keys_and_values_of_skipped_rows_are_those_of_the_layer_that_runs_in_their_precision(
    decoders: Decoders, kv_action: Action
) -> None:
    skipping, running = (prefilled(decoders.native, [1, 2, 3]) for _ in range(2))
    for number in range(3):
        hidden = decoders.native.embed([5 + number])
        for cache, action in ((skipping, Action.SKIP), (running, kv_action)):
            batch = decoders.native.batch(PassKind.DECODE, [cache], [1], [Identity()], [kv_action])
            decoders.native.run_layer(1, [action], hidden, batch)
            batch.commit()
    for own_rows, expected in ((skipping.keys[1], running.keys[1]), (skipping.values[1], running.values[1])):
        torch.testing.assert_close(own_rows, expected, rtol=0.01, atol=0.01)
        assert all(float(row.abs().max()) > 0 for row in own_rows[: skipping.length])


@torch.inference_mode()
@pytest.mark.parametrize("kind", [Identity, Scale, Affine, PackedLowRank, LowRank])
def test_a_skipped_row_passes_on_what_its_compensation_makes_of_the_layers_input(
    decoders: Decoders, kind: type[Compensation]
) -> None:
    """The float low-rank map runs eagerly, beside native code that writes keys and values."""
    affine, low_rank = some_affine(decoders.native), some_low_rank(decoders.native, rank=16)
    packed = PackedLowRank.from_low_rank(low_rank, torch.bfloat16)
    some = [Identity(), Scale(affine.factors[:, 0]), affine, packed, low_rank]
    (compensation,) = (own for own in some if type(own) is kind)
    hidden = decoders.native.embed([9])
    for layer in (0, 3):
        cache = prefilled(decoders.native, [1, 2, 3])
        batch = decoders.native.batch(PassKind.DECODE, [cache], [1], [compensation], [Action.INT8])
        own = decoders.native.run_layer(layer, [Action.SKIP], hidden, batch)
        expected = compensation(layer, hidden)
        torch.testing.assert_close(own, expected, rtol=0.02, atol=0.02 * float(expected.abs().amax()))
        assert not torch.equal(own, hidden) or kind is Identity


@torch.inference_mode()
def test_a_layer_attends_to_its_window_and_to_nothing_before(decoders: Decoders) -> None:
    hidden = decoders.native.embed([9])
    for layer, window in enumerate(decoders.native.config.sliding_window):
        outputs: list[Tensor] = []
        for num_changed in (0, 12 - (window or 12) + 1, 12 - (window or 12) + 2):  # the row itself is in the window
            cache = prefilled(decoders.native, range(12))
            cache.keys[layer][:num_changed] += 1
            cache.values[layer][:num_changed] += 1
            batch = decoders.native.batch(PassKind.DECODE, [cache], [1], [Identity()])
            outputs.append(decoders.native.run_layer(layer, [Action.FULL], hidden, batch))
        assert torch.equal(outputs[0], outputs[1]) is (window is not None)
        assert not torch.equal(outputs[0], outputs[2])


@torch.inference_mode()
@pytest.mark.parametrize(("rank", "kv_action"), [(0, Action.INT4), (16, Action.INT8), (0, Action.FULL)])
def test_many_rows_are_those_of_the_eager_decoder(decoders: Decoders, rank: int, kv_action: Action) -> None:
    """Rows that skip share a call too: there is native code for the first two compensations, and none for the last."""
    num_rows = 24
    low_rank = some_low_rank(decoders.native, max(rank, 16))
    compensation: Compensation = PackedLowRank.from_low_rank(low_rank, torch.bfloat16)
    if not rank:
        compensation = some_affine(decoders.native) if kv_action is Action.INT4 else low_rank
    own, expected = (
        prefilled_together(decoder, [range(1, 2 + 2 * (row % 20)) for row in range(num_rows)])
        for decoder in (decoders.native, decoders.eager)
    )
    for step, spread in enumerate((0, 3, 1, 0)):  # actions in one layer, from FULL downwards, but for SKIP
        plans = [
            [ALL_ACTIONS[-1 - (row + layer) % (spread + 1) % len(ALL_ACTIONS)] for layer in range(6)]
            for row in range(num_rows)
        ]
        for row, plan in enumerate(plans):
            plan[row % 12 // 2] = Action.SKIP if row < 6 else plan[row % 12 // 2]
            plan[5] = Action.SKIP if row < 7 * step else plan[5]  # from none to all
        token_ids = [[10 * row % 200 + step] for row in range(num_rows)]
        logits, others = (
            run_rows(decoder, caches, token_ids, plans, compensation, kv_action)
            for decoder, caches in ((decoders.native, own), (decoders.eager, expected))
        )
        assert divergence(others, logits) < MAX_DIVERGENCE
    for mine, theirs in zip(own, expected, strict=True):
        assert_same_cache(mine, theirs)


@torch.inference_mode()
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_rows_run_the_experts_that_their_router_finds_the_most_probable(
    tmp_path: Path, native_library: NativeLibrary, num_rows: int
) -> None:
    """Rounding may choose another expert for a few rows."""
    folder = save_tiny_model(tmp_path, "qwen3-moe", **SIZES)
    outputs: list[Tensor] = []
    for decoder in (native_decoder(folder, native_library), load_decoder(folder, torch.bfloat16)):
        hidden = torch.randn(num_rows, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1)).bfloat16()
        batch = decoder.batch(PassKind.PREFILL, decoder.caches([num_rows]), [num_rows], [Identity()])
        outputs.append(decoder.run_layer(0, [Action.FULL] * num_rows, hidden, batch).float())
    own, expected = outputs
    is_close = (own - expected).norm(dim=1) < 0.02 * expected.norm(dim=1)
    assert is_close.float().mean() > 0.9


@torch.inference_mode()
def test_a_quantised_head_is_that_of_the_eager_decoder_row_by_row(decoders: Decoders) -> None:
    hidden = decoders.eager.embed([3, 4, 5])
    for precisions in ([Action.INT8] * 3, [Action.INT8, Action.FULL, Action.INT8]):
        logits = decoders.native.logits(hidden, precisions)
        assert logits.dtype is torch.float32
        assert divergence(decoders.eager.logits(hidden, precisions), logits) < MAX_DIVERGENCE
        rows = zip(hidden.split(1), precisions, strict=True)
        assert torch.equal(logits, torch.cat([decoders.native.logits(row, [precision]) for row, precision in rows]))


HEAD_SIZES = SIZES | {"vocab_size": 320}


def pass_with_heads(
    decoder: Decoder, action: Action, precision: Action, num_rows: int, *, wants_logits: bool = True
) -> PassResult:
    """Runs a row of each of so many sequences, with one action and this precision of the head."""
    caches = prefilled_together(decoder, [[3 + row] for row in range(num_rows)])
    batch = decoder.batch(PassKind.DECODE, caches, [1] * num_rows, [Identity()] * num_rows)
    plan = PassPlan.of([action] * decoder.num_layers, [precision] * num_rows, wants_logits=wants_logits)
    return decoder.run_pass(plan, list(range(num_rows)), batch)


@torch.inference_mode()
def test_many_rows_take_the_head_in_full_only_if_they_may_share_heads(
    tmp_path: Path, native_library: NativeLibrary
) -> None:
    folder = save_tiny_model(tmp_path, "llama", **HEAD_SIZES)
    for shares_heads, num_rows in ((True, 17), (True, 16), (False, 17)):
        decoder = native_decoder(folder, native_library, shares_heads=shares_heads)
        precisions = Action.INT8, Action.FULL
        logits = [pass_with_heads(decoder, Action.FULL, own, num_rows).logits for own in precisions]
        assert torch.equal(*logits) is (shares_heads and num_rows > 16)


@torch.inference_mode()
@pytest.mark.parametrize("wants_logits", [True, False])
def test_many_rows_take_no_rough_head_if_they_may_share_heads(
    tmp_path: Path, native_library: NativeLibrary, wants_logits: bool
) -> None:
    folder = save_tiny_model(tmp_path, "llama", **HEAD_SIZES)
    for shares_heads, num_rows in ((True, 11), (True, 10), (False, 11)):
        decoder = native_decoder(folder, native_library, shares_heads=shares_heads)
        rough, exact = (
            pass_with_heads(decoder, Action.INT4, own, num_rows, wants_logits=wants_logits).logits
            for own in (Action.INT4, Action.INT8)
        )
        is_shared = shares_heads and num_rows > 10
        if wants_logits:
            assert torch.equal(rough, exact) is is_shared
        else:
            assert (rough is None) is is_shared


@torch.inference_mode()
def test_more_rows_than_a_narrow_head_is_for_take_the_int4_head_only_if_they_may_share_heads(
    tmp_path: Path, native_library: NativeLibrary
) -> None:
    sizes = SIZES | {"vocab_size": 1024}  # more than the tokens that are computed exactly
    folder, size = save_tiny_model(tmp_path, "llama", **sizes), sizes["hidden_size"]
    narrow = torch.eye(size)[:32]
    head_map = HeadMap(narrow, narrow.T, torch.zeros(sizes["vocab_size"]))
    for shares_heads in (True, False):
        decoder = native_decoder(folder, native_library, shares_heads=shares_heads, head_map=head_map)
        logits = [pass_with_heads(decoder, Action.INT4, own, 2).logits for own in (Action.SKIP, Action.INT4)]
        assert torch.equal(*logits) is shares_heads


@torch.inference_mode()
def test_a_layer_writes_neither_into_its_input_nor_into_an_earlier_output(decoders: Decoders) -> None:
    for action in ALL_ACTIONS:
        cache = prefilled(decoders.native, [1, 2])
        hidden = decoders.native.embed([3])
        before = hidden.clone()
        batches = [decoders.native.batch(PassKind.DECODE, [cache], [1], [Identity()]) for _ in range(2)]
        output = decoders.native.run_layer(0, [action], hidden, batches[0])
        kept = output.clone()
        decoders.native.run_layer(0, [action], hidden + 1, batches[1])
        assert torch.equal(hidden, before), action
        assert torch.equal(output, kept), action
