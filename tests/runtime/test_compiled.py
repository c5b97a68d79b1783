"""Decoding with programs gives the same numbers and caches as eager decoding, and rows do not affect each other.

Every property is tested with the programs' modules run uncompiled, for several families, and once with the programs
that matter compiled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.decoder.backends.inductor import InductorBackend
from dash_runtime.decoder.backends.needed_programs import program_specs, skip_specs
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.loading import make_decoder
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Affine, Compensation, Identity, LowRank, PackedLowRank, Scale
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.model_config import ModelConfig
from dash_runtime.startup.row_parity import unequal_counts
from tests.runtime.compiled_model import NUM_THREADS, SIZES, CompiledModel, UncompiledProgram
from tests.runtime.support import (
    ALL_ACTIONS,
    CPU,
    full_plan,
    load_decoder,
    new_cache,
    run_rows,
    some_affine,
    some_low_rank,
)
from tests.tiny_models import save_tiny_model

MAX_DIVERGENCE = 0.01
"""Nats. Rounding to bf16 at other places makes a tenth of this, plans in another order a hundred times as much."""
Plan = Sequence[Action]


@dataclass(frozen=True)
class Decoders:
    """One model three times: as programs with each row alone, as programs with shared products, and eagerly."""

    alone: Decoder
    shared: Decoder
    eager: Decoder
    is_compiled: bool
    """True if the programs are compiled, False if their modules run eagerly."""


def decoder_of(folder: Path, config: ModelConfig, backend: InductorBackend) -> Decoder:
    return make_decoder(
        config,
        open_weights(folder),
        ALL_ACTIONS,
        dtype=torch.bfloat16,
        device=CPU,
        context_length=config.context_length,
        inductor=backend,
    )


FAMILIES = ("llama", "qwen2", "mistral-sliding-window", "olmo2", "gemma3")
"""Each has something of its own, all that the traced layer knows together; `test_layer_body.py` has every family."""


@pytest.fixture(scope="module", params=[*FAMILIES, pytest.param("compiled", marks=pytest.mark.alone)])
def decoders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoders:
    is_compiled = request.param == "compiled"
    if is_compiled:
        model: CompiledModel = request.getfixturevalue("compiled_model")
        folder, programs = model.folder, model.programs
        config = load_model_config(folder)
    else:
        folder = save_tiny_model(tmp_path_factory.mktemp("compiled") / request.param, request.param, **SIZES)
        config = load_model_config(folder)
        specs = [*program_specs(config, ALL_ACTIONS, NUM_THREADS), *skip_specs(config, Action.INT8, 16, NUM_THREADS)]
        programs = {spec: UncompiledProgram(spec) for spec in specs}
    backends = [InductorBackend(config, programs, shares_products=shares) for shares in (False, True)]
    alone, shared = (decoder_of(folder, config, backend) for backend in backends)
    if is_compiled:  # as a start does on the machine at hand
        backends[0].drop_verified_rows(unequal_counts(alone, backends[0].verified_rows))
    return Decoders(alone, shared, load_decoder(folder, torch.bfloat16), is_compiled)


def divergence(expected: Tensor, logits: Tensor) -> float:
    """Returns the largest of the rows' KL divergences, in nats."""
    targets, own = expected.log_softmax(-1), logits.log_softmax(-1)
    return float((targets.exp() * (targets - own)).sum(-1).max())


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


def assert_same_cache(own: SequenceCache, expected: SequenceCache) -> None:
    """Asserts that keys and values agree within bf16's rounding."""
    assert own.length == expected.length
    for mine, theirs in ((own.keys, expected.keys), (own.values, expected.values)):
        for my_layer, their_layer in zip(mine, theirs, strict=True):
            written, others = my_layer[: own.length], their_layer[: own.length]
            torch.testing.assert_close(written, others, rtol=0.05, atol=0.05 * float(others.abs().amax()))


@torch.inference_mode()
def test_tokens_are_those_of_the_eager_decoder_for_mixed_plans_and_long_skips(decoders: Decoders) -> None:
    plans = mixed_plans(decoders, 21)
    affine = some_affine(decoders.eager)
    own, expected = (prefilled(decoder, range(1, 12)) for decoder in (decoders.alone, decoders.eager))
    logits = decode(decoders.alone, own, plans, affine)
    assert divergence(decode(decoders.eager, expected, plans, affine), logits) < MAX_DIVERGENCE
    assert_same_cache(own, expected)


