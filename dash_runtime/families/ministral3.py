"""Ministral 3 (Mistral AI 2025), text only: Mistral whose queries grow with their position."""

from dash_runtime.families.config_reader import ConfigReader
from dash_runtime.families.gguf_header import GgufHeader
from dash_runtime.families.llama import Llama
from dash_runtime.model_config import RopeConfig


class Ministral3(Llama):
    architecture = "Ministral3ForCausalLM"
    model_type = "ministral3"
    gguf_architecture = "mistral3"

    def ropes(self, config: ConfigReader) -> tuple[RopeConfig | None, ...]:
        return (config.rope_of_growing_queries("llama_4_scaling_beta"),) * config.size("num_hidden_layers")

    def sliding_window(self, config: ConfigReader) -> tuple[int | None, ...]:
        return config.sliding_window_in_every_layer()

    def rope_keys_from_gguf(
        self, gguf: GgufHeader, theta: float, scaling: dict[str, object] | None
    ) -> dict[str, object]:
        own = {
            "rope_theta": theta,
            "llama_4_scaling_beta": gguf.require("mistral3.attention.temperature_scale", float),
            "mscale": 1.0,  # llama.cpp's own constant
            "mscale_all_dim": gguf.require("mistral3.rope.scaling.yarn_log_multiplier", float),
        }
        return {"rope_parameters": own | (scaling or {"rope_type": "default"})}
