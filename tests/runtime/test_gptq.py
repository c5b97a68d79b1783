"""Weights rounded by their inputs change outputs less than to the nearest, and is kept, read and computed with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.commands.cli import main
from dash_runtime.errors import PolicyFileError
from dash_runtime.layers.weight_loader import WeightLoader
from dash_runtime.linears.dense_linear import FullLinear
from dash_runtime.linears.grouped_matrix import GroupedMatrix, quantize_grouped
from dash_runtime.linears.quantization import BITS, grouped, make_linear
from dash_runtime.linears.rounding_file import load_rounding, rounding_file, save_rounding
from dash_runtime.native.matrix import pack_native_matrix
from dash_runtime.training.dense_decoder import DenseDecoder
from dash_runtime.training.gptq import quantize_for
from dash_runtime.training.loaded_model import LoadedModel, ModelOptions
from tests.runtime.support import policy_arguments
from tests.tiny_models import save_tiny_model

CPU = torch.device("cpu")
OUT, IN = 64, 320


def some_weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)).to(dtype)


def like_inputs(count: int, seed: int) -> Tensor:
    """`[count, IN]`, of which a few directions have nearly everything, as a model's states have."""
    directions = torch.randn(40, IN, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 40, generator=generator) @ directions + torch.randn(count, IN, generator=generator)


def is_same(one: GroupedMatrix, other: GroupedMatrix) -> bool:
    return all(map(torch.equal, one.tensors().values(), other.tensors().values()))


@pytest.mark.parametrize("bits", BITS.values())
def test_outputs_change_less_than_with_the_nearest_values_for_other_inputs_of_the_same_kind(bits: int) -> None:
    weight, seen, others = some_weight(), like_inputs(2000, 2), like_inputs(500, 3)
    ours, nearest = quantize_for(weight, bits, seen.T @ seen), quantize_grouped(weight, bits)
    errors = [(others @ (own.dequantized() - weight).T).square().mean() for own in (ours, nearest)]
    assert errors[0] < 0.5 * errors[1]
    assert is_same(replace(ours, values=nearest.values), nearest)
    assert ours.values.max() < 2**bits


def test_inputs_that_know_nothing_of_each_other_leave_the_nearest_values() -> None:
    weight = some_weight()
    loudness = torch.rand(IN, generator=torch.Generator().manual_seed(4))
    assert torch.equal(quantize_for(weight, 4, loudness.diag()).values, quantize_grouped(weight, 4).values)


@pytest.mark.parametrize("action", BITS)
def test_every_product_computes_with_the_matrix_that_was_kept(action: Action) -> None:
    """The library's kernel, the dense product and native code's layout."""
    weight, other = some_weight(torch.bfloat16), quantize_grouped(some_weight().flip(0), BITS[action])
    kept = FullLinear(weight, rounded={action: other})
    plain = FullLinear(other.dequantized().bfloat16(), rounded={action: other})
    inputs = like_inputs(3, 5).bfloat16()
    assert torch.equal(make_linear(action, kept)(inputs), make_linear(action, plain)(inputs))
    assert not torch.equal(make_linear(action, kept)(inputs), make_linear(action, FullLinear(weight))(inputs))
    packed = [pack_native_matrix(action, own).tensors() for own in (kept, plain, replace(kept, rounded={}))]
    assert all(map(torch.equal, packed[0], packed[1]))
    assert not torch.equal(packed[0][0], packed[2][0])
    part = grouped(action, kept.outputs(16, 48)).dequantized()
    assert torch.equal(part, other.dequantized()[16:48])


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = rounding_file(tmp_path, "a model")
    assert not load_rounding(path, "a model")
    saved = {
        Action.INT4: {(0, 1): quantize_grouped(some_weight(), 4), (3, 0): quantize_grouped(some_weight()[:32, :96], 4)},
        Action.INT3: {(3, 0): quantize_grouped(some_weight(), 3)},
    }
    save_rounding(path, saved, "a model")
    kept = load_rounding(path, "a model")
    assert {action: set(own) for action, own in kept.items()} == {action: set(own) for action, own in saved.items()}
    assert kept.identity
    for action, matrices in saved.items():
        for place, matrix in matrices.items():
            assert kept[action][place].bits == BITS[action]
            assert is_same(kept[action][place], matrix)


