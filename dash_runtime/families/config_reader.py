"""Reads the values of a transformers configuration and checks them. Every error names the file.

Knows the keys that families share and transformers' spelling of them; knows no family.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dash_runtime.errors import CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.families.rope_reader import RopeReader, positive_number
from dash_runtime.files.wording import quoted
from dash_runtime.model_config import Activation, RopeConfig, RopeKind

_SLIDING, _FULL = "sliding_attention", "full_attention"


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

    def size_up_to(self, most: int, key: str) -> int:
        """Returns a positive integer that is no larger than `most`."""
        value = self.size(key)
        if value > most:
            raise CorruptCheckpoint(f"{self.source}: {key} must be at most {most}, got {value}.")
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
        return positive_number(self.get(key), key, self.source)

    def activation(self, key: str, supported: Mapping[str, Activation]) -> Activation:
        """Returns the activation that `key` names, which must be one of `supported`."""
        name = self.get(key)
        if name not in [*supported]:
            raise UnsupportedArchitecture(
                f"{self.source}: activation {quoted(name)} is not supported; only {', '.join(supported)} is."
            )
        return supported[name]

    def refuse(self, *keys: str) -> None:
        """Refuses a configuration that sets one of these keys."""
        for key in keys:
            if self.get(key):
                raise UnsupportedArchitecture(f"{self.source}: {key} is not supported.")

    def head_dim(self) -> int:
        """Returns the number of channels of a head."""
        if self.get("head_dim") is not None:
            return self.size("head_dim")
        return self.size("hidden_size") // self.size("num_attention_heads")

    def rope(self, layer_type: str | None = None, may_be_partial: bool = False) -> RopeConfig:
        """Returns the rotary embedding that all layers share, or that of the layers of one type.

        Refuses one of a part of each head, unless it `may_be_partial`.
        """
        parameters = self.get("rope_parameters")
        if isinstance(parameters, dict) and layer_type is not None:
            parameters = parameters.get(layer_type)
        if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
            raise UnsupportedArchitecture(
                f"{self.source}: rotary embeddings that differ between layers are not supported."
            )
        context_length = self.size("max_position_embeddings")
        return RopeReader(parameters, self.source, context_length, self.head_dim(), may_be_partial).read()

    def flag_of_every_layer(self, key: str) -> tuple[bool, ...]:
        """Returns one boolean per layer, from a list of zeros and ones that may be longer."""
        values, num_layers = self.get(key), self.size("num_hidden_layers")
        if not isinstance(values, list) or len(values) < num_layers or any(value not in (0, 1) for value in values):
            raise CorruptCheckpoint(f"{self.source}: {key} must have a 0 or 1 for each of {num_layers} layers.")
        return tuple(value == 1 for value in values[:num_layers])

    def layer_numbers(self, key: str) -> Sequence[int]:
        """Returns a list of layers, counted from 0."""
        values = self.get(key)
        if not isinstance(values, list) or any(type(value) is not int for value in values):
            raise CorruptCheckpoint(f"{self.source}: {key} must be a list of layers, got {quoted(values)}.")
        return values

    def sliding_window_in_every_layer(self) -> tuple[int | None, ...]:
        """Returns the same window for each layer, None for each if the configuration has none."""
        window = None if self.get("sliding_window") is None else self.size("sliding_window")
        return (window,) * self.size("num_hidden_layers")

    def sliding_windows_by_layer_type(self) -> tuple[int | None, ...]:
        """Returns the window of each layer, by its entry in `layer_types`."""
        if self.get("sliding_window") is None:
            return (None,) * self.size("num_hidden_layers")
        window = self.size("sliding_window")
        return tuple(window if kind == _SLIDING else None for kind in self._layer_types())

    def rope_of_growing_queries(self, growth_key: str) -> RopeConfig:
        """Returns the rotary embedding that all layers share, whose queries grow by the value of `growth_key`."""
        rope = self.rope()
        if rope.kind is not RopeKind.YARN:
            raise UnsupportedArchitecture(f"{self.source}: rope_type must be yarn, got {rope.kind}.")
        growth = positive_number(self.config.rope_parameters.get(growth_key), growth_key, self.source)
        return replace(rope, query_growth=growth)

    def ropes_by_layer_type(self) -> tuple[RopeConfig, ...]:
        """Returns the rotary embedding of each layer, by its entry in `layer_types`."""
        types = self._layer_types()
        ropes = {kind: self.rope(kind) for kind in dict.fromkeys(types)}
        return tuple(ropes[kind] for kind in types)

    def _layer_types(self) -> Sequence[str]:
        types = self.config.layer_types
        if len(types) != self.size("num_hidden_layers") or any(kind not in [_SLIDING, _FULL] for kind in types):
            raise UnsupportedArchitecture(
                f"{self.source}: layer_types other than {_SLIDING}, {_FULL} are not supported."
            )
        return types
