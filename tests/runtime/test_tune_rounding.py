"""A layer's rounded matrices are tuned until its outputs are nearer to full depth's, on grids that the format has."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.layers.layer_body import Linears
from dash_runtime.layers.weight_loader import WeightLoader
from dash_runtime.linears.dense_linear import FullLinear, Linear
from dash_runtime.linears.grouped_matrix import MOST_OFFSET, MOST_SCALE, GroupedMatrix, quantize_grouped
from dash_runtime.linears.quantization import BITS
from dash_runtime.training.dense_decoder import DenseDecoder
from dash_runtime.training.quantize import rounded_linears
from dash_runtime.training.tune_rounding import LayerPass, tune_rounding
from tests.tiny_models import save_tiny_model

CPU = torch.device("cpu")
SEED = 5


class OneLayer:
    """The first layer of a tiny model, with text that went through it at full depth."""

    def __init__(self, folder: Path, finer_keys: Action | None = Action.INT8, action: Action = Action.INT4) -> None:
        self.action = action
        config, weights = load_model_config(folder), open_weights(folder)
        loader = WeightLoader(config, weights, torch.float32, CPU, finer_keys=finer_keys)
        self.linears = loader.layer(0).linears
        self._decoder = DenseDecoder(config, weights, dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, config.vocab_size, (48, 4, 32), generator=generator)
        self.passes, self.others = self._passes(ids[:40]), self._passes(ids[40:])
        self.rounded: dict[int, GroupedMatrix] = {}
        self.linears.mapped_by_place(self._round, lambda router: router)

    def run(self, states: Tensor, linears: Linears[Linear]) -> Tensor:
        return self._decoder.run_layer(0, Action.FULL, states, linears={Action.FULL: linears})

    def tuned(self, **options: int) -> Mapping[int, GroupedMatrix]:
        with torch.no_grad():
            return tune_rounding(self.run, self.action, self.linears, self.rounded, self.passes, SEED, **options)

    @torch.no_grad()
    def error(self, matrices: Mapping[int, GroupedMatrix]) -> float:
        """On other text than that of the passes."""
        linears = rounded_linears(self.action, self.linears, matrices)
        pairs = [(self.run(own.inputs, linears), own.goal) for own in self.others]
        return float(torch.stack([(outputs - goal).square().mean() for outputs, goal in pairs]).mean())

    @torch.no_grad()
    def _passes(self, ids: Tensor) -> list[LayerPass]:
        inputs = [self._decoder.embed(own) for own in ids]
        return [LayerPass(own, own, self.run(own, self.linears)) for own in inputs]

    def _round(self, place: int, full: FullLinear) -> FullLinear:
        self.rounded[place] = quantize_grouped(full.weight, BITS[self.action])
        if full is self.linears.query_key_value:
            self.place_of_keys = place
        return full


def is_same(one: GroupedMatrix, other: GroupedMatrix) -> bool:
    return all(map(torch.equal, one.tensors().values(), other.tensors().values()))


@pytest.fixture
def one_layer(tmp_path: Path) -> Callable[..., OneLayer]:
    return lambda family="llama", **options: OneLayer(save_tiny_model(tmp_path / family, family), **options)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "granite-untied-biased", "qwen3-moe-tied-unnormed"])
@pytest.mark.parametrize("action", [Action.INT4, Action.INT3])
def test_the_layer_puts_out_more_nearly_what_it_does_at_full_depth(
    family: str, action: Action, one_layer: Callable[..., OneLayer]
) -> None:
    layer = one_layer(family, action=action)
    tuned = layer.tuned()
    assert layer.error(tuned) < 0.9 * layer.error(layer.rounded)
    for place, matrix in tuned.items():
        for name, tensor in layer.rounded[place].tensors().items():
            own = matrix.tensors()[name]
            assert (own.dtype, own.shape) == (tensor.dtype, tensor.shape)
        assert matrix.bits == BITS[action]
        assert matrix.values.max() < 2**matrix.bits
        assert 1 <= matrix.scales.min() <= matrix.scales.max() <= MOST_SCALE
        assert -MOST_OFFSET - 1 <= matrix.offsets.min() <= matrix.offsets.max() <= MOST_OFFSET


def test_the_same_text_gives_the_same_matrices(one_layer: Callable[..., OneLayer]) -> None:
    first, second = (one_layer().tuned() for _ in range(2))
    assert all(is_same(first[place], second[place]) for place in first)


def test_outputs_in_int8_and_matrices_that_were_not_rounded_stay(one_layer: Callable[..., OneLayer]) -> None:
    layer = one_layer()
    first = layer.linears.query_key_value.keys_from
    assert first
    del layer.rounded[layer.place_of_keys + 1]
    tuned = layer.tuned()
    assert tuned.keys() == layer.rounded.keys()
    ours, before = (own[layer.place_of_keys] for own in (tuned, layer.rounded))
    assert is_same(ours.outputs(first, None), before.outputs(first, None))
    assert not torch.equal(ours.values[:first], before.values[:first])


def test_keys_and_values_in_int4_are_tuned_too(one_layer: Callable[..., OneLayer]) -> None:
    layer = one_layer(finer_keys=None)
    num_queries = layer.linears.output.weight.shape[1]
    ours, before = (own[layer.place_of_keys].outputs(num_queries, None) for own in (layer.tuned(), layer.rounded))
    assert not torch.equal(ours.values, before.values)


def test_a_layer_with_more_weights_than_there_is_memory_for_stays_as_it_is(one_layer: Callable[..., OneLayer]) -> None:
    layer = one_layer()
    count = sum(matrix.values.numel() for matrix in layer.rounded.values())
    assert layer.tuned(most_weights=count - 1) is layer.rounded
    assert layer.tuned(most_weights=count) is not layer.rounded
