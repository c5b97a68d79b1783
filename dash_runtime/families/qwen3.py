"""Qwen3 (Yang et al. 2025): the heads of queries and keys are normed."""

from dataclasses import replace

from dash_runtime.families.config_reader import ConfigReader
from dash_runtime.families.family import Family
from dash_runtime.model_config import BlockConfig, QkNorm


class Qwen3(Family):
    architecture = "Qwen3ForCausalLM"
    model_type = "qwen3"
    gguf_architecture = "qwen3"

    def block(self, config: ConfigReader) -> BlockConfig:
        return replace(super().block(config), qk_norm=QkNorm.HEAD)

    def sliding_window(self, config: ConfigReader) -> tuple[int | None, ...]:
        return config.sliding_windows_by_layer_type()
