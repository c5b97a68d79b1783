"""Phi-3 and Phi-4-mini (Abdin et al. 2024): fused matrices, and a rotary embedding of a part of each head."""

from dataclasses import replace

from dash_runtime.families.config_reader import ConfigReader
from dash_runtime.families.family import GGUF_NAMES, Family
from dash_runtime.families.gguf_header import GgufHeader
from dash_runtime.model_config import BlockConfig, RopeConfig, TensorNames


class Phi3(Family):
    architecture = "Phi3ForCausalLM"
    model_type = "phi3"
    tensor_names = TensorNames(query_key_value=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
    gguf_architecture = "phi3"
    gguf_tensor_names = replace(GGUF_NAMES, query_key_value=("attn_qkv",), gate_up=("ffn_up",))

    def block(self, config: ConfigReader) -> BlockConfig:
        # Configurations have `attention_bias`, which transformers does not read.
        return replace(super().block(config), has_qkv_bias=False, has_output_bias=False, has_mlp_bias=False)

    def ropes(self, config: ConfigReader) -> tuple[RopeConfig | None, ...]:
        return (config.rope(may_be_partial=True),) * config.size("num_hidden_layers")

    def sliding_window(self, config: ConfigReader) -> tuple[int | None, ...]:
        return config.sliding_window_in_every_layer()

    def keys_from_gguf(self, gguf: GgufHeader) -> dict[str, object]:
        head_dim = gguf.require("phi3.embedding_length", int) // gguf.require("phi3.attention.head_count", int)
        return {
            "partial_rotary_factor": (gguf.get("phi3.rope.dimension_count", int) or head_dim) / max(head_dim, 1),
            "original_max_position_embeddings": gguf.require("phi3.rope.scaling.original_context_length", int),
            "sliding_window": gguf.get("phi3.attention.sliding_window", int) or None,
        }
