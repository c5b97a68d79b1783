"""The dense pass: serving's own numbers, and gradients that reach what is trained and nothing else."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.errors import ConfigError
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Affine, Compensation
from dash_runtime.training.dense_decoder import DenseDecoder, token_batch
from dash_runtime.training.distill import path_divergence
from dash_runtime.training.loss import row_divergences
from tests.runtime.support import load_decoder, new_cache, some_affine
from tests.tiny_models import FAMILIES, VOCAB_SIZE, save_tiny_model

BATCH, LENGTH, PROMPT = 2, 20, 4


def load_dense_decoder(
    folder: Path, dtype: torch.dtype = torch.float32, actions: tuple[Action, ...] = ()
) -> DenseDecoder:
    return DenseDecoder(load_model_config(folder), open_weights(folder), actions, dtype=dtype)


def some_tokens(batch: int = BATCH, length: int = LENGTH, seed: int = 5) -> Tensor:
    return torch.randint(VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


def some_actions(num_layers: int, choices: tuple[Action, ...]) -> Tensor:
    """`[num_layers, batch, decided]`: any of `choices`, but only the last in layer 0 and only the first in layer 3."""
    shape = (num_layers, BATCH, LENGTH - PROMPT)
    numbers = torch.tensor([int(action) for action in choices])
    actions = numbers[torch.randint(len(choices), shape, generator=torch.Generator().manual_seed(6))]
    actions[0], actions[3] = numbers[-1], numbers[0]
    return actions


@torch.no_grad()
def serve(decoder: Decoder, token_ids: Tensor, actions: Tensor, compensation: Compensation) -> Tensor:
    """The serving decoder's last hidden states after the prompts, `[batch, decided, hidden_size]`."""
    caches = [new_cache(decoder) for _ in token_ids]
    rows = decoder.batch(PassKind.PREFILL, caches, [token_ids.shape[1]] * len(caches), [compensation] * len(caches))
    hidden = decoder.embed(token_ids.flatten().tolist())
    prompts = torch.full((BATCH, PROMPT), int(Action.FULL))
    for layer, own in enumerate(actions):
        numbers = torch.cat((prompts, own), dim=1).flatten().tolist()
        hidden = decoder.run_layer(layer, [Action(number) for number in numbers], hidden, rows)
    return hidden.view(*token_ids.shape, -1)[:, PROMPT:]


def dense(decoder: DenseDecoder, token_ids: Tensor, actions: Tensor, compensation: Compensation) -> Tensor:
    text = decoder.text(token_ids, PROMPT)
    hidden = decoder.embed(text.token_ids)
    for layer, own in enumerate(actions):
        hidden, _, _ = decoder.run_layer(layer, own, hidden, text, compensation)
    return hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_as_the_serving_decoder_does_in_full_and_with_skips(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / family, family)
    serving = load_decoder(folder, actions=(Action.SKIP, Action.FULL))
    decoder, token_ids, compensation = load_dense_decoder(folder), some_tokens(), some_affine(serving)
    full = torch.full((decoder.num_layers, BATCH, LENGTH - PROMPT), int(Action.FULL))
    expected = serve(serving, token_ids, full, compensation)
    torch.testing.assert_close(dense(decoder, token_ids, full, compensation), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decoder.text(token_ids, PROMPT).full, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decoder.full_states(token_ids)[-1][:, PROMPT:], expected, atol=1e-4, rtol=1e-4)
    rows = expected.flatten(0, 1)
    full_logits = serving.logits(rows, (Action.FULL,) * len(rows))
    torch.testing.assert_close(decoder.logits(rows), full_logits, atol=1e-4, rtol=1e-4)
    actions = some_actions(decoder.num_layers, (Action.SKIP, Action.FULL))
    expected = serve(serving, token_ids, actions, compensation)
    torch.testing.assert_close(dense(decoder, token_ids, actions, compensation), expected, atol=1e-4, rtol=1e-4)


