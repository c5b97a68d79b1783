"""Gemma 3 (Gemma team 2025), text only: norms on both sides, queries and keys normed by head, windows in five of six
layers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from dash_runtime.families.config_reader import ConfigReader
from dash_runtime.families.gguf_header import GgufHeader
from dash_runtime.families.layer_types import LayerTypes
from dash_runtime.model_config import Activation, BlockConfig, NormPlacement, QkNorm, TensorNames

_LAYERS_OF_27B = 62


class Gemma3(LayerTypes):
    architecture = "Gemma3ForCausalLM"
    model_type = "gemma3_text"
    tensor_names = TensorNames(mlp_norm="pre_feedforward_layernorm")
    activations: ClassVar[Mapping[str, Activation]] = {"gelu_pytorch_tanh": Activation.GELU_TANH}
    activation_key = "hidden_activation"
    gguf_architecture = "gemma3"
    sliding_theta = 10000.0

    def block(self, config: ConfigReader) -> BlockConfig:
        config.refuse("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
        return replace(
            super().block(config),
            norm_placement=NormPlacement.BOTH,
            norm_offset=1.0,
            qk_norm=QkNorm.HEAD,
            attention_scale=config.number("query_pre_attn_scalar") ** -0.5,
            has_mlp_bias=False,
        )

    def embedding_multiplier(self, config: ConfigReader) -> float:
        return config.number("hidden_size") ** 0.5

    def keys_from_gguf(self, gguf: GgufHeader) -> dict[str, object]:
        num_heads = gguf.require("gemma3.attention.head_count", int)
        head_dim = gguf.require("gemma3.attention.key_length", int)
        # As llama.cpp does: files do not have the scale, and that of the largest model is another.
        is_27b = gguf.require("gemma3.block_count", int) == _LAYERS_OF_27B
        scalar = gguf.require("gemma3.embedding_length", int) // max(num_heads, 1) if is_27b else head_dim
        return super().keys_from_gguf(gguf) | {
            "query_pre_attn_scalar": scalar,
            "sliding_window": gguf.require("gemma3.attention.sliding_window", int),
            "final_logit_softcapping": gguf.get("gemma3.final_logit_softcapping", float),
        }
