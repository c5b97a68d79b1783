"""SmolLM3 (Bakouch et al. 2025): Llama without a rotary embedding in every fourth layer."""

from dash_runtime.families.config_reader import ConfigReader
from dash_runtime.families.llama import Llama
from dash_runtime.model_config import RopeConfig


class SmolLm3(Llama):
    architecture = "SmolLM3ForCausalLM"
    model_type = "smollm3"
    gguf_architecture = "smollm3"

    def ropes(self, config: ConfigReader) -> tuple[RopeConfig | None, ...]:
        rope, is_rotated = config.rope(), config.flag_of_every_layer("no_rope_layers")  # 1: has a rotary embedding
        return tuple(rope if own else None for own in is_rotated)

    def sliding_window(self, config: ConfigReader) -> tuple[int | None, ...]:
        return config.sliding_windows_by_layer_type()
