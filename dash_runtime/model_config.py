"""The shape of a decoder-only model, independent of where it came from. Imports no torch."""

from dataclasses import dataclass
from enum import StrEnum


class RopeKind(StrEnum):
    """How rotary frequencies are scaled beyond the trained context."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. The fields after `factor` are llama3's (Llama 3.1 model card)."""

    theta: float
    kind: RopeKind = RopeKind.DEFAULT
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192


class NormPlacement(StrEnum):
    """Which side of attention and MLP is normed."""

    BEFORE = "before"
    """Their inputs, as in Llama."""
    AFTER = "after"
    """Their outputs, before these are added to the residual, as in OLMo 2."""
    BOTH = "both"
    """As in Gemma 2."""


class QkNorm(StrEnum):
    """Over what queries and keys are normed."""

    HEAD = "head"
    """Each head by itself, as in Qwen3."""
    WIDTH = "width"
    """All heads together, as in OLMo 2."""


class Activation(StrEnum):
    """The gate's function in the MLP."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"


@dataclass(frozen=True, slots=True)
class BlockConfig:
    """What a layer computes, beside its sizes: where the families of models differ. The defaults are Llama's."""

    norm_placement: NormPlacement = NormPlacement.BEFORE
    norm_offset: float = 0.0
    """Added to the weights of norms as they are stored."""
    activation: Activation = Activation.SILU
    qk_norm: QkNorm | None = None
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    attention_scale: float | None = None
    """Of the products of queries and keys; None: `head_dim ** -0.5`."""
    residual_multiplier: float = 1.0
    """Of what attention and MLP add to the residual."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of one model.

    `ropes[layer]` is the layer's rotary embedding, None for none. `sliding_window[layer]` is the number of latest
    positions that the layer attends to, its own included, or None for all.
    """

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    context_length: int
    block: BlockConfig
    ropes: tuple[RopeConfig | None, ...]
    sliding_window: tuple[int | None, ...]
    has_tied_head: bool
    eos_token_ids: frozenset[int]
    embedding_multiplier: float = 1.0
    logits_multiplier: float = 1.0
