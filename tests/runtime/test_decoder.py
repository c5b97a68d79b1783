"""One layer at a time: actions, the KV rule, and rows that do not touch each other."""

from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.decoder.compensation import Identity, Scale
from dash_runtime.decoder.decoder import Decoder
from tests.runtime.support import ALL_ACTIONS, full_plan, load_decoder, new_cache, run_rows, some_affine


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> Decoder:
    return load_decoder(tiny_folder, torch.bfloat16)


def mixed_plans(decoder: Decoder, num_rows: int) -> list[list[Action]]:
    """A different plan for each row, with every action in every layer."""
    return [
        [ALL_ACTIONS[(row + layer) % len(ALL_ACTIONS)] for layer in range(decoder.num_layers)]
        for row in range(num_rows)
    ]


@torch.inference_mode()
def test_batched_decode_is_bit_equal_to_one_by_one_for_mixed_plans_and_lengths(decoder: Decoder) -> None:
    affine = some_affine(decoder)
    prompts = [list(range(1, 3 + 7 * row)) for row in range(9)]
    plans = mixed_plans(decoder, len(prompts))
    alone, together = ([new_cache(decoder) for _ in prompts] for _ in range(2))
    for caches in (alone, together):
        for cache, prompt in zip(caches, prompts, strict=True):
            run_rows(decoder, [cache], [prompt], [full_plan(decoder)])
    for step in range(5):
        token_ids = [[10 * row + step] for row in range(len(prompts))]
        batched = run_rows(decoder, together, token_ids, plans, affine)
        single = [
            run_rows(decoder, [cache], [ids], [plan], affine)
            for cache, ids, plan in zip(alone, token_ids, plans, strict=True)
        ]
        assert torch.equal(batched, torch.cat(single))


@torch.inference_mode()
def test_a_skipped_layer_passes_on_the_compensated_input_and_nothing_else(decoder: Decoder) -> None:
    scale = Scale(torch.full((decoder.num_layers,), 0.5, dtype=decoder.dtype))
    batch = decoder.rows([new_cache(decoder)], [1], [scale])
    hidden = decoder.embed([7])
    assert torch.equal(decoder.run_layer(2, (Action.SKIP,), hidden, batch), hidden * 0.5)


@torch.inference_mode()
@pytest.mark.parametrize("skipped_rows", [1, 3])
def test_a_skipped_layer_writes_the_keys_and_values_that_the_full_layer_would(
    decoder: Decoder, skipped_rows: int
) -> None:
    hidden = decoder.embed([5, 6, 7])
    full, skipping = new_cache(decoder), new_cache(decoder)
    actions = [Action.SKIP] * skipped_rows + [Action.FULL] * (3 - skipped_rows)
    decoder.run_layer(1, [Action.FULL] * 3, hidden, decoder.rows([full], [3], [Identity()]))
    decoder.run_layer(1, actions, hidden, decoder.rows([skipping], [3], [Identity()]))
    assert torch.equal(full.keys[1][:, :, :3], skipping.keys[1][:, :, :3])
    assert torch.equal(full.values[1][:, :, :3], skipping.values[1][:, :, :3])


@torch.inference_mode()
def test_a_layer_never_writes_into_its_input(decoder: Decoder) -> None:
    for action in ALL_ACTIONS:
        hidden = decoder.embed([3])
        before = hidden.clone()
        decoder.run_layer(0, (action,), hidden, decoder.rows([new_cache(decoder)], [1], [Identity()]))
        assert torch.equal(hidden, before), action


@torch.inference_mode()
def test_rows_of_one_sequence_with_different_actions_equal_token_by_token(tiny_folder: Path) -> None:
    decoder = load_decoder(tiny_folder)
    token_ids = [4, 8, 15, 16, 23, 42]
    plans = mixed_plans(decoder, len(token_ids))
    cache = new_cache(decoder)
    one_by_one = [run_rows(decoder, [cache], [[t]], [plan]) for t, plan in zip(token_ids, plans, strict=True)]
    batch = decoder.rows([new_cache(decoder)], [len(token_ids)], [Identity()])
    hidden = decoder.embed(token_ids)
    for layer in range(decoder.num_layers):
        hidden = decoder.run_layer(layer, [plan[layer] for plan in plans], hidden, batch)
    together = decoder.logits(hidden, [Action.FULL] * len(token_ids))
    torch.testing.assert_close(together, torch.cat(one_by_one), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_each_row_is_compensated_by_its_own_policy(decoder: Decoder) -> None:
    halves = Scale(torch.full((decoder.num_layers,), 0.5, dtype=decoder.dtype))
    batch = decoder.rows([new_cache(decoder), new_cache(decoder)], [1, 1], [halves, Identity()])
    hidden = decoder.embed([7, 9])
    outputs = decoder.run_layer(2, (Action.SKIP, Action.SKIP), hidden, batch)
    assert torch.equal(outputs, torch.stack((hidden[0] * 0.5, hidden[1])))
