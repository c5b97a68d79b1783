"""Qwen3's mixtures of experts (Yang et al. 2025): Qwen3 with many small MLPs in a layer, of which a row runs a few."""

from dash_runtime.families.config_reader import ConfigReader
from dash_runtime.families.gguf_header import GgufHeader
from dash_runtime.families.qwen3 import Qwen3
from dash_runtime.model_config import MixtureConfig

MAX_EXPERTS = 1024
"""Eight times those of the largest model. A damaged file may ask for billions."""


class Qwen3Moe(Qwen3):
    architecture = "Qwen3MoeForCausalLM"
    model_type = "qwen3_moe"
    gguf_architecture = "qwen3moe"

    def sliding_window(self, config: ConfigReader) -> tuple[int | None, ...]:
        return config.sliding_window_in_every_layer()

    def mixture(self, config: ConfigReader) -> MixtureConfig | None:
        step, num_experts = config.size("decoder_sparse_step"), config.size_up_to(MAX_EXPERTS, "num_experts")
        layers = range(step - 1, config.size("num_hidden_layers"), step)
        mixture = MixtureConfig(
            layers=frozenset(layers).difference(config.layer_numbers("mlp_only_layers")),
            num_experts=num_experts,
            num_chosen=config.size_up_to(num_experts, "num_experts_per_tok"),
            expert_size=config.size("moe_intermediate_size"),
            has_normed_shares=config.flag("norm_topk_prob"),
        )
        return mixture if mixture.layers else None

    def keys_from_gguf(self, gguf: GgufHeader) -> dict[str, object]:
        name, tensors = self.gguf_architecture, self.gguf_tensor_names
        num_layers = gguf.require(f"{name}.block_count", int)
        dense = f"{tensors.gate_up[0]}.weight"
        return super().keys_from_gguf(gguf) | {
            "num_experts": gguf.require(f"{name}.expert_count", int),
            "num_experts_per_tok": gguf.require(f"{name}.expert_used_count", int),
            "moe_intermediate_size": gguf.require(f"{name}.expert_feed_forward_length", int),
            # llama.cpp's converter does not write this, and llama.cpp takes it for granted.
            "norm_topk_prob": gguf.get(f"{name}.expert_weights_norm", bool) is not False,
            "mlp_only_layers": [
                layer for layer in range(num_layers) if f"{tensors.layers}.{layer}.{dense}" in gguf.tensors
            ],
        }
