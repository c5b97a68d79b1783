"""Llama (Touvron et al. 2023), and models that compute the same, such as SmolLM2."""

from collections.abc import Mapping

from dash_runtime.families.family import Family
from dash_runtime.model_config import ModelConfig


class Llama(Family):
    architecture = "LlamaForCausalLM"
    model_type = "llama"
    gguf_architecture = "llama"

    def gguf_permuted_heads(self, config: ModelConfig) -> Mapping[str, int]:
        query, key, _ = self.tensor_names.query_key_value
        return {query: config.num_heads, key: config.num_kv_heads}