def test_a_file_that_is_damaged_or_another_models_is_refused_by_its_name(tmp_path: Path) -> None:
    path = rounding_file(tmp_path, "a model")
    save_rounding(path, {Action.INT4: {(0, 0): quantize_grouped(some_weight(), 4)}}, "a model")
    with pytest.raises(PolicyFileError, match=f"{path}.*another model; delete it"):
        load_rounding(path, "another model")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(PolicyFileError, match=f"{path}.*checksum"):
        load_rounding(path, "a model")


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_a_layer_takes_its_matrices_from_the_file(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / family, family)
    config, weights = load_model_config(folder), open_weights(folder)
    layers: list[list[FullLinear]] = []

    def watch(place: int, full: FullLinear) -> FullLinear:
        layers[-1].append(full)
        assert len(layers[-1]) == place + 1
        return full

    plain = WeightLoader(config, weights, torch.float32, CPU)
    for layer in range(config.num_layers):
        layers.append([])
        plain.layer(layer).linears.mapped_by_place(watch, lambda router: router)
    flipped = {
        (layer, place): quantize_grouped(full.weight.flip(0), 4)
        for layer, own in enumerate(layers)
        for place, full in enumerate(own)
    }
    loader = WeightLoader(config, weights, torch.float32, CPU, rounding={Action.INT4: flipped})

    def check(place: int, full: FullLinear) -> FullLinear:
        assert full.rounded.keys() == {Action.INT4}
        assert is_same(full.rounded[Action.INT4], flipped[0, place])
        return full

    loader.layer(0).linears.mapped_by_place(check, lambda router: router)


@pytest.mark.usefixtures("short_measurements")
def test_the_command_keeps_what_later_commands_and_starts_compute_with(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama", num_hidden_layers=2)
    arguments = policy_arguments(folder, text, cache=tmp_path)
    options = ModelOptions(str(folder), None, "cpu", tmp_path, text)
    before = LoadedModel(options, print)
    assert main(["quantize", *arguments]) == 0
    said = capsys.readouterr().out
    assert before.rounding_file.is_file()
    assert str(before.rounding_file) in said
    assert "instead of" in said
    after = LoadedModel(options, print)
    ids = torch.tensor(after.sequences()[:2])

    def outputs(decoder: DenseDecoder, action: Action) -> Tensor:
        hidden = decoder.embed(ids)
        for layer in range(decoder.num_layers):
            hidden = decoder.run_layer(layer, action, hidden)
        return hidden

    with torch.no_grad():
        for action in (Action.FULL, Action.INT4, Action.INT3):
            pair = [outputs(model.dense_decoder((Action.INT4, Action.INT3)), action) for model in (before, after)]
            assert torch.equal(*pair) is (action is Action.FULL)
    first = load_rounding(before.rounding_file, before.fingerprint).identity
    assert main(["quantize", *arguments]) == 0  # from the weights, not from what was kept
    assert load_rounding(before.rounding_file, before.fingerprint).identity == first


def test_a_model_of_four_bits_has_nothing_to_round_and_no_text_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama")
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            weights[name] = quantize_grouped(weight, 4).dequantized().to(weight.dtype)
    save_file(weights, file, metadata={"format": "pt"})
    arguments = [
        "quantize",
        "--actions",
        "int4",
        "--model",
        str(folder),
        "--device",
        "cpu",
        "--cache-folder",
        str(tmp_path / "cache"),
    ]
    assert main([*arguments, "--data", "/nowhere.txt"]) == 0
    assert "not rounded" in capsys.readouterr().out
    assert not (tmp_path / "cache" / "rounding").exists()
