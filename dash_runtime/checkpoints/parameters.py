"""Names and shapes of a Llama-family model's parameters, as Hugging Face checkpoints spell them.

Knows no files and no tensors: the decoder, the weight reader and the GGUF conversion agree through it.
"""

from collections.abc import Iterable
from dataclasses import replace

from dash_runtime.model_config import ModelConfig, QkNorm

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

_LAYERS = "model.layers."


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter that `config` needs, by name; a tied head has none of its own."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        for name, shape in _layer_shapes(config).items():
            shapes[f"{_LAYERS}{layer}.{name}"] = shape
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.has_tied_head:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def unused_parameter(names: Iterable[str], config: ModelConfig) -> str | None:
    """One of `names` without which the model would be another: of a layer beyond the last, or a bias or norm that the
    layers of `config` do not have. None where there is none.

    Other tensors that `config` does not need, such as tables that old checkpoints hold, mean nothing.
    """
    everything = replace(
        config,
        block=replace(config.block, has_qkv_bias=True, has_output_bias=True, has_mlp_bias=True, qk_norm=QkNorm.HEAD),
    )
    left_out = _layer_shapes(everything).keys() - _layer_shapes(config).keys()
    for name in names:
        if not name.startswith(_LAYERS):
            continue
        layer, _, rest = name.removeprefix(_LAYERS).partition(".")
        if rest in left_out or not layer.isdecimal() or int(layer[:9]) >= config.num_layers:
            return name
    return None


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, mlp = config.hidden_size, config.intermediate_size
    query = config.num_heads * config.head_dim
    key = config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (query, hidden, config.block.has_qkv_bias),
        "self_attn.k_proj": (key, hidden, config.block.has_qkv_bias),
        "self_attn.v_proj": (key, hidden, config.block.has_qkv_bias),
        "self_attn.o_proj": (hidden, query, config.block.has_output_bias),
        "mlp.gate_proj": (mlp, hidden, config.block.has_mlp_bias),
        "mlp.up_proj": (mlp, hidden, config.block.has_mlp_bias),
        "mlp.down_proj": (hidden, mlp, config.block.has_mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.block.qk_norm is not None:
        shapes["self_attn.q_norm.weight"] = (config.head_dim,)
        shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    for name, (rows, columns, has_bias) in linears.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{name}.bias"] = (rows,)
    return shapes
