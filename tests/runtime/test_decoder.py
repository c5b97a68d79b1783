"""Layers one at a time: actions, the KV rule, and rows that do not affect each other."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.decoder.backends.loop import LayerLoop
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.layers.batch import Batch, PassKind
from dash_runtime.layers.compensation import Identity, Scale
from tests.runtime.support import ALL_ACTIONS, full_plan, load_decoder, new_cache, run_rows, some_affine

pytestmark = pytest.mark.alone


def mixed_plans(decoder: Decoder, num_rows: int) -> list[list[Action]]:
    """Returns a different plan for each row, with every action in every layer."""
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
    batch = decoder.batch(PassKind.PREFILL, [new_cache(decoder)], [1], [scale])
    hidden = decoder.embed([7])
    assert torch.equal(decoder.run_layer(2, (Action.SKIP,), hidden, batch), hidden * 0.5)


@torch.inference_mode()
@pytest.mark.parametrize("num_skipped", [1, 3])
@pytest.mark.parametrize("kv_action", ALL_ACTIONS[1:])
@pytest.mark.parametrize("at_once", [True, False])
def test_keys_and_values_of_skipped_rows_are_those_of_the_layer_that_runs_in_their_precision(
    decoder: Decoder, num_skipped: int, kv_action: Action, at_once: bool
) -> None:
    token_ids = list(range(5, 6 + num_skipped))
    hidden = decoder.embed(token_ids)
    running, skipping = new_cache(decoder), new_cache(decoder)
    decoder.run_layer(
        1,
        [kv_action] * len(token_ids),
        hidden,
        decoder.batch(PassKind.PREFILL, [running], [len(token_ids)], [Identity()]),
    )
    actions = [Action.SKIP] * num_skipped + [kv_action]
    lengths = [len(token_ids)] if at_once else [1] * len(token_ids)
    for start in range(0, len(token_ids), lengths[0]):
        batch = decoder.batch(PassKind.PREFILL, [skipping], lengths[:1], [Identity()], [kv_action])
        rows = slice(start, start + lengths[0])
        decoder.run_layer(1, actions[rows], hidden[rows], batch)
        batch.commit()
    for own, expected in ((skipping.keys[1], running.keys[1]), (skipping.values[1], running.values[1])):
        assert torch.equal(own[: len(token_ids)], expected[: len(token_ids)])


@torch.inference_mode()
def test_each_row_of_a_pass_has_keys_and_values_in_its_own_precision(decoder: Decoder) -> None:
    kinds = list(ALL_ACTIONS[1:])
    together, alone = ([new_cache(decoder) for _ in kinds] for _ in range(2))
    hidden = decoder.embed([4, 5, 6, 7])
    batch = decoder.batch(PassKind.PREFILL, together, [1] * 4, [Identity()] * 4, kinds)
    decoder.run_layer(1, [Action.SKIP] * 4, hidden, batch)
    for row, kv_action in enumerate(kinds):
        batch = decoder.batch(PassKind.PREFILL, [alone[row]], [1], [Identity()], [kv_action])
        decoder.run_layer(1, [Action.SKIP], hidden[row : row + 1], batch)
    for own, expected in zip(together, alone, strict=True):
        assert torch.equal(own.keys[1], expected.keys[1])
        assert torch.equal(own.values[1], expected.values[1])
    assert len({tuple(cache.keys[1][0].flatten().tolist()) for cache in alone}) == 4


@torch.inference_mode()
def test_a_layer_never_writes_into_its_input(decoder: Decoder) -> None:
    for action in ALL_ACTIONS:
        hidden = decoder.embed([3])
        before = hidden.clone()
        decoder.run_layer(
            0, (action,), hidden, decoder.batch(PassKind.PREFILL, [new_cache(decoder)], [1], [Identity()])
        )
        assert torch.equal(hidden, before), action


@torch.inference_mode()
def test_rows_of_one_sequence_with_different_actions_equal_token_by_token(tiny_folder: Path) -> None:
    decoder = load_decoder(tiny_folder)
    token_ids = [4, 8, 15, 16, 23, 42]
    plans = mixed_plans(decoder, len(token_ids))
    cache = new_cache(decoder)
    one_by_one = [run_rows(decoder, [cache], [[t]], [plan]) for t, plan in zip(token_ids, plans, strict=True)]
    batch = decoder.batch(PassKind.PREFILL, [new_cache(decoder)], [len(token_ids)], [Identity()])
    hidden = decoder.embed(token_ids)
    for layer in range(decoder.num_layers):
        hidden = decoder.run_layer(layer, [plan[layer] for plan in plans], hidden, batch)
    together = decoder.logits(hidden, [Action.FULL] * len(token_ids))
    torch.testing.assert_close(together, torch.cat(one_by_one), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_each_row_is_compensated_by_its_own_policy(decoder: Decoder) -> None:
    halves = Scale(torch.full((decoder.num_layers,), 0.5, dtype=decoder.dtype))
    batch = decoder.batch(PassKind.PREFILL, [new_cache(decoder), new_cache(decoder)], [1, 1], [halves, Identity()])
    hidden = decoder.embed([7, 9])
    outputs = decoder.run_layer(2, (Action.SKIP, Action.SKIP), hidden, batch)
    assert torch.equal(outputs, torch.stack((hidden[0] * 0.5, hidden[1])))


class NamedBackend(LayerLoop):
    """Notes its name when it runs. Takes all passes, or only those of one sequence."""

    def __init__(self, name: str, journal: list[str], takes_all: bool = True) -> None:
        self._name, self._journal, self._takes_all = name, journal, takes_all

    def takes(self, batch: Batch) -> bool:
        return self._takes_all or len(batch.spans) == 1

    def run_layer(self, layer: int, actions: Sequence[Action], hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        self._journal.append(self._name)
        return hidden

    def logits(self, hidden: torch.Tensor, precisions: Sequence[Action]) -> torch.Tensor:
        self._journal.append(f"{self._name} logits")
        return hidden


def test_a_pass_is_run_by_the_first_backend_of_its_kind_that_takes_it(decoder: Decoder) -> None:
    """Above all, a prompt's lone last row is not run as decoding: it must have the same bits as in a longer pass."""
    journal: list[str] = []
    single, every = NamedBackend("single", journal, takes_all=False), NamedBackend("every", journal)
    other = NamedBackend("prefill", journal)
    backends = {PassKind.PREFILL: [other], PassKind.DECODE: [single, every], PassKind.VERIFY: [single, every]}
    named = Decoder(
        decoder.config, ALL_ACTIONS, backends, decoder.embed, decoder.heads,
        dtype=decoder.dtype, devices=decoder.devices, context_length=64, max_prompt_rows=64,
    )  # fmt: skip
    caches = named.caches([8, 8])
    for cache in caches:
        named.batch(PassKind.PREFILL, [cache], [2], [Identity()]).commit()
    hidden = named.embed([1])
    for kind in PassKind:
        for some in (caches[:1], caches):
            batch = named.batch(kind, some, [1] * len(some), [Identity()] * len(some))
            named.run_layer(0, [Action.FULL], hidden, batch)
    named.logits(hidden, [Action.FULL])
    assert journal == ["prefill", "prefill", "single", "every", "single", "every", "single logits"]
