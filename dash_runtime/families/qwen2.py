"""Qwen2 and Qwen2.5 (Yang et al. 2024): queries, keys and values always have a bias, outputs never."""

from dataclasses import replace

from dash_runtime.families.config_reader import ConfigReader
from dash_runtime.families.family import Family
from dash_runtime.families.gguf_header import GgufHeader
from dash_runtime.model_config import BlockConfig


class Qwen2(Family):
    architecture = "Qwen2ForCausalLM"
    model_type = "qwen2"
    gguf_architecture = "qwen2"

    def block(self, config: ConfigReader) -> BlockConfig:
        return replace(super().block(config), has_qkv_bias=True, has_output_bias=False)

    def sliding_window(self, config: ConfigReader) -> tuple[int | None, ...]:
        return config.sliding_windows_by_layer_type()

    def keys_from_gguf(self, gguf: GgufHeader) -> dict[str, object]:
        return {}
