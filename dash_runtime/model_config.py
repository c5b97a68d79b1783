"""The configuration of a decoder-only model: its sizes, its arithmetic and the names of its tensors.

Independent of the format that the model was read from. Imports no torch.
"""

from dataclasses import dataclass
from enum import StrEnum


class RopeKind(StrEnum):
    """The scaling of rotary frequencies beyond the trained context."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"
    YARN = "yarn"
    LONGROPE = "longrope"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """A rotary position embedding. A field that its kind has no use for means nothing."""

    theta: float
    kind: RopeKind = RopeKind.DEFAULT
    factor: float = 1.0
    low_freq_factor: float = 1.0
    """From here to `high_freq_factor`: llama3's (Llama 3.1 model card)."""
    high_freq_factor: float = 4.0
    original_context_length: int = 8192
    """The context before the scaling: llama3's, yarn's and longrope's."""
    beta_fast: float = 32.0
    """yarn's (Peng et al. 2023): channels with more turns than this in the original context are not scaled."""
    beta_slow: float = 1.0
    """yarn's: channels with fewer turns than this are scaled by `factor`."""
    attention_factor: float = 1.0
    """Multiplies cosines and sines: yarn's and longrope's."""
    short_factors: tuple[float, ...] = ()
    """longrope's (Ding et al. 2024), for each pair of channels, in sequences of up to the original context."""
    long_factors: tuple[float, ...] = ()
    """longrope's, in sequences that may be longer."""
    num_rotated: int | None = None
    """The first so many channels of a head are rotated, the others left alone; None for all."""
    query_growth: float = 0.0
    """β of the queries' factor 1 + β · log(1 + ⌊position / original context⌋) (Llama 4, Ministral 3)."""


class NormPlacement(StrEnum):
    """The normed side of attention and of the MLP."""

    BEFORE = "before"
    """Their inputs, as in Llama."""
    AFTER = "after"
    """Their outputs, before these are added to the residual, as in OLMo 2."""
    BOTH = "both"
    """Inputs and outputs, as in Gemma 2."""


class QkNorm(StrEnum):
    """The channels over which queries and keys are normed."""

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
    """A layer's arithmetic, without its sizes: where model families differ. The defaults are Llama's."""

    norm_placement: NormPlacement = NormPlacement.BEFORE
    norm_offset: float = 0.0
    """Added to the weights of norms as they are stored."""
    activation: Activation = Activation.SILU
    qk_norm: QkNorm | None = None
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    attention_scale: float | None = None
    """Multiplies the products of queries and keys; None: `head_dim ** -0.5`."""
    residual_multiplier: float = 1.0
    """Multiplies the outputs of attention and of the MLP before they are added to the residual."""

    @property
    def has_input_norms(self) -> bool:
        """True if the inputs of attention and of the MLP are normed."""
        return self.norm_placement is not NormPlacement.AFTER

    @property
    def has_output_norms(self) -> bool:
        """True if the outputs of attention and of the MLP are normed."""
        return self.norm_placement is not NormPlacement.BEFORE


@dataclass(frozen=True, slots=True)
class MixtureConfig:
    """The layers whose MLP is a mixture of experts, and the sizes of these."""

    layers: frozenset[int]
    num_experts: int
    num_chosen: int
    """Experts that each row runs."""
    expert_size: int
    """An expert's `intermediate_size`."""
    has_normed_shares: bool
    """True if the shares of a row's experts add up to 1. Otherwise they are the router's probabilities."""


@dataclass(frozen=True, slots=True)
class TensorNames:
    """The names of a checkpoint's modules by role. The defaults are Llama's; OLMo 2's where Llama has no such module.

    A module's tensors are called `<module>.weight` and `<module>.bias`. From `input_norm` on, names are relative to
    `<layers>.<index>`. Names of modules that the layer's `BlockConfig` leaves out mean nothing.
    """

    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layers: str = "model.layers"
    input_norm: str = "input_layernorm"
    attention_output_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    mlp_output_norm: str = "post_feedforward_layernorm"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    query_key_value: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Three matrices, or one that holds their rows in this order."""
    output: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Two matrices, or one that holds their rows in this order."""
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert_gate_up: tuple[str, ...] = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj")
    """As `gate_up`, for each expert, whose number takes the place of `{}`. A name without one is that of a tensor in
    which all experts' matrices are stacked."""
    expert_down: str = "mlp.experts.{}.down_proj"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The configuration of one model.

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
    tensor_names: TensorNames = TensorNames()
    mixture: MixtureConfig | None = None
    """None if no layer has experts."""

    @property
    def query_size(self) -> int:
        """The size of one row's queries together."""
        return self.num_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """The size of one row's keys and values together."""
        return 2 * self.num_kv_heads * self.head_dim

    def matrices(self, layer: int = 0) -> tuple[tuple[int, int], ...]:
        """Returns `(out_features, in_features)` of query-key-value, output, gate-up and down, of each expert too."""
        inner_size = self.mlp_size(layer)
        return (
            (self.query_size + self.key_value_size, self.hidden_size),
            (self.hidden_size, self.query_size),
            (2 * inner_size, self.hidden_size),
            (self.hidden_size, inner_size),
        )

    def mixture_of(self, layer: int) -> MixtureConfig | None:
        """Returns the layer's mixture, None if its MLP is a single one."""
        return self.mixture if self.mixture is not None and layer in self.mixture.layers else None

    def mlp_size(self, layer: int) -> int:
        """Returns the inner width of the layer's MLP, or of each of its experts."""
        mixture = self.mixture_of(layer)
        return self.intermediate_size if mixture is None else mixture.expert_size

    def num_weights(self, layer: int) -> int:
        """Returns the number of weights in the layer's matrices, all experts' included. Leaves out the router."""
        mixture = self.mixture_of(layer)
        return self._num_weights(layer, 1 if mixture is None else mixture.num_experts)

    def num_weights_read(self, layer: int) -> int:
        """Returns the number of weights in the layer's matrices that a row reads: those of its experts only.

        Leaves out the router.
        """
        mixture = self.mixture_of(layer)
        return self._num_weights(layer, 1 if mixture is None else mixture.num_chosen)

    def _num_weights(self, layer: int, num_mlps: int) -> int:
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.hidden_size * (2 * query + 2 * key + 3 * self.mlp_size(layer) * num_mlps)