def test_rounded_matrices_do_what_the_kernels_do(tiny_folder: Path) -> None:
    kernels = (Action.INT4, Action.INT8, Action.FULL)
    serving = load_decoder(tiny_folder)
    decoder = load_dense_decoder(tiny_folder, actions=kernels)
    token_ids, actions = some_tokens(), some_actions(decoder.num_layers, kernels)
    compensation = some_affine(serving)
    expected = serve(serving, token_ids, actions, compensation)
    ours = dense(decoder, token_ids, actions, compensation)
    full = decoder.text(token_ids, PROMPT).full
    # Kernels round their inputs or sums; that is little beside what the rounded weights change.
    assert (ours - expected).norm() < 0.2 * (ours - full).norm()


def test_a_frozen_context_that_is_the_rows_own_changes_nothing(tiny_folder: Path) -> None:
    decoder = load_dense_decoder(tiny_folder)
    text = decoder.text(some_tokens(), PROMPT)
    hidden = torch.randn(BATCH, LENGTH - PROMPT, decoder.config.hidden_size)
    free, keys, values = decoder.run_layer(1, Action.FULL, hidden, text)
    frozen, _, _ = decoder.run_layer(1, Action.FULL, hidden, text, frozen=(keys, values))
    torch.testing.assert_close(frozen, free, atol=1e-5, rtol=1e-5)


def test_gradients_reach_compensation_only_and_match_finite_differences(tiny_folder: Path) -> None:
    config, stored = load_model_config(tiny_folder), open_weights(tiny_folder)
    weights = {name: stored[name].double().requires_grad_() for name in stored}
    decoder = DenseDecoder(config, weights, dtype=torch.float64)
    affine = some_affine(load_decoder(tiny_folder))
    text = decoder.text(some_tokens(), PROMPT)
    actions = some_actions(decoder.num_layers, (Action.SKIP, Action.FULL))

    def loss(factors: Tensor) -> Tensor:
        return path_divergence(decoder, text, actions, Affine(factors, affine.offsets.double())).mean()

    factors = affine.factors.double().requires_grad_()
    (slope,) = torch.autograd.grad(loss(factors), factors)
    direction = torch.randn(slope.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = 1e-4
    with torch.no_grad():
        ends = [float(loss(factors + sign * step * direction)) for sign in (1, -1)]
    assert float((slope * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-2)
    assert all(weight.grad is None for weight in weights.values())


def test_row_divergences_and_their_slopes_are_those_of_all_logits_at_once(tiny_folder: Path) -> None:
    decoder = load_dense_decoder(tiny_folder)
    generator = torch.Generator().manual_seed(2)
    shape = (300, decoder.config.hidden_size)  # more rows than are handled at a time, and not a multiple
    full, ours = (torch.randn(shape, generator=generator) for _ in range(2))
    ours.requires_grad_()
    weights = torch.rand(300, generator=generator)
    reference, adaptive = (torch.log_softmax(decoder.logits(hidden), dim=-1) for hidden in (full, ours))
    expected = (reference.exp() * (reference - adaptive)).sum(-1)
    (expected_slope,) = torch.autograd.grad((expected * weights).sum(), ours)
    divergences = row_divergences(decoder, full, ours)
    (slope,) = torch.autograd.grad((divergences * weights).sum(), ours)
    torch.testing.assert_close(divergences, expected)
    torch.testing.assert_close(slope, expected_slope)
    assert float(row_divergences(decoder, full, full).abs().max()) < 1e-5
    assert not row_divergences(decoder, full, ours.detach()).requires_grad


def test_sequences_that_make_no_batch_are_refused() -> None:
    assert token_batch([[1, 2, 3], [4, 5, 6]], 2).shape == (2, 3)
    with pytest.raises(ConfigError, match="one length"):
        token_batch([[1, 2, 3], [4, 5]], 1)
    with pytest.raises(ConfigError, match="one length"):
        token_batch([], 1)
    with pytest.raises(ConfigError, match="num_prompt_tokens"):
        token_batch([[1, 2, 3]], 3)
