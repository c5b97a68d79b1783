"""Reads transformers' `rope_parameters` as a `RopeConfig` and checks it. Every error names the file.

What a missing value means is what transformers' modeling_rope_utils.py makes of it. Knows no family and no layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from dash_runtime.errors import CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.files.wording import quoted
from dash_runtime.model_config import RopeConfig, RopeKind

_MAX_NUMBER = 1e30
_YARN_BETA_FAST, _YARN_BETA_SLOW = 32.0, 1.0


@dataclass(frozen=True, slots=True)
class RopeReader:
    """The parameters of one rotary embedding, of heads of `head_dim` channels in a model of `context_length`."""

    parameters: Mapping[str, Any]
    source: Path
    context_length: int
    head_dim: int
    may_be_partial: bool = False
    """True if the family can rotate a part of each head."""

    def read(self) -> RopeConfig:
        """Returns the rotary embedding.

        Raises:
            CorruptCheckpoint: a value makes no sense.
            UnsupportedArchitecture: the kind of scaling is not supported, or only a part of each head is rotated.
        """
        try:
            kind = RopeKind(self.parameters["rope_type"])
        except ValueError:
            name, supported = quoted(self.parameters["rope_type"]), ", ".join(RopeKind)
            raise UnsupportedArchitecture(
                f"{self.source}: rotary scaling {name} is not supported; supported: {supported}."
            ) from None
        num_rotated = self._num_rotated()
        rope = self._read(kind, self._number("rope_theta"))
        return rope if num_rotated == self.head_dim else replace(rope, num_rotated=num_rotated)

    def _read(self, kind: RopeKind, theta: float) -> RopeConfig:
        match kind:
            case RopeKind.DEFAULT:
                return RopeConfig(theta)
            case RopeKind.LINEAR:
                return RopeConfig(theta, kind, self._number("factor"))
            case RopeKind.LLAMA3:
                return self._llama3(theta)
            case RopeKind.YARN:
                return self._yarn(theta)
            case RopeKind.LONGROPE:
                return self._longrope(theta)

    def _num_rotated(self) -> int:
        share = self._number("partial_rotary_factor", 1.0)
        if share != 1 and not self.may_be_partial:
            raise UnsupportedArchitecture(f"{self.source}: partial rotary embeddings are not supported.")
        num_rotated = int(self.head_dim * share)
        if not 0 < num_rotated <= self.head_dim or num_rotated % 2:
            raise CorruptCheckpoint(
                f"{self.source}: partial_rotary_factor {share:g} makes no pairs of {self.head_dim} channels."
            )
        return num_rotated

    def _llama3(self, theta: float) -> RopeConfig:
        rope = RopeConfig(
            theta,
            RopeKind.LLAMA3,
            self._number("factor"),
            low_freq_factor=self._number("low_freq_factor"),
            high_freq_factor=self._number("high_freq_factor"),
            original_context_length=self._original_context_length(),
        )
        if rope.low_freq_factor >= rope.high_freq_factor:
            raise CorruptCheckpoint(
                f"{self.source}: low_freq_factor of its rotary embedding is not below high_freq_factor."
            )
        return rope

    def _yarn(self, theta: float) -> RopeConfig:
        if self.parameters.get("truncate", True) is not True:
            raise UnsupportedArchitecture(f"{self.source}: truncate of its rotary embedding must be true.")
        if theta <= 1:
            raise CorruptCheckpoint(f"{self.source}: rope_theta must be above 1, got {theta:g}.")
        factor = self._number("factor")
        rope = RopeConfig(
            theta,
            RopeKind.YARN,
            factor,
            original_context_length=self._original_context_length(),
            beta_fast=self._number("beta_fast", _YARN_BETA_FAST),
            beta_slow=self._number("beta_slow", _YARN_BETA_SLOW),
            attention_factor=self._number("attention_factor", self._yarn_attention_factor(factor)),
        )
        if rope.beta_slow > rope.beta_fast:
            raise CorruptCheckpoint(f"{self.source}: beta_slow of its rotary embedding is above beta_fast.")
        return rope

    def _yarn_attention_factor(self, factor: float) -> float:
        if not self.parameters.get("mscale") or not self.parameters.get("mscale_all_dim"):
            return _yarn_scale(factor, 1.0)
        return _yarn_scale(factor, self._number("mscale")) / _yarn_scale(factor, self._number("mscale_all_dim"))

    def _longrope(self, theta: float) -> RopeConfig:
        original = self._original_context_length()
        factor = self._number("factor", self.context_length / original)
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return RopeConfig(
            theta,
            RopeKind.LONGROPE,
            factor,
            original_context_length=original,
            attention_factor=self._number("attention_factor", usual),
            short_factors=self._factors("short_factor"),
            long_factors=self._factors("long_factor"),
        )

    def _factors(self, key: str) -> tuple[float, ...]:
        values, count = self.parameters.get(key), self._num_rotated() // 2
        if not isinstance(values, list) or len(values) != count:
            raise CorruptCheckpoint(f"{self.source}: {key} of its rotary embedding is no list of {count} numbers.")
        return tuple(positive_number(value, f"{key} of its rotary embedding", self.source) for value in values)

    def _original_context_length(self) -> int:
        length = int(self._number("original_max_position_embeddings"))
        if length < 2:
            raise CorruptCheckpoint(f"{self.source}: original_max_position_embeddings must be above 1, got {length}.")
        return length

    def _number(self, key: str, default: float | None = None) -> float:
        """Returns a positive number; without a default it must be there."""
        value = self.parameters.get(key)
        if value is None and default is not None:
            return default
        return positive_number(value, f"{key} of its rotary embedding", self.source)


def positive_number(value: object, name: str, source: Path) -> float:
    """Returns `value`, which must be a positive number."""
    if type(value) not in (int, float) or not 0 < cast(float, value) < _MAX_NUMBER:
        raise CorruptCheckpoint(f"{source}: {name} must be a positive number, got {quoted(value)}.")
    return float(cast(float, value))


def _yarn_scale(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0
