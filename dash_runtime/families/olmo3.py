"""OLMo 3 (OLMo team 2025): OLMo 2 with sliding windows, and a rotary embedding for each type of layer."""

from dash_runtime.families.gguf_header import GgufHeader
from dash_runtime.families.layer_types import LayerTypes
from dash_runtime.families.olmo2 import Olmo2

_PATTERN = "olmo2.attention.sliding_window_pattern"


class Olmo3(LayerTypes, Olmo2):
    architecture = "Olmo3ForCausalLM"
    model_type = "olmo3"

    def is_in_gguf(self, gguf: GgufHeader) -> bool:
        return not super().is_in_gguf(gguf)

    def keys_from_gguf(self, gguf: GgufHeader) -> dict[str, object]:
        keys = super().keys_from_gguf(gguf) | {"sliding_window": gguf.require("olmo2.attention.sliding_window", int)}
        pattern = gguf.get_list(_PATTERN, bool)
        if pattern is None:
            return keys
        return keys | {"layer_types": ["sliding_attention" if own else "full_attention" for own in pattern]}
