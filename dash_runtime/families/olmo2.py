"""OLMo 2 (OLMo team 2024): outputs are normed instead of inputs, and queries and keys over all heads together."""

from dataclasses import replace

from dash_runtime.families.config_reader import ConfigReader
from dash_runtime.families.family import Family
from dash_runtime.families.gguf_header import GgufHeader
from dash_runtime.model_config import BlockConfig, NormPlacement, QkNorm


class Olmo2(Family):
    architecture = "Olmo2ForCausalLM"
    model_type = "olmo2"
    gguf_architecture = "olmo2"

    def block(self, config: ConfigReader) -> BlockConfig:
        return replace(
            super().block(config), norm_placement=NormPlacement.AFTER, qk_norm=QkNorm.WIDTH, has_mlp_bias=False
        )

    def is_in_gguf(self, gguf: GgufHeader) -> bool:
        return gguf.get("olmo2.attention.sliding_window", int) is None
