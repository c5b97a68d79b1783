"""The description of a model family: how its checkpoints spell what `ModelConfig` says.

A new family is a file with a subclass, and one line in `families/__init__.py`. Every default is Llama's. Knows keys and
names; knows no tensors, no kernels and no file formats.
"""

from collections.abc import Mapping
from typing import ClassVar

from dash_runtime.families.config_reader import ConfigReader
from dash_runtime.families.gguf_header import GgufHeader
from dash_runtime.model_config import Activation, BlockConfig, MixtureConfig, ModelConfig, RopeConfig, TensorNames

GGUF_NAMES = TensorNames(
    embedding="token_embd",
    final_norm="output_norm",
    head="output",
    layers="blk",
    input_norm="attn_norm",
    attention_output_norm="post_attention_norm",
    mlp_norm="ffn_norm",
    mlp_output_norm="post_ffw_norm",
    query_norm="attn_q_norm",
    key_norm="attn_k_norm",
    query_key_value=("attn_q", "attn_k", "attn_v"),
    output="attn_output",
    gate_up=("ffn_gate", "ffn_up"),
    down="ffn_down",
    router="ffn_gate_inp",
    expert_gate_up=("ffn_gate_exps", "ffn_up_exps"),
    expert_down="ffn_down_exps",
)
"""llama.cpp's names (gguf-py/gguf/constants.py)."""


class Family:
    """A model family. The methods that take a `ConfigReader` may raise what it raises."""

    architecture: ClassVar[str]
    """The family's entry in `architectures` of config.json, such as `LlamaForCausalLM`."""
    model_type: ClassVar[str]
    """The family's `model_type` in config.json. transformers has a configuration class for it."""
    tensor_names: ClassVar[TensorNames] = TensorNames()
    activations: ClassVar[Mapping[str, Activation]] = {"silu": Activation.SILU}
    """The supported values of `activation_key`."""
    activation_key: ClassVar[str] = "hidden_act"
    gguf_architecture: ClassVar[str | None] = None
    """The family's `general.architecture` in GGUF files. None: its GGUF files are not read."""
    gguf_tensor_names: ClassVar[TensorNames] = GGUF_NAMES

    def block(self, config: ConfigReader) -> BlockConfig:
        """Returns the arithmetic of the layers."""
        has_attention_bias = config.flag("attention_bias")
        return BlockConfig(
            activation=config.activation(self.activation_key, self.activations),
            has_qkv_bias=has_attention_bias,
            has_output_bias=has_attention_bias,
            has_mlp_bias=config.flag("mlp_bias"),
        )

    def ropes(self, config: ConfigReader) -> tuple[RopeConfig | None, ...]:
        """Returns the rotary embedding of each layer, None for none."""
        return (config.rope(),) * config.size("num_hidden_layers")

    def sliding_window(self, config: ConfigReader) -> tuple[int | None, ...]:
        """Returns the sliding window of each layer, None for none."""
        return (None,) * config.size("num_hidden_layers")

    def mixture(self, config: ConfigReader) -> MixtureConfig | None:
        """Returns the mixtures of experts, None if all layers have a single MLP."""
        return None

    def embedding_multiplier(self, config: ConfigReader) -> float:
        """Returns the factor of the embedding's output."""
        return 1.0

    def logits_multiplier(self, config: ConfigReader) -> float:
        """Returns the factor of the logits."""
        return 1.0

    def is_in_gguf(self, gguf: GgufHeader) -> bool:
        """Returns True if a file of `gguf_architecture` is of this family. Families may share an architecture."""
        return True

    def keys_from_gguf(self, gguf: GgufHeader) -> dict[str, object]:
        """Returns the keys of config.json that this family has beside those that all families share."""
        names = self.gguf_tensor_names
        return {"attention_bias": f"{names.layers}.0.{names.query_key_value[0]}.bias" in gguf.tensors}

    def rope_keys_from_gguf(
        self, gguf: GgufHeader, theta: float, scaling: dict[str, object] | None
    ) -> dict[str, object]:
        """Returns the keys of config.json for a rotary embedding with this base and this `rope_scaling`."""
        # The older pair of keys is read by every version of transformers, and by other engines.
        return {"rope_theta": theta, "rope_scaling": scaling}

    def gguf_permuted_heads(self, config: ModelConfig) -> Mapping[str, int]:
        """Returns the modules whose rows llama.cpp reorders for its rotary embedding, with their numbers of heads."""
        return {}
