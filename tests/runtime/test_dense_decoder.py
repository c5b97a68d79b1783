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
from dash_runtime.training.loss import divergences, judge
from dash_runtime.training.paths import decided_rows
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
    caches = [new_cache(decoder, token_ids.shape[1]) for _ in token_ids]
    rows = decoder.batch(PassKind.PREFILL, caches, [token_ids.shape[1]] * len(caches), [compensation] * len(caches))
    hidden = decoder.embed(token_ids.flatten().tolist())
    prompts = torch.full((BATCH, PROMPT), int(Action.FULL))
    for layer, own in enumerate(actions):
        numbers = torch.cat((prompts, own), dim=1).flatten().tolist()
        hidden = decoder.run_layer(layer, [Action(number) for number in numbers], hidden, rows)
    return hidden.view(*token_ids.shape, -1)[:, PROMPT:]


def dense(decoder: DenseDecoder, token_ids: Tensor, actions: Tensor, compensation: Compensation) -> Tensor:
    """The dense decoder's last hidden states after the prompts, `[batch, decided, hidden_size]`."""
    hidden = decoder.embed(token_ids)
    prompts = torch.full((BATCH, PROMPT), int(Action.FULL))
    for layer, own in enumerate(actions):
        hidden = decoder.run_layer(layer, torch.cat((prompts, own), dim=1), hidden, compensation)
    return hidden[:, PROMPT:]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_as_the_serving_decoder_does_in_full_and_with_skips(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / family, family)
    serving = load_decoder(folder, actions=(Action.SKIP, Action.FULL))
    decoder, token_ids, compensation = load_dense_decoder(folder), some_tokens(), some_affine(serving)
    full = torch.full((decoder.num_layers, BATCH, LENGTH - PROMPT), int(Action.FULL))
    expected = serve(serving, token_ids, full, compensation)
    torch.testing.assert_close(dense(decoder, token_ids, full, compensation), expected, atol=1e-4, rtol=1e-4)
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
    full = decoder.full_states(token_ids)[-1][:, PROMPT:]
    # Kernels round their inputs or sums; that is little beside what the rounded weights change.
    assert (ours - expected).norm() < 0.2 * (ours - full).norm()


def test_gradients_reach_compensation_only_and_match_finite_differences(tiny_folder: Path) -> None:
    config, stored = load_model_config(tiny_folder), open_weights(tiny_folder)
    weights = {name: stored[name].double().requires_grad_() for name in stored}
    decoder = DenseDecoder(config, weights, dtype=torch.float64)
    affine = some_affine(load_decoder(tiny_folder))
    token_ids, actions = some_tokens(), some_actions(decoder.num_layers, (Action.SKIP, Action.FULL))
    full = decided_rows(decoder.full_states(token_ids)[-1], PROMPT)

    def last(factors: Tensor) -> Tensor:
        return dense(decoder, token_ids, actions, Affine(factors, affine.offsets.double())).flatten(0, 1)

    factors = affine.factors.double().requires_grad_()
    states = last(factors)
    judged = judge(decoder, full, states, torch.Generator())
    (slope,) = torch.autograd.grad(states, factors, judged.slope)
    direction = torch.randn(slope.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = 1e-4
    with torch.no_grad():
        moved = [last(factors + sign * step * direction) for sign in (1, -1)]
        ends = [float(divergences(decoder, full, own).double().sum()) for own in moved]
    assert float((slope * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-2)
    assert all(weight.grad is None for weight in weights.values())


def test_divergences_and_their_slopes_are_those_of_all_logits_at_once(tiny_folder: Path) -> None:
    decoder = load_dense_decoder(tiny_folder)
    generator = torch.Generator().manual_seed(2)
    shape = (300, decoder.config.hidden_size)  # more rows than are handled at a time, and not a multiple
    full, ours = (torch.randn(shape, generator=generator) for _ in range(2))
    ours.requires_grad_()
    reference, adaptive = (torch.log_softmax(decoder.logits(hidden), dim=-1) for hidden in (full, ours))
    expected = (reference.exp() * (reference - adaptive)).sum(-1)
    (expected_slope,) = torch.autograd.grad(expected.sum(), ours)
    judged = judge(decoder, full, ours, generator)
    torch.testing.assert_close(judged.divergence, expected.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(judged.slope, expected_slope, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(divergences(decoder, full, ours), expected.detach(), atol=1e-5, rtol=1e-4)
    assert float(divergences(decoder, full, full).abs().max()) < 1e-5


def test_drawn_curvature_is_that_of_the_divergence(tiny_folder: Path) -> None:
    decoder = load_dense_decoder(tiny_folder)
    ours = torch.randn(1, decoder.config.hidden_size, generator=torch.Generator().manual_seed(3))
    jacobian = torch.autograd.functional.jacobian(lambda hidden: decoder.logits(hidden)[0], ours)[:, 0]
    own = torch.softmax(decoder.logits(ours)[0], dim=-1)
    expected = jacobian.T @ (own.diag() - torch.outer(own, own)) @ jacobian
    many = ours.expand(16_000, -1)
    drawn = judge(decoder, many, many, torch.Generator().manual_seed(4)).curvature
    assert (drawn.T @ drawn / len(drawn) - expected).norm() < 0.1 * expected.norm()


def test_sequences_that_make_no_batch_are_refused() -> None:
    assert token_batch([[1, 2, 3], [4, 5, 6]], 2).shape == (2, 3)
    with pytest.raises(ConfigError, match="one length"):
        token_batch([[1, 2, 3], [4, 5]], 1)
    with pytest.raises(ConfigError, match="one length"):
        token_batch([], 1)
    with pytest.raises(ConfigError, match="num_prompt_tokens"):
        token_batch([[1, 2, 3]], 3)
