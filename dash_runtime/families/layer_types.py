"""Families whose layers are of two types, with sliding windows and without, each with a rotary embedding of its own."""

from typing import ClassVar

from dash_runtime.families.config_reader import ConfigReader
from dash_runtime.families.family import Family
from dash_runtime.families.gguf_header import GgufHeader
from dash_runtime.model_config import RopeConfig


class LayerTypes(Family):
    """A family with `layer_types` in its config.json."""

    sliding_theta: ClassVar[float | None] = None
    """The base of sliding layers where a GGUF file has none; None for that of the others."""

    def ropes(self, config: ConfigReader) -> tuple[RopeConfig | None, ...]:
        return config.ropes_by_layer_type()

    def sliding_window(self, config: ConfigReader) -> tuple[int | None, ...]:
        return config.sliding_windows_by_layer_type()

    def rope_keys_from_gguf(
        self, gguf: GgufHeader, theta: float, scaling: dict[str, object] | None
    ) -> dict[str, object]:
        # llama.cpp's converter writes the scaling that full attention has.
        full = {"rope_type": "default", "rope_theta": theta} | (scaling or {})
        sliding_theta = gguf.get(f"{self.gguf_architecture}.rope.freq_base_swa", float) or self.sliding_theta or theta
        sliding = {"rope_type": "default", "rope_theta": sliding_theta}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}
