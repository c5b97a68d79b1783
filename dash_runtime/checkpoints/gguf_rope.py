"""Writes a GGUF file's rotary embedding as keys of a Hugging Face config.json.

Reads the rotary factors, which llama.cpp's converter stores as tensors. Knows no families and no other tensors.
"""

import math
from typing import Any

from dash_runtime.checkpoints.gguf_file import GgufFile, short_decimal
from dash_runtime.errors import CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.files.wording import quoted

_KINDS = ("none", "linear", "yarn", "longrope")
"""Values of `rope.scaling.type`. Llama 3's scaling is a tensor of factors."""
ROPE_FACTORS = "rope_freqs.weight"
_SHORT_FACTORS, _LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
ROPE_TENSORS = frozenset((ROPE_FACTORS, _SHORT_FACTORS, _LONG_FACTORS))
"""Tensors that belong to the rotary embedding."""

# Llama 3.1's and 3.2's values; a GGUF file has the resulting factors instead.
_LLAMA3_LOW_FREQ_FACTOR = 1.0
_LLAMA3_HIGH_FREQ_FACTOR = 4.0
_LLAMA3_ORIGINAL_CONTEXT = 8192


def rope_theta(gguf: GgufFile, name: str) -> float:
    """Returns the base of the rotary frequencies."""
    return gguf.get(f"{name}.rope.freq_base", float) or 10000.0


def rope_scaling(gguf: GgufFile, name: str, head_dim: int) -> dict[str, Any] | None:
    """Returns the scaling of rotary frequencies as `rope_scaling` of config.json, None if there is none.

    Raises:
        CorruptCheckpoint: the metadata is incomplete or contradicts itself.
        UnsupportedArchitecture: a scaling that is not supported.
    """
    prefix = f"{name}.rope.scaling"
    kind = gguf.get(f"{prefix}.type", str) or "none"
    if kind not in _KINDS:
        raise UnsupportedArchitecture(
            f"{gguf.path}: rotary scaling {quoted(kind)} is not supported; supported: {', '.join(_KINDS)}."
        )
    if kind == "longrope" or _LONG_FACTORS in gguf.tensors:  # older files do not name it
        return _longrope_scaling(gguf, prefix)
    if kind == "linear":
        return {"rope_type": "linear", "factor": gguf.require(f"{prefix}.factor", float)}
    if kind == "yarn":
        return _yarn_scaling(gguf, prefix)
    if ROPE_FACTORS in gguf.tensors:
        return _llama3_scaling(gguf, rope_theta(gguf, name), head_dim)
    return None


def _yarn_scaling(gguf: GgufFile, prefix: str) -> dict[str, Any]:
    # Where its value is that of config.json, the converter has written it under either of two names.
    attention_factor = gguf.get(f"{prefix}.yarn_attn_factor", float) or gguf.get(f"{prefix}.attn_factor", float)
    optional = {
        "beta_fast": gguf.get(f"{prefix}.yarn_beta_fast", float),
        "beta_slow": gguf.get(f"{prefix}.yarn_beta_slow", float),
        "attention_factor": attention_factor,
    }
    return {
        "rope_type": "yarn",
        "factor": gguf.require(f"{prefix}.factor", float),
        "original_max_position_embeddings": gguf.require(f"{prefix}.original_context_length", int),
        **{key: value for key, value in optional.items() if value is not None},
    }


def _longrope_scaling(gguf: GgufFile, prefix: str) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "original_max_position_embeddings": gguf.require(f"{prefix}.original_context_length", int),
    }
    for key, name in (("short_factor", _SHORT_FACTORS), ("long_factor", _LONG_FACTORS)):
        if name not in gguf.tensors:
            raise CorruptCheckpoint(f"{gguf.path} is incomplete: it has no tensor {name}.")
        scaling[key] = [short_decimal(value) for value in gguf.dequantize(gguf.tensors[name]).ravel().tolist()]
    attention_factor = gguf.get(f"{prefix}.attn_factor", float)
    return scaling if attention_factor is None else scaling | {"attention_factor": attention_factor}


def _llama3_scaling(gguf: GgufFile, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Returns the llama3 parameters that lead to the file's rotary factors, None if these are all one."""
    import numpy as np

    factors = gguf.dequantize(gguf.tensors[ROPE_FACTORS]).ravel()
    if not 0 < theta < math.inf or factors.min() <= 0:
        raise CorruptCheckpoint(f"{gguf.path} is damaged: its rotary embedding has a base or a factor that cannot be.")
    if (factors == 1).all():
        return None
    factor = float(f"{factors.max():.6g}")  # a quotient of float32 numbers, so its last digit is noise
    wavelengths = 2 * math.pi * theta ** (np.arange(len(factors)) / len(factors))
    turns = _LLAMA3_ORIGINAL_CONTEXT / wavelengths
    smooth = (turns - _LLAMA3_LOW_FREQ_FACTOR) / (_LLAMA3_HIGH_FREQ_FACTOR - _LLAMA3_LOW_FREQ_FACTOR)
    smooth = smooth.clip(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if 2 * len(factors) != head_dim or not np.allclose(factors, expected, rtol=1e-3, atol=0):
        raise UnsupportedArchitecture(
            f"{gguf.path}: its rotary factors ({ROPE_FACTORS}) are not those of Llama 3; "
            "use the model's Hugging Face folder."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": _LLAMA3_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
    }
