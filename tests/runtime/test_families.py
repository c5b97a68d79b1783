"""A new model family is one class and one entry in the list of families: nothing else has to know it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dash_runtime.checkpoints import check_weights, load_model_config, open_weights, parameter_shapes
from dash_runtime.checkpoints.parameters import layer_norms
from dash_runtime.errors import CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.families import FAMILIES, Family
from dash_runtime.families.config_reader import ConfigReader
from dash_runtime.layers.mlp import GatedMlp
from dash_runtime.layers.weight_loader import LayerWeights, WeightLoader
from dash_runtime.model_config import Activation, BlockConfig, NormPlacement, QkNorm, RopeConfig, TensorNames
from tests.runtime.support import CPU


class FusedLlama(Family):
    """A made-up family with other names, fused matrices, and norms on the other side of attention and MLP."""

    architecture = "FusedLlamaForCausalLM"
    model_type = "llama"
    tensor_names = TensorNames(
        embedding="decoder.tokens",
        final_norm="decoder.last_norm",
        layers="decoder.blocks",
        attention_output_norm="attention_norm",
        mlp_output_norm="feed_forward_norm",
        query_norm="query_norm",
        key_norm="key_norm",
        query_key_value=("wqkv",),
        output="wo",
        gate_up=("w13",),
        down="w2",
    )
    activations = {"gelu_pytorch_tanh": Activation.GELU_TANH}  # noqa: RUF012

    def block(self, config: ConfigReader) -> BlockConfig:
        return replace(
            super().block(config),
            norm_placement=NormPlacement.AFTER,
            norm_offset=1.0,
            qk_norm=QkNorm.WIDTH,
            residual_multiplier=config.number("residual_multiplier"),
        )

    def ropes(self, config: ConfigReader) -> tuple[RopeConfig | None, ...]:
        return tuple(rope if layer % 2 else None for layer, rope in enumerate(super().ropes(config)))

    def embedding_multiplier(self, config: ConfigReader) -> float:
        return config.number("hidden_size") ** 0.5


WITH_FUSED: Sequence[Family] = (*FAMILIES, FusedLlama())
CONFIG = {
    "architectures": ["FusedLlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 260,
    "residual_multiplier": 0.25,
    "tie_word_embeddings": True,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)
    shapes = {"decoder.tokens.weight": (260, 64), "decoder.last_norm.weight": (64,)}
    for layer in range(2):
        shapes |= {
            f"decoder.blocks.{layer}.attention_norm.weight": (64,),
            f"decoder.blocks.{layer}.feed_forward_norm.weight": (64,),
            f"decoder.blocks.{layer}.query_norm.weight": (64,),
            f"decoder.blocks.{layer}.key_norm.weight": (32,),
            f"decoder.blocks.{layer}.wqkv.weight": (128, 64),
            f"decoder.blocks.{layer}.wo.weight": (64, 64),
            f"decoder.blocks.{layer}.w13.weight": (192, 64),
            f"decoder.blocks.{layer}.w2.weight": (64, 96),
        }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_a_new_family_is_read_from_its_configuration_to_the_weights_of_a_layer(folder: Path) -> None:
    config = load_model_config(folder, families=WITH_FUSED)
    assert config.architecture == "FusedLlamaForCausalLM"
    assert config.block == BlockConfig(
        NormPlacement.AFTER, 1.0, Activation.GELU_TANH, QkNorm.WIDTH, residual_multiplier=0.25
    )
    assert config.ropes == (None, RopeConfig(10000.0))
    assert (config.embedding_multiplier, config.logits_multiplier) == (8.0, 1.0)

    weights = open_weights(folder)
    check_weights(weights, config)
    assert parameter_shapes(config).keys() == weights.keys()
    assert layer_norms(config) == ["attention_norm", "feed_forward_norm"]

    loader = WeightLoader(config, weights, torch.float32, CPU)
    layer = loader.layer(0)
    assert norms_of(layer) == {"attention_output_norm": 64, "mlp_output_norm": 64, "query_norm": 64, "key_norm": 32}
    assert layer.key_norm is not None
    assert torch.equal(layer.key_norm.weight, weights["decoder.blocks.0.key_norm.weight"] + 1)
    assert torch.equal(layer.linears.query_key_value.weight, weights["decoder.blocks.0.wqkv.weight"])
    assert isinstance(layer.linears.mlp, GatedMlp)
    assert torch.equal(layer.linears.mlp.gate_up.weight, weights["decoder.blocks.0.w13.weight"])
    assert torch.equal(loader.embedding(), weights["decoder.tokens.weight"])
    assert torch.equal(loader.final_norm().weight, weights["decoder.last_norm.weight"] + 1)


def norms_of(layer: LayerWeights) -> dict[str, int]:
    """Returns the widths of the layer's norms by field."""
    names = ("input_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm", "query_norm", "key_norm")
    assert layer.head_norm is None
    return {name: len(norm.weight) for name in names if (norm := getattr(layer, name)) is not None}


def test_a_family_that_is_not_listed_is_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match="FusedLlamaForCausalLM is not supported; supported: Llama"):
        load_model_config(folder)


def test_a_norm_that_the_family_leaves_out_is_not_ignored(folder: Path) -> None:
    extra = {"decoder.blocks.1.input_layernorm.weight": torch.ones(64)}
    weights = open_weights(folder)
    save_file(dict(weights) | extra, folder / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"asks for no tensor 'decoder\.blocks\.1\.input_layernorm"):
        check_weights(open_weights(folder), load_model_config(folder, families=WITH_FUSED))


class Gemma2(Family):
    architecture = "Gemma2ForCausalLM"
    model_type = "gemma2"
    tensor_names = TensorNames(mlp_norm="pre_feedforward_layernorm")

    def block(self, config: ConfigReader) -> BlockConfig:
        return BlockConfig(NormPlacement.BOTH, norm_offset=1.0, activation=Activation.GELU_TANH)


def test_what_a_family_may_say_is_enough_for_others_that_transformers_has(tmp_path: Path) -> None:
    import transformers

    family = Gemma2()
    keys = {key: value for key, value in CONFIG.items() if key not in ("architectures", "model_type", "hidden_act")}
    keys |= {"head_dim": 16, "pad_token_id": None, "eos_token_id": 1, "bos_token_id": None}
    kind = getattr(transformers, family.architecture)
    kind(kind.config_class(**keys)).save_pretrained(tmp_path)

    config = load_model_config(tmp_path, families=[family])
    check_weights(open_weights(tmp_path), config)
    assert parameter_shapes(config).keys() == open_weights(tmp_path).keys()
