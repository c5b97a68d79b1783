"""A row's bits are the same alone and among others, layer by layer and in one call, with any number of threads."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Compensation, Identity, PackedLowRank
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.native.library import NativeLibrary
from dash_runtime.native.model import HeadRows
from dash_runtime.passes import Limit, PassPlan, PassResult, RowPlan
from tests.runtime.native_model import MAX_DIVERGENCE, SIZES, WIDE, assert_same_cache, divergence, native_decoder
from tests.runtime.support import ALL_ACTIONS, full_plan, load_decoder, run_rows, some_affine, some_low_rank
from tests.tiny_models import save_tiny_model

BLOCK = 64
"""Positions that attention takes at once."""
Ids = Sequence[int]


@pytest.fixture(scope="module", params=["llama", "qwen2-sliding-window", "gemma3", "qwen3-moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without windows and wide, with windows in some layers, with windows in others and two rotary tables, and with
    mixtures of experts."""
    sizes = WIDE if request.param == "llama" else SIZES
    return save_tiny_model(tmp_path_factory.mktemp("rows") / request.param, request.param, **sizes)


@pytest.fixture(scope="module")
def decoder(folder: Path, native_library: NativeLibrary) -> Decoder:
    return native_decoder(folder, native_library, num_threads=1)


def prefilled(decoder: Decoder, *prompts: Ids) -> list[SequenceCache]:
    """Returns prefilled caches of one pool."""
    caches = decoder.caches([256] * len(prompts))
    for cache, prompt in zip(caches, prompts, strict=True):
        run_rows(decoder, [cache], [prompt], [full_plan(decoder)])
    return caches


def compensation_of(decoder: Decoder, kind: str) -> Compensation:
    if kind == "none":
        return Identity()
    low_rank = PackedLowRank.from_low_rank(some_low_rank(decoder, rank=16), torch.bfloat16)
    return low_rank if kind == "low rank" else some_affine(decoder)


def run_whole(
    decoder: Decoder, cache: SequenceCache, token_id: int, plan: Sequence[Action], compensation: Compensation
) -> PassResult:
    batch = decoder.batch(PassKind.DECODE, [cache], [1], [compensation], [Action.INT8])
    result = decoder.run_pass(PassPlan.of(plan, [Action.FULL]), [token_id], batch)
    batch.commit()
    return result


def verify(decoder: Decoder, caches: Sequence[SequenceCache], ids: Sequence[Ids], by_layer: bool = False) -> Tensor:
    """Returns the logits of several rows of each sequence."""
    lengths = [len(own) for own in ids]
    batch = decoder.batch(PassKind.VERIFY, caches, lengths, [Identity()] * len(caches))
    hidden = decoder.embed([token_id for own in ids for token_id in own])
    if by_layer:
        for layer in range(decoder.num_layers):
            hidden = decoder.run_layer(layer, [Action.FULL] * batch.num_rows, hidden, batch)
    else:
        whole = decoder.run_pass(PassPlan.of(full_plan(decoder)), [token_id for own in ids for token_id in own], batch)
        assert whole.states is not None
        hidden = whole.states
    batch.commit()
    return decoder.logits(hidden, [Action.FULL] * batch.num_rows, PassKind.VERIFY)


def one_by_one(decoder: Decoder, cache: SequenceCache, ids: Ids) -> Tensor:
    return torch.cat([run_rows(decoder, [cache], [[token_id]], [full_plan(decoder)]) for token_id in ids])


def some_ids(count: int, seed: int = 0) -> list[int]:
    return [(41 * place + 7 + 13 * seed) % 250 for place in range(count)]


def mixed_plan(seed: int, num_layers: int) -> list[Action]:
    generator = torch.Generator().manual_seed(seed)
    return [ALL_ACTIONS[own] for own in torch.randint(len(ALL_ACTIONS), (num_layers,), generator=generator).tolist()]


def assert_equal_caches(own: SequenceCache, other: SequenceCache) -> None:
    assert own.length == other.length
    assert torch.equal(own.memory[:, :, : own.length], other.memory[:, :, : other.length])


