"""Granite 3 (IBM 2024): Llama with multipliers of embedding, scores, branches and logits."""

from dataclasses import replace

from dash_runtime.families.config_reader import ConfigReader
from dash_runtime.families.gguf_header import GgufHeader
from dash_runtime.families.llama import Llama
from dash_runtime.model_config import BlockConfig

_GGUF_KEYS = {
    "embedding_multiplier": "granite.embedding_scale",
    "attention_multiplier": "granite.attention.scale",
    "residual_multiplier": "granite.residual_scale",
    "logits_scaling": "granite.logit_scale",
}


class Granite(Llama):
    architecture = "GraniteForCausalLM"
    model_type = "granite"
    gguf_architecture = "granite"

    def block(self, config: ConfigReader) -> BlockConfig:
        return replace(
            super().block(config),
            attention_scale=config.number("attention_multiplier"),
            residual_multiplier=config.number("residual_multiplier"),
        )

    def embedding_multiplier(self, config: ConfigReader) -> float:
        return config.number("embedding_multiplier")

    def logits_multiplier(self, config: ConfigReader) -> float:
        return 1 / config.number("logits_scaling")

    def keys_from_gguf(self, gguf: GgufHeader) -> dict[str, object]:
        return super().keys_from_gguf(gguf) | {name: gguf.require(key, float) for name, key in _GGUF_KEYS.items()}
