"""OLMo 3 (OLMo team 2025): OLMo 2 with sliding windows, and a rotary embedding for each type of layer."""

from dash_runtime.families.config_reader import ConfigReader
from dash_runtime.families.gguf_header import GgufHeader
from dash_runtime.families.olmo2 import Olmo2
from dash_runtime.model_config import RopeConfig

_PATTERN = "olmo2.attention.sliding_window_pattern"


class Olmo3(Olmo2):
    architecture = "Olmo3ForCausalLM"
    model_type = "olmo3"

    def ropes(self, config: ConfigReader) -> tuple[RopeConfig | None, ...]:
        return config.ropes_by_layer_type()

    def sliding_window(self, config: ConfigReader) -> tuple[int | None, ...]:
        return config.sliding_windows_by_layer_type()

    def is_in_gguf(self, gguf: GgufHeader) -> bool:
        return not super().is_in_gguf(gguf)

    def keys_from_gguf(self, gguf: GgufHeader) -> dict[str, object]:
        keys = super().keys_from_gguf(gguf) | {"sliding_window": gguf.require("olmo2.attention.sliding_window", int)}
        pattern = gguf.get_list(_PATTERN, bool)
        if pattern is None:
            return keys
        return keys | {"layer_types": ["sliding_attention" if own else "full_attention" for own in pattern]}

    def rope_keys_from_gguf(
        self, gguf: GgufHeader, theta: float, scaling: dict[str, object] | None
    ) -> dict[str, object]:
        # llama.cpp's converter writes the scaling that full attention has.
        full = {"rope_type": "default", "rope_theta": theta} | (scaling or {})
        sliding_theta = gguf.get("olmo2.rope.freq_base_swa", float) or theta
        sliding = {"rope_type": "default", "rope_theta": sliding_theta}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}