@torch.inference_mode()
@pytest.mark.parametrize("first", range(3))
def test_the_tokens_after_a_prompt_of_one_are_those_of_the_eager_decoder(decoders: Decoders, first: int) -> None:
    plans = [(action,) * decoders.eager.num_layers for action in ALL_ACTIONS]
    plans = [*plans[first:], *plans[:first], full_plan(decoders.eager)]
    own, expected = (prefilled(decoder, [7]) for decoder in (decoders.alone, decoders.eager))
    assert divergence(decode(decoders.eager, expected, plans), decode(decoders.alone, own, plans)) < MAX_DIVERGENCE
    assert_same_cache(own, expected)


@torch.inference_mode()
def test_passes_of_several_rows_and_of_one_take_turns_on_a_cache_that_is_cut_between(decoders: Decoders) -> None:
    plans = mixed_plans(decoders, 7)[:-1]
    results: list[tuple[Tensor, SequenceCache]] = []
    for decoder in (decoders.eager, decoders.alone):
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
    skipping, running = (prefilled(decoders.alone, [1, 2, 3]) for _ in range(2))
    for number in range(3):
        hidden = decoders.alone.embed([5 + number])
        for cache, action in ((skipping, Action.SKIP), (running, kv_action)):
            batch = decoders.alone.batch(PassKind.DECODE, [cache], [1], [Identity()], [kv_action])
            decoders.alone.run_layer(1, [action], hidden, batch)
            batch.commit()
    for own_rows, expected in ((skipping.keys[1], running.keys[1]), (skipping.values[1], running.values[1])):
        torch.testing.assert_close(own_rows, expected, rtol=0.01, atol=0.01)
        assert all(float(row.abs().max()) > 0 for row in own_rows[: skipping.length])


@torch.inference_mode()
@pytest.mark.parametrize("kind", [Identity, Scale, Affine, PackedLowRank, LowRank])
def test_a_skipped_row_passes_on_what_its_compensation_makes_of_the_layers_input(
    decoders: Decoders, kind: type[Compensation]
) -> None:
    """The low-rank map in INT8 has a program here; the float one runs eagerly beside the program that has none."""
    affine, low_rank = some_affine(decoders.alone), some_low_rank(decoders.alone, rank=16)
    packed = PackedLowRank.from_low_rank(low_rank, torch.bfloat16)
    some = [Identity(), Scale(affine.factors[:, 0]), affine, packed, low_rank]
    (compensation,) = (own for own in some if type(own) is kind)
    hidden = decoders.alone.embed([9])
    for layer in (0, 3):
        cache = prefilled(decoders.alone, [1, 2, 3])
        batch = decoders.alone.batch(PassKind.DECODE, [cache], [1], [compensation], [Action.INT8])
        own = decoders.alone.run_layer(layer, [Action.SKIP], hidden, batch)
        expected = compensation(layer, hidden)
        torch.testing.assert_close(own, expected, rtol=0.02, atol=0.02 * float(expected.abs().amax()))
        assert not torch.equal(own, hidden) or kind is Identity


@torch.inference_mode()
def test_a_layer_attends_to_its_window_and_to_nothing_before(decoders: Decoders) -> None:
    hidden = decoders.alone.embed([9])
    for layer, window in enumerate(decoders.alone.config.sliding_window):
        outputs: list[Tensor] = []
        for num_changed in (0, 12 - (window or 12) + 1, 12 - (window or 12) + 2):  # the row itself is in the window
            cache = prefilled(decoders.alone, range(12))
            cache.keys[layer][:num_changed] += 1
            cache.values[layer][:num_changed] += 1
            batch = decoders.alone.batch(PassKind.DECODE, [cache], [1], [Identity()])
            outputs.append(decoders.alone.run_layer(layer, [Action.FULL], hidden, batch))
        assert torch.equal(outputs[0], outputs[1]) is (window is not None)
        assert not torch.equal(outputs[0], outputs[2])


@torch.inference_mode()
def test_rows_decoded_in_a_batch_are_bit_equal_to_the_same_rows_alone(decoders: Decoders) -> None:
    decoder, actions = decoders.alone, ALL_ACTIONS
    affine = some_affine(decoder)
    prompts = [range(1, 2 + 7 * row) for row in range(9)]
    alone, together = ([prefilled(decoder, prompt) for prompt in prompts] for _ in range(2))
    for step in range(6):
        token_ids = [[10 * row + step] for row in range(len(prompts))]
        plans = [
            [Action.SKIP if layer == row else actions[(row + layer + step) % len(actions)] for layer in range(6)]
            for row in range(len(prompts))
        ]
        batched = run_rows(decoder, together, token_ids, plans, affine)
        rows = zip(alone, token_ids, plans, strict=True)
        single = [run_rows(decoder, [cache], [ids], [plan], affine) for cache, ids, plan in rows]
        assert torch.equal(batched, torch.cat(single))
    for own, expected in zip(together, alone, strict=True):
        assert torch.equal(torch.stack(own.keys)[:, : own.length], torch.stack(expected.keys)[:, : own.length])


