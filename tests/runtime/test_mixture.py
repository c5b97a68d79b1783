"""A mixture of experts: the chosen experts of each row run, alike for every action, and no other weights are read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.decoder.backends.eager import EagerBackend
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.layers.batch import Batch, PassKind
from dash_runtime.layers.compensation import Identity
from dash_runtime.layers.heads import Heads
from dash_runtime.layers.layer import DecoderLayer, make_layer
from dash_runtime.layers.mlp import GatedMlp, Mixture
from dash_runtime.layers.weight_loader import WeightLoader
from dash_runtime.linears.dense_linear import FullLinear, Linear
from dash_runtime.model_config import Activation, MixtureConfig, ModelConfig
from dash_runtime.startup.build import matrix_shapes
from tests.runtime.support import ALL_ACTIONS, CPU, load_decoder, loop_ends, new_cache
from tests.tiny_models import save_tiny_model

NUM_EXPERTS, NUM_CHOSEN, HIDDEN, INNER = 6, 2, 32, 48
RUNNING = [Action.INT3, Action.INT4, Action.INT8, Action.FULL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "moe", "qwen3-moe")


def some(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some_mixture(dtype: torch.dtype, has_normed_shares: bool = True) -> Mixture[FullLinear]:
    config = MixtureConfig(frozenset((0,)), NUM_EXPERTS, NUM_CHOSEN, INNER, has_normed_shares)
    experts = tuple(
        GatedMlp(
            FullLinear(some(2 * INNER, HIDDEN, seed=10 + number, dtype=dtype)),
            FullLinear(some(HIDDEN, INNER, seed=30 + number, dtype=dtype)),
        )
        for number in range(NUM_EXPERTS)
    )
    return Mixture(config, FullLinear(some(NUM_EXPERTS, HIDDEN, seed=1, dtype=dtype)), experts)


def run(mixture: Mixture[Linear] | Mixture[FullLinear], rows: Tensor) -> Tensor:
    return mixture(rows, Activation.SILU)


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_only_chosen_experts_run_and_each_for_its_own_rows(num_rows: int) -> None:
    calls: dict[int, int] = {}

    def counted(number: int, expert: GatedMlp[FullLinear]) -> GatedMlp[Linear]:
        def gate_up(rows: Tensor) -> Tensor:
            calls[number] = len(rows)
            return expert.gate_up(rows)

        return GatedMlp(gate_up, expert.down)

    mixture, rows = some_mixture(torch.float32), some(num_rows, HIDDEN, seed=2)
    experts = tuple(counted(number, expert) for number, expert in enumerate(mixture.experts))
    own: Mixture[Linear] = Mixture(mixture.config, mixture.router, experts)
    run(own, rows)
    chosen = mixture.router(rows).topk(NUM_CHOSEN).indices
    assert calls == {number: int((chosen == number).sum()) for number in chosen.unique().tolist()}


@pytest.mark.parametrize("has_normed_shares", [True, False])
def test_a_row_is_the_sum_of_its_experts_by_their_shares(has_normed_shares: bool) -> None:
    mixture, rows = some_mixture(torch.float64, has_normed_shares), some(7, HIDDEN, seed=3, dtype=torch.float64)
    probabilities = mixture.router(rows).softmax(-1)
    shares = probabilities * (probabilities >= probabilities.topk(NUM_CHOSEN).values[:, -1:])
    if has_normed_shares:
        shares /= shares.sum(-1, keepdim=True)
    every = torch.stack([expert(rows, Activation.SILU) for expert in mixture.experts], dim=1)
    torch.testing.assert_close(run(mixture, rows), (every * shares.unsqueeze(-1)).sum(1))
    assert torch.equal(run(mixture, rows.view(1, 7, HIDDEN)), run(mixture, rows).view(1, 7, HIDDEN))


def test_gradients_pass_through_experts_and_shares() -> None:
    mixture = some_mixture(torch.float64)
    rows = some(2, HIDDEN, seed=4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda own: run(mixture, own), rows)


def layer_of(folder: Path, index: int) -> DecoderLayer:
    config = load_model_config(folder)
    weights = WeightLoader(config, open_weights(folder), torch.bfloat16, CPU).layer(index)
    return make_layer(weights, config.num_heads * config.head_dim, ALL_ACTIONS)


def test_every_action_chooses_the_same_experts_and_runs_them_in_its_own_precision(folder: Path) -> None:
    layer = layer_of(folder, 0)
    mixtures = [mlp for action in RUNNING if isinstance(mlp := layer.linears[action].mlp, Mixture)]
    assert len(mixtures) == len(RUNNING)
    rows = some(9, load_model_config(folder).hidden_size, seed=5, dtype=torch.bfloat16)
    scores = [mixture.router(rows) for mixture in mixtures]
    assert all(torch.equal(own, scores[0]) for own in scores)
    int3, int4, int8, full = (run(mixture, rows).float() for mixture in mixtures)
    assert 0 < (int8 - full).norm() < (int4 - full).norm() < (int3 - full).norm() < 0.6 * full.norm()


def test_rows_have_the_same_bits_alone_and_among_others_in_every_action(folder: Path) -> None:
    layer = layer_of(folder, 0)
    rows = some(17, load_model_config(folder).hidden_size, seed=6, dtype=torch.bfloat16)
    for action in RUNNING:
        mlp = layer.linears[action].mlp
        assert torch.equal(mlp(rows, Activation.SILU), torch.cat([mlp(row, Activation.SILU) for row in rows.split(1)]))


def test_a_skipped_row_runs_neither_router_nor_experts(folder: Path) -> None:
    def forbidden(rows: Tensor) -> Tensor:
        raise AssertionError("runs")

    def without_mlp(layer: DecoderLayer) -> DecoderLayer:
        linears = {
            action: replace(own, mlp=own.mlp.mapped(lambda _: forbidden, lambda _: forbidden))
            for action, own in layer.linears.items()
        }
        return replace(layer, linears=linears)

    decoder = load_decoder(folder, torch.bfloat16)
    backend = EagerBackend(loop_ends(decoder), decoder.config, [without_mlp(layer_of(folder, 0))], Heads({}))
    batch, hidden = one_row(decoder)
    assert torch.equal(backend.run_layer(0, [Action.SKIP], hidden, batch), hidden)
    with pytest.raises(AssertionError, match="runs"):
        backend.run_layer(0, [Action.INT4], hidden, batch)


def one_row(decoder: Decoder) -> tuple[Batch, Tensor]:
    return decoder.batch(PassKind.PREFILL, [new_cache(decoder)], [1], [Identity()]), decoder.embed([7])


def changed(folder: Path, change: Callable[[MixtureConfig], MixtureConfig]) -> ModelConfig:
    config = load_model_config(folder)
    assert config.mixture is not None
    return replace(config, mixture=change(config.mixture))


def test_kernels_are_tried_for_the_shapes_that_layers_have(folder: Path) -> None:
    expert, single = {(128, 96), (96, 64)}, {(320, 96), (96, 160)}
    assert matrix_shapes(load_model_config(folder)) >= expert | single
    without_single = changed(folder, lambda mixture: replace(mixture, layers=frozenset(range(6))))
    assert not matrix_shapes(without_single) & single


def test_a_row_reads_the_weights_of_its_experts_and_not_those_of_others(folder: Path) -> None:
    config = load_model_config(folder)
    attention = 96 * (2 * 4 * 32 + 2 * 2 * 32)
    assert [config.num_weights_read(layer) - attention for layer in (0, 1)] == [3 * 3 * 96 * 64, 3 * 96 * 160]
