"""INT4 rounded by its inputs changes outputs less than to the nearest, and is kept, read and computed with."""

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
from dash_runtime.linears.int4_file import int4_file, load_int4, save_int4
from dash_runtime.linears.int4_matrix import quantize_int4
from dash_runtime.linears.quantization import make_linear
from dash_runtime.native.matrix import pack_native_matrix
from dash_runtime.training.dense_decoder import DenseDecoder
from dash_runtime.training.gptq import quantize_int4_for
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


def test_outputs_change_less_than_with_the_nearest_values_for_other_inputs_of_the_same_kind() -> None:
    weight, seen, others = some_weight(), like_inputs(2000, 2), like_inputs(500, 3)
    ours, nearest = quantize_int4_for(weight, seen.T @ seen), quantize_int4(weight)
    errors = [(others @ (own.dequantized() - weight).T).square().mean() for own in (ours, nearest)]
    assert errors[0] < 0.5 * errors[1]
    assert all(torch.equal(own, other) for own, other in zip(ours[1:], nearest[1:], strict=True))
    assert ours.values.max() <= 15


def test_inputs_that_know_nothing_of_each_other_leave_the_nearest_values() -> None:
    weight = some_weight()
    loudness = torch.rand(IN, generator=torch.Generator().manual_seed(4))
    assert torch.equal(quantize_int4_for(weight, loudness.diag()).values, quantize_int4(weight).values)


def test_every_product_computes_with_the_matrix_that_was_kept() -> None:
    """The library's kernel, the dense product and native code's layout."""
    weight, other = some_weight(torch.bfloat16), quantize_int4(some_weight().flip(0))
    kept = FullLinear(weight, int4=other)
    plain = FullLinear(other.dequantized().bfloat16(), int4=other)
    inputs = like_inputs(3, 5).bfloat16()
    assert torch.equal(make_linear(Action.INT4, kept)(inputs), make_linear(Action.INT4, plain)(inputs))
    assert not torch.equal(make_linear(Action.INT4, kept)(inputs), make_linear(Action.INT4, FullLinear(weight))(inputs))
    packed = [pack_native_matrix(Action.INT4, own).tensors() for own in (kept, plain, replace(kept, int4=None))]
    assert all(map(torch.equal, packed[0], packed[1]))
    assert not torch.equal(packed[0][0], packed[2][0])
    part = kept.outputs(16, 48).in_int4().dequantized()
    assert torch.equal(part, other.dequantized()[16:48])


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = int4_file(tmp_path, "a model")
    assert not load_int4(path, "a model")
    saved = {(0, 1): quantize_int4(some_weight()), (3, 0): quantize_int4(some_weight()[:32, :96])}
    save_int4(path, saved, "a model")
    kept = load_int4(path, "a model")
    assert kept.keys() == saved.keys()
    assert kept.identity
    for place, matrix in saved.items():
        assert all(map(torch.equal, kept[place], matrix))


def test_a_file_that_is_damaged_or_another_models_is_refused_by_its_name(tmp_path: Path) -> None:
    path = int4_file(tmp_path, "a model")
    save_int4(path, {(0, 0): quantize_int4(some_weight())}, "a model")
    with pytest.raises(PolicyFileError, match=f"{path}.*another model; delete it"):
        load_int4(path, "another model")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(PolicyFileError, match=f"{path}.*checksum"):
        load_int4(path, "a model")


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
        (layer, place): quantize_int4(full.weight.flip(0))
        for layer, own in enumerate(layers)
        for place, full in enumerate(own)
    }
    loader = WeightLoader(config, weights, torch.float32, CPU, int4=flipped)

    def check(place: int, full: FullLinear) -> FullLinear:
        assert full.int4 is not None
        assert all(map(torch.equal, full.int4, flipped[0, place]))
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
    assert before.int4_file.is_file()
    assert str(before.int4_file) in said
    assert "instead of" in said
    after = LoadedModel(options, print)
    ids = torch.tensor(after.sequences()[:2])

    def outputs(decoder: DenseDecoder, action: Action) -> Tensor:
        hidden = decoder.embed(ids)
        for layer in range(decoder.num_layers):
            hidden = decoder.run_layer(layer, action, hidden)
        return hidden

    with torch.no_grad():
        for action in (Action.FULL, Action.INT4):
            pair = [outputs(model.dense_decoder((Action.INT4,)), action) for model in (before, after)]
            assert torch.equal(*pair) is (action is Action.FULL)
    first = load_int4(before.int4_file, before.fingerprint).identity
    assert main(["quantize", *arguments]) == 0  # from the weights, not from what was kept
    assert load_int4(before.int4_file, before.fingerprint).identity == first


def test_a_model_of_four_bits_has_nothing_to_round_and_no_text_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama")
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            weights[name] = quantize_int4(weight).dequantized().to(weight.dtype)
    save_file(weights, file, metadata={"format": "pt"})
    arguments = ["quantize", "--model", str(folder), "--device", "cpu", "--cache-folder", str(tmp_path / "cache")]
    assert main([*arguments, "--data", "/nowhere.txt"]) == 0
    assert "nothing to round" in capsys.readouterr().out
    assert not (tmp_path / "cache" / "int4").exists()