@torch.inference_mode()
@pytest.mark.parametrize(("rank", "kv_action"), [(0, Action.INT4), (16, Action.INT8), (0, Action.FULL)])
def test_rows_that_share_products_are_those_of_the_eager_decoder(
    decoders: Decoders, rank: int, kv_action: Action
) -> None:
    """Rows that skip share a call too: there is a program for the first two compensations, and none for the last."""
    num_rows = 5
    low_rank = PackedLowRank.from_low_rank(some_low_rank(decoders.shared, max(rank, 16)), torch.bfloat16)
    compensation = low_rank if rank else some_affine(decoders.shared)
    own, expected = (
        prefilled_together(decoder, [range(1, 2 + 5 * row) for row in range(num_rows)])
        for decoder in (decoders.shared, decoders.eager)
    )
    for step, spread in enumerate((0, 3, 1, 1, 2, 0)):  # actions in one layer, from FULL downwards, but for SKIP
        plans = [
            [ALL_ACTIONS[-1 - (row + layer) % (spread + 1) % len(ALL_ACTIONS)] for layer in range(6)]
            for row in range(num_rows)
        ]
        for row, plan in enumerate(plans):
            plan[row] = Action.SKIP
            plan[5] = Action.SKIP if row <= step else plan[5]  # from one row to all
        token_ids = [[10 * row + step] for row in range(num_rows)]
        logits, others = (
            run_rows(decoder, caches, token_ids, plans, compensation, kv_action)
            for decoder, caches in ((decoders.shared, own), (decoders.eager, expected))
        )
        assert divergence(others, logits) < MAX_DIVERGENCE
    for mine, theirs in zip(own, expected, strict=True):
        assert_same_cache(mine, theirs)


@torch.inference_mode()
def test_a_quantised_head_is_that_of_the_eager_decoder_row_by_row(decoders: Decoders) -> None:
    hidden = decoders.eager.embed([3, 4, 5])
    for precisions in ([Action.INT8] * 3, [Action.INT8, Action.FULL, Action.INT8]):
        logits = decoders.alone.logits(hidden, precisions)
        assert logits.dtype is torch.float32
        assert divergence(decoders.eager.logits(hidden, precisions), logits) < MAX_DIVERGENCE
        rows = zip(hidden.split(1), precisions, strict=True)
        assert torch.equal(logits, torch.cat([decoders.alone.logits(row, [precision]) for row, precision in rows]))


@torch.inference_mode()
def test_a_layer_writes_neither_into_its_input_nor_into_an_earlier_output(decoders: Decoders) -> None:
    for action in ALL_ACTIONS:
        cache = prefilled(decoders.alone, [1, 2])
        hidden = decoders.alone.embed([3])
        before = hidden.clone()
        batches = [decoders.alone.batch(PassKind.DECODE, [cache], [1], [Identity()]) for _ in range(2)]
        output = decoders.alone.run_layer(0, [action], hidden, batches[0])
        kept = output.clone()
        decoders.alone.run_layer(0, [action], hidden + 1, batches[1])
        assert torch.equal(hidden, before), action
        assert torch.equal(output, kept), action


@torch.inference_mode()
@pytest.mark.parametrize("num_rows", [2, 4, 7, 13])
def test_several_rows_of_a_sequence_have_the_numbers_that_each_has_decoded_alone(
    decoders: Decoders, num_rows: int
) -> None:
    decoder = decoders.alone
    tokens = [(41 * step + 7) % 250 for step in range(num_rows)]
    together, one_by_one = (prefilled(decoder, range(30)) for _ in range(2))
    batch = decoder.batch(PassKind.VERIFY, [together], [num_rows], [Identity()])
    hidden = decoder.embed(tokens)
    for layer in range(decoder.num_layers):
        hidden = decoder.run_layer(layer, (Action.FULL,) * num_rows, hidden, batch)
    batch.commit()
    logits = decoder.logits(hidden, (Action.FULL,) * num_rows)
    expected = torch.cat([run_rows(decoder, [one_by_one], [[token]], [full_plan(decoder)]) for token in tokens])
    if decoders.is_compiled:
        assert torch.equal(logits, expected)
        assert all(map(torch.equal, together.keys, one_by_one.keys))
        assert all(map(torch.equal, together.values, one_by_one.values))
    assert divergence(expected, logits) < MAX_DIVERGENCE
    assert_same_cache(together, one_by_one)
