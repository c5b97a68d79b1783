"""The differentiable pass: serving's own numbers, and gradients that reach what is trained and nothing else."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.errors import ConfigError
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Affine, Compensation, Identity
from dash_runtime.training.differentiable_decoder import (
    DifferentiableDecoder,
    all_full,
    fixed_gates,
    keep_prompts,
    pass_on,
    row_divergences,
    token_batch,
)
from tests.runtime.support import load_decoder, new_cache, some_affine
from tests.tiny_models import FAMILIES, VOCAB_SIZE, save_tiny_model

BATCH, LENGTH = 2, 20


def load_gradient_decoder(
    folder: Path, dtype: torch.dtype = torch.float32, recomputes_layers: bool = False
) -> DifferentiableDecoder:
    return DifferentiableDecoder(
        load_model_config(folder), open_weights(folder), dtype=dtype, recomputes_layers=recomputes_layers
    )


def some_tokens(batch: int = BATCH, length: int = LENGTH, seed: int = 5) -> Tensor:
    return torch.randint(VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


def some_skips(decoder: DifferentiableDecoder, batch: int = BATCH, length: int = LENGTH) -> Tensor:
    """bool `[num_layers, batch, length]`: a third of all, but none in layer 0 and all in layer 3."""
    shape = (decoder.num_layers, batch, length)
    skips = torch.rand(shape, generator=torch.Generator().manual_seed(6)) < 1 / 3
    skips[0], skips[3] = False, True
    return skips


@torch.no_grad()
def serve(decoder: Decoder, token_ids: Tensor, skips: Tensor, compensation: Compensation) -> Tensor:
    """The serving decoder's last hidden states for the same tokens, `[batch, length, hidden_size]`."""
    caches = [new_cache(decoder) for _ in token_ids]
    rows = decoder.batch(PassKind.PREFILL, caches, [token_ids.shape[1]] * len(caches), [compensation] * len(caches))
    hidden = decoder.embed(token_ids.flatten().tolist())
    for layer in range(decoder.num_layers):
        actions = [Action.SKIP if skip else Action.FULL for skip in skips[layer].flatten().tolist()]
        hidden = decoder.run_layer(layer, actions, hidden, rows)
    return hidden.view(*token_ids.shape, -1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_runs_as_the_serving_decoder_does_in_full_and_with_skips(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / family, family)
    serving = load_decoder(folder, actions=(Action.SKIP, Action.FULL))
    decoder = load_gradient_decoder(folder)
    token_ids, compensation = some_tokens(), some_affine(serving)
    nowhere = torch.zeros(decoder.num_layers, BATCH, LENGTH, dtype=torch.bool)
    expected = serve(serving, token_ids, nowhere, Identity())
    torch.testing.assert_close(decoder.run(token_ids, all_full, pass_on), expected, atol=1e-4, rtol=1e-4)
    ones = decoder.run(token_ids, lambda layer, hidden: torch.ones(BATCH, LENGTH, 1), compensation)
    torch.testing.assert_close(ones, expected, atol=1e-4, rtol=1e-4)
    full_logits = serving.logits(expected.flatten(0, 1), (Action.FULL,) * BATCH * LENGTH)
    torch.testing.assert_close(decoder.logits(expected).flatten(0, 1), full_logits, atol=1e-4, rtol=1e-4)

    skips = some_skips(decoder)
    gated = decoder.run(token_ids, fixed_gates(skips), compensation)
    torch.testing.assert_close(gated, serve(serving, token_ids, skips, compensation), atol=1e-4, rtol=1e-4)


def test_gradients_reach_gates_and_compensation_and_match_finite_differences(tiny_folder: Path) -> None:
    decoder = load_gradient_decoder(tiny_folder, torch.float64)
    affine = some_affine(load_decoder(tiny_folder))
    factors = affine.factors.double().requires_grad_()
    gates = torch.full((decoder.num_layers, 1, 6, 1), 0.7, dtype=torch.float64).requires_grad_()
    token_ids = some_tokens(1, 6)

    def loss(gates: Tensor, factors: Tensor) -> Tensor:
        compensation = Affine(factors, affine.offsets.double())
        return decoder.run(token_ids, lambda layer, hidden: gates[layer], compensation).square().mean()

    slopes = torch.autograd.grad(loss(gates, factors), (gates, factors))
    step = 1e-6
    for changed, slope in zip((0, 1), slopes, strict=True):
        direction = torch.randn(slope.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(changed))
        ends = []
        for sign in (step, -step):
            inputs = [gates.detach(), factors.detach()]
            inputs[changed] = inputs[changed] + sign * direction
            ends.append(float(loss(*inputs)))
        assert float((slope * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


def test_recomputing_layers_changes_no_gradient(tiny_folder: Path) -> None:
    affine = some_affine(load_decoder(tiny_folder))
    slopes = []
    for recomputes_layers in (False, True):
        decoder = load_gradient_decoder(tiny_folder, recomputes_layers=recomputes_layers)
        factors = affine.factors.clone().requires_grad_()
        outputs = decoder.run(some_tokens(), fixed_gates(some_skips(decoder)), Affine(factors, affine.offsets))
        slopes.append(torch.autograd.grad(outputs.square().mean(), factors)[0])
    torch.testing.assert_close(*slopes)


def test_the_models_own_weights_take_no_part_in_the_gradient(tiny_folder: Path) -> None:
    config, stored = load_model_config(tiny_folder), open_weights(tiny_folder)
    weights = {name: stored[name].clone().requires_grad_() for name in stored}
    decoder = DifferentiableDecoder(config, weights, dtype=torch.float32)
    assert not decoder.run(some_tokens(), all_full, pass_on).requires_grad
    gate = torch.full((BATCH, LENGTH, 1), 0.5).requires_grad_()
    hidden = decoder.run(some_tokens(), lambda layer, hidden: gate, pass_on)
    decoder.logits(hidden).sum().backward()
    assert gate.grad is not None
    assert all(weight.grad is None for weight in weights.values())


def test_tensors_that_need_no_cast_and_no_fusing_are_shared_with_the_mapping(tiny_folder: Path) -> None:
    stored = open_weights(tiny_folder)
    weights = {name: stored[name] for name in stored}
    before = weights["model.embed_tokens.weight"][3].clone()
    decoder = DifferentiableDecoder(load_model_config(tiny_folder), weights, dtype=torch.float32)
    hidden = torch.randn(2, decoder.config.hidden_size)
    logits = decoder.logits(hidden)
    weights["model.embed_tokens.weight"][3] = 2 * before
    torch.testing.assert_close(decoder.logits(hidden)[:, 3], 2 * logits[:, 3])


def test_row_divergences_and_their_slopes_are_those_of_all_logits_at_once(tiny_folder: Path) -> None:
    decoder = load_gradient_decoder(tiny_folder)
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


def test_prompts_run_in_full_whatever_the_gates_say(tiny_folder: Path) -> None:
    decoder = load_gradient_decoder(tiny_folder)
    everywhere = torch.ones(decoder.num_layers, BATCH, LENGTH, dtype=torch.bool)
    gates = keep_prompts(fixed_gates(everywhere), 7)
    with torch.no_grad():
        full = decoder.run(some_tokens(), all_full, pass_on)
        ours = decoder.run(some_tokens(), gates, pass_on)
    torch.testing.assert_close(ours[:, :7], full[:, :7])
    assert not torch.isclose(ours[:, 7:], full[:, 7:]).all(dim=-1).any()
    assert keep_prompts(all_full, 7)(0, full) is None


def test_sequences_that_make_no_batch_are_refused() -> None:
    assert token_batch([[1, 2, 3], [4, 5, 6]], 2).shape == (2, 3)
    with pytest.raises(ConfigError, match="one length"):
        token_batch([[1, 2, 3], [4, 5]], 1)
    with pytest.raises(ConfigError, match="one length"):
        token_batch([], 1)
    with pytest.raises(ConfigError, match="num_prompt_tokens"):
        token_batch([[1, 2, 3]], 3)
