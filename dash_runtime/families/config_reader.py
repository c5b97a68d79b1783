"""Reads the values of a transformers configuration and checks them. Every error names the file.

Knows the keys that families share and transformers' spelling of them; knows no family.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dash_runtime.errors import CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.files.wording import quoted
from dash_runtime.model_config import Activation, RopeConfig, RopeKind

_MAX_NUMBER = 1e30


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """The values of one configuration.

    Every method raises `CorruptCheckpoint` if a value makes no sense, and `UnsupportedArchitecture` if it asks for a
    feature that no decoder here has.
    """

    config: Any
    """A transformers `PretrainedConfig`. It holds the file's keys, and transformers' defaults for the others."""
    source: Path
    """The file to name in errors."""

    def get(self, key: str) -> Any:
        """Returns an unchecked value, None if the architecture has no such key."""
        return getattr(self.config, key, None)

    def size(self, key: str) -> int:
        """Returns a positive integer."""
        value = self.get(key)
        if type(value) is not int or value < 1:
            raise CorruptCheckpoint(f"{self.source}: {key} must be a positive integer, got {quoted(value)}.")
        return value

    def flag(self, key: str) -> bool:
        """Returns a boolean, False if the architecture has no such key."""
        value = self.get(key)
        if value is None:
            return False
        if type(value) is not bool:
            raise CorruptCheckpoint(f"{self.source}: {key} must be true or false, got {quoted(value)}.")
        return value

    def number(self, key: str) -> float:
        """Returns a positive number."""
        return self._positive(self.get(key), key)

    def activation(self, key: str, supported: Mapping[str, Activation]) -> Activation:
        """Returns the activation that `key` names, which must be one of `supported`."""
        name = self.get(key)
        if name not in [*supported]:
            raise UnsupportedArchitecture(
                f"{self.source}: activation {quoted(name)} is not supported; only {', '.join(supported)} is."
            )
        return supported[name]

    def rope(self) -> RopeConfig:
        """Returns the rotary embedding that all layers share."""
        parameters = self.get("rope_parameters")
        if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
            raise UnsupportedArchitecture(
                f"{self.source}: rotary embeddings that differ between layers are not supported."
            )
        try:
            kind = RopeKind(parameters["rope_type"])
        except ValueError:
            supported = ", ".join(RopeKind)
            name = quoted(parameters["rope_type"])
            raise UnsupportedArchitecture(
                f"{self.source}: rotary scaling {name} is not supported; supported: {supported}."
            ) from None
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedArchitecture(f"{self.source}: partial rotary embeddings are not supported.")

        def number(key: str) -> float:
            return self._positive(parameters.get(key), f"{key} of its rotary embedding")

        theta = number("rope_theta")
        if kind is RopeKind.DEFAULT:
            return RopeConfig(theta)
        if kind is RopeKind.LINEAR:
            return RopeConfig(theta, kind, number("factor"))
        rope = RopeConfig(
            theta=theta,
            kind=kind,
            factor=number("factor"),
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
            original_context_length=int(number("original_max_position_embeddings")),
        )
        if rope.low_freq_factor >= rope.high_freq_factor:
            raise CorruptCheckpoint(
                f"{self.source}: low_freq_factor of its rotary embedding is not below high_freq_factor."
            )
        return rope

    def sliding_window_in_every_layer(self) -> tuple[int | None, ...]:
        """Returns the same window for each layer, None for each if the configuration has none."""
        window = None if self.get("sliding_window") is None else self.size("sliding_window")
        return (window,) * self.size("num_hidden_layers")

    def sliding_windows_by_layer_type(self) -> tuple[int | None, ...]:
        """Returns the window of each layer, by its entry in `layer_types`."""
        num_layers = self.size("num_hidden_layers")
        if self.get("sliding_window") is None:
            return (None,) * num_layers
        windows = {"sliding_attention": self.size("sliding_window"), "full_attention": None}
        types = self.config.layer_types
        if len(types) != num_layers or any(kind not in [*windows] for kind in types):
            raise UnsupportedArchitecture(
                f"{self.source}: layer_types other than {', '.join(windows)} are not supported."
            )
        return tuple(windows[kind] for kind in types)

    def _positive(self, value: object, key: str) -> float:
        if type(value) not in (int, float) or not 0 < cast(float, value) < _MAX_NUMBER:
            raise CorruptCheckpoint(f"{self.source}: {key} must be a positive number, got {quoted(value)}.")
        return float(cast(float, value))
