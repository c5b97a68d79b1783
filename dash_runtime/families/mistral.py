"""Mistral (Jiang et al. 2023). Its GGUF files say `llama`, and compute the same."""

from dash_runtime.families.config_reader import ConfigReader
from dash_runtime.families.family import Family


class Mistral(Family):
    architecture = "MistralForCausalLM"
    model_type = "mistral"

    def sliding_window(self, config: ConfigReader) -> tuple[int | None, ...]:
        return config.sliding_window_in_every_layer()