@pytest.mark.parametrize("kind", ["none", "affine", "low rank"])
@torch.inference_mode()
def test_any_plan_in_one_call_has_the_bits_that_it_has_layer_by_layer(decoder: Decoder, kind: str) -> None:
    compensation = compensation_of(decoder, kind)
    own, other = prefilled(decoder, some_ids(4), some_ids(4))
    for token_id in range(16):  # beyond the windows
        plan = mixed_plan(token_id, decoder.num_layers)
        run = run_whole(decoder, own, token_id, plan, compensation)
        expected = run_rows(decoder, [other], [[token_id]], [plan], compensation, kv_action=Action.INT8)
        times = run.record.layer_times(0)
        assert list(run.plans[0]) == plan
        assert torch.equal(run.logits, expected)
        assert run.token_ids == expected.argmax(-1).tolist()
        assert list(times) == sorted(times)
        assert 0 < times[0] < times[-1]
    assert_equal_caches(own, other)


@pytest.mark.parametrize("num_rows", [1, 9])
@torch.inference_mode()
def test_the_likeliest_tokens_are_the_same_where_nobody_wants_logits(decoder: Decoder, num_rows: int) -> None:
    for head in (Action.FULL, Action.INT8, Action.INT4):
        caches, ids = prefilled(decoder, *[some_ids(4, seed) for seed in range(num_rows)]), some_ids(num_rows, 5)
        batch = decoder.batch(PassKind.DECODE, caches, [1] * num_rows, [Identity()] * num_rows)
        with_logits, without = (
            decoder.run_pass(PassPlan.of(full_plan(decoder), [head] * num_rows, wants_logits=wanted), ids, batch)
            for wanted in (True, False)
        )
        assert with_logits.logits is not None
        assert without.token_ids == with_logits.token_ids == with_logits.logits.argmax(-1).tolist()
        in_full = decoder.heads[Action.FULL]
        can_do_without = head is Action.FULL and isinstance(in_full, HeadRows)
        assert (without.logits is None) is can_do_without


@torch.inference_mode()
def test_what_one_call_cannot_run_is_left_to_the_loop_over_layers(decoder: Decoder, folder: Path) -> None:
    own, other = prefilled(decoder, [1], [1])
    plan, floats = mixed_plan(1, decoder.num_layers), some_low_rank(decoder)
    result = run_whole(decoder, own, 1, plan, floats)  # the compensation's matrices are float
    assert torch.equal(result.logits, run_rows(decoder, [other], [[1]], [plan], floats, kv_action=Action.INT8))
    assert list(result.plans[0]) == plan
    eager = load_decoder(folder, torch.bfloat16)
    for one, compensation in ((decoder, floats), (eager, Identity())):
        (cache,) = prefilled(one, [1])
        batch = one.batch(PassKind.DECODE, [cache], [1], [compensation], [Action.INT8])
        assert one.run(PassPlan.of(plan, [Action.FULL]), [1], batch, Limit(count=2)) is None


@pytest.mark.parametrize("num_rows", [3, 12])  # from 8 on threads share rows
@torch.inference_mode()
def test_rows_with_plans_and_compensations_of_their_own_run_in_one_call_with_the_bits_that_each_has_alone(
    decoder: Decoder, folder: Path, native_library: NativeLibrary, num_rows: int
) -> None:
    several = native_decoder(folder, native_library, num_threads=3)
    kinds = [compensation_of(decoder, kind) for kind in ("affine", "low rank")]
    own = [kinds[row % 2] for row in range(num_rows)]
    prompts = [some_ids(1 + 11 * row, row) for row in range(num_rows)]
    alone, together = prefilled(decoder, *prompts), prefilled(several, *prompts)
    for step in range(4):
        # At first all rows alike, and at last; between them in groups.
        seeds = [step if step in (0, 3) else 100 * step + row for row in range(num_rows)]
        plans = [mixed_plan(seed, decoder.num_layers) for seed in seeds]
        token_ids = [10 * row + step for row in range(num_rows)]
        batch = several.batch(PassKind.DECODE, together, [1] * num_rows, own, [Action.INT8] * num_rows)
        rows = [RowPlan(dict(enumerate(plan))) for plan in plans]
        run = several.run_pass(PassPlan(rows, [Action.FULL] * num_rows), token_ids, batch)
        batch.commit()
        assert [list(plan) for plan in run.plans] == plans
        for row, cache in enumerate(alone):
            single = run_whole(decoder, cache, token_ids[row], plans[row], own[row])
            assert torch.equal(run.logits[row : row + 1], single.logits)
            assert run.token_ids[row : row + 1] == single.token_ids
    for cache, other in zip(alone, together, strict=True):
        assert_equal_caches(cache, other)


@pytest.mark.parametrize("action", [Action.INT3, Action.INT4, Action.INT8])
@torch.inference_mode()
def test_two_rows_of_one_draft_have_the_bits_that_each_has_alone(decoder: Decoder, action: Action) -> None:
    own, other = prefilled(decoder, some_ids(70), some_ids(70))
    plan = [action] * decoder.num_layers
    batch = decoder.batch(PassKind.VERIFY, [own], [2], [Identity()])
    together = decoder.run_pass(PassPlan.of(plan, [Action.FULL] * 2), [3, 9], batch)
    batch.commit()
    alone = [run_whole(decoder, other, token_id, plan, Identity()) for token_id in (3, 9)]
    for row, run in enumerate(alone):
        assert torch.equal(together.logits[row : row + 1], run.logits)
    assert_equal_caches(own, other)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("kind", ["none", "affine", "low rank"])
@torch.inference_mode()
def test_rows_decoded_in_a_batch_have_the_bits_that_each_has_alone(
    decoder: Decoder, folder: Path, native_library: NativeLibrary, kind: str, num_threads: int
) -> None:
    compensation, num_layers = compensation_of(decoder, kind), decoder.num_layers
    several = native_decoder(folder, native_library, num_threads=num_threads)
    prompts = [some_ids(1 + 11 * row, row) for row in range(19)]  # up to four blocks of positions
    alone, together = prefilled(decoder, *prompts), prefilled(several, *prompts)
    for step in range(5):
        token_ids = [[10 * row + step] for row in range(len(prompts))]
        plans = [mixed_plan(100 * step + row, num_layers) for row in range(len(prompts))]
        if step == 0:
            plans = [full_plan(decoder)] * len(prompts)
        elif step == 1:
            plans = [[Action.SKIP] * num_layers] * len(prompts)
        batched = run_rows(several, together, token_ids, plans, compensation, Action.INT4)
        rows = zip(alone, token_ids, plans, strict=True)
        single = [run_rows(decoder, [cache], [ids], [plan], compensation, Action.INT4) for cache, ids, plan in rows]
        assert torch.equal(batched, torch.cat(single))
    for own, other in zip(together, alone, strict=True):
        assert_equal_caches(own, other)


@pytest.mark.parametrize("action", [Action.INT3, Action.INT4, Action.INT8, Action.FULL])
@torch.inference_mode()
def test_any_number_of_rows_has_the_bits_that_each_has_alone(decoder: Decoder, action: Action) -> None:
    plan, compensation = [action] * decoder.num_layers, compensation_of(decoder, "none")
    ids = [[row] for row in range(64)]

    def run(caches: Sequence[SequenceCache], count: int) -> Tensor:
        return run_rows(decoder, caches, ids[:count], [plan] * count, compensation, action)

    prompts = [some_ids(3, row) for row in range(len(ids))]
    alone = [
        run_rows(decoder, prefilled(decoder, prompt), [own], [plan], compensation, action)
        for prompt, own in zip(prompts, ids, strict=True)
    ]
    for count in (5, 6, 8, 13, 17, 22, 39, 64):
        assert torch.equal(run(prefilled(decoder, *prompts[:count]), count), torch.cat(alone[:count])), count


@torch.inference_mode()
def test_each_skipping_row_of_a_batch_has_its_own_compensation_and_precision(decoder: Decoder) -> None:
    none, affine, low_rank = (compensation_of(decoder, kind) for kind in ("none", "affine", "low rank"))
    compensations = [none, affine, low_rank, affine, affine, some_low_rank(decoder)]
    precisions = [Action.FULL, Action.INT4, Action.INT8, Action.INT8, Action.INT4, Action.INT4]
    prompts = [some_ids(5 + row, row) for row in range(len(precisions))]
    hidden = decoder.embed(some_ids(len(precisions)))
    together, alone = (prefilled(decoder, *prompts) for _ in range(2))
    batch = decoder.batch(PassKind.DECODE, together, [1] * len(prompts), compensations, precisions)
    outputs = decoder.run_layer(1, [Action.SKIP] * len(prompts), hidden, batch)
    batch.commit()
    for row, (cache, compensation, precision) in enumerate(zip(alone, compensations, precisions, strict=True)):
        own = decoder.batch(PassKind.DECODE, [cache], [1], [compensation], [precision])
        assert torch.equal(decoder.run_layer(1, [Action.SKIP], hidden[row : row + 1], own), outputs[row : row + 1]), row
        own.commit()
        assert_equal_caches(together[row], cache)
    assert len({tuple(own.tolist()) for own in outputs}) == len(outputs)


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("num_cached", [1, 30, BLOCK - 5])
@torch.inference_mode()
def test_rows_to_verify_have_the_bits_that_each_has_decoded_alone(
    decoder: Decoder, num_cached: int, by_layer: bool
) -> None:
    prompt = some_ids(num_cached)
    together, alone = prefilled(decoder, prompt, prompt)
    for count in range(1, 18):
        ids = some_ids(count, count)
        assert torch.equal(verify(decoder, [together], [ids], by_layer), one_by_one(decoder, alone, ids)), count
        assert_equal_caches(together, alone)


@torch.inference_mode()
def test_several_rows_of_several_sequences_have_the_bits_that_each_has_alone(decoder: Decoder) -> None:
    prompts = [some_ids(count, count) for count in (3, BLOCK - 1, 2 * BLOCK - 3, 20)]
    together, alone = (prefilled(decoder, *prompts) for _ in range(2))
    for counts in ((1, 4, 7, 2), (5, 1, 1, 3), (8, 9, 17, 1)):
        ids = [some_ids(count, count) for count in counts]
        expected = [one_by_one(decoder, cache, own) for cache, own in zip(alone, ids, strict=True)]
        assert torch.equal(verify(decoder, together, ids), torch.cat(expected))
    for own, other in zip(together, alone, strict=True):
        assert_equal_caches(own, other)


@torch.inference_mode()
def test_a_row_has_the_same_bits_with_any_number_of_threads(
    decoder: Decoder, folder: Path, native_library: NativeLibrary
) -> None:
    compensation = compensation_of(decoder, "low rank")
    (other,) = prefilled(decoder, some_ids(2 * BLOCK - 2))
    for num_threads in (2, 3):
        several = native_decoder(folder, native_library, num_threads=num_threads)
        (own,) = prefilled(several, some_ids(2 * BLOCK - 2))
        other.truncate(2 * BLOCK - 2)
        for token_id in range(4):
            plan = mixed_plan(token_id, decoder.num_layers)
            logits = [
                run_rows(one, [cache], [[token_id]], [plan], compensation)
                for one, cache in ((several, own), (decoder, other))
            ]
            assert torch.equal(*logits)
        ids = some_ids(13)
        assert torch.equal(verify(several, [own], [ids]), verify(decoder, [other], [ids]))
        assert_equal_caches(own, other)


@pytest.mark.parametrize("num_cached", [BLOCK - 2, BLOCK, 3 * BLOCK - 1])
@torch.inference_mode()
def test_contexts_of_several_blocks_have_the_numbers_of_the_eager_decoder(
    decoder: Decoder, folder: Path, num_cached: int
) -> None:
    if decoder.config.mixture is not None:
        pytest.skip("rounding chooses other experts")
    eager = load_decoder(folder, torch.bfloat16)
    prompt, ids = some_ids(num_cached), some_ids(5, 3)
    (own,), (other,) = prefilled(decoder, prompt), prefilled(eager, prompt)
    for one in (verify(decoder, [own], [ids]), one_by_one(decoder, prefilled(decoder, prompt)[0], ids)):
        other.truncate(num_cached)
        assert divergence(one_by_one(eager, other, ids), one) < MAX_DIVERGENCE
    assert_same_cache(own, other)


@torch.inference_mode()
def test_an_action_that_layers_are_not_packed_for_is_an_error_that_names_it(
    folder: Path, native_library: NativeLibrary
) -> None:
    decoder = native_decoder(folder, native_library, actions=(Action.SKIP, Action.FULL))
    (cache,) = prefilled(decoder, [1])
    batch = decoder.batch(PassKind.DECODE, [cache], [1], [Identity()], [Action.FULL])
    hidden = decoder.embed([2])
    with pytest.raises(ValueError, match="INT4"):
        decoder.run_layer(0, [Action.INT4], hidden, batch)
    with pytest.raises(ValueError, match="INT8"):
        decoder.run_pass(PassPlan.of([Action.INT8] * decoder.num_layers, [Action.FULL]), [2], batch)
