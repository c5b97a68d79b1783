"""The names and shapes of a model's parameters.

Knows no files and no tensors: the weight reader and the GGUF conversion agree through it.
"""

from collections.abc import Iterable
from dataclasses import replace

from dash_runtime.model_config import ModelConfig, NormPlacement, QkNorm


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter that `config` needs, by name. A tied head has no parameter of its own."""
    names = config.tensor_names
    shapes: dict[str, tuple[int, ...]] = {f"{names.embedding}.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        for name, shape in _layer_shapes(config).items():
            shapes[f"{names.layers}.{layer}.{name}"] = shape
    shapes[f"{names.final_norm}.weight"] = (config.hidden_size,)
    if not config.has_tied_head:
        shapes[f"{names.head}.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def layer_norms(config: ModelConfig) -> list[str]:
    """Returns the names of the norms that each layer has, as it runs them, without those of queries and keys."""
    names, block = config.tensor_names, config.block
    norms = (
        (names.input_norm, block.has_input_norms),
        (names.attention_output_norm, block.has_output_norms),
        (names.mlp_norm, block.has_input_norms),
        (names.mlp_output_norm, block.has_output_norms),
    )
    return [name for name, is_present in norms if is_present]


def unused_parameter(names: Iterable[str], config: ModelConfig) -> str | None:
    """Returns one of `names` that would make another model of it, None if there is none.

    It belongs to a layer beyond the last, or is a bias or norm that the layers of `config` do not have. Other tensors
    that `config` does not need, such as tables in old checkpoints, mean nothing.
    """
    everything = replace(
        config.block,
        norm_placement=NormPlacement.BOTH,
        qk_norm=QkNorm.HEAD,
        has_qkv_bias=True,
        has_output_bias=True,
        has_mlp_bias=True,
    )
    left_out = _layer_shapes(replace(config, block=everything)).keys() - _layer_shapes(config).keys()
    layers = f"{config.tensor_names.layers}."
    for name in names:
        if not name.startswith(layers):
            continue
        layer, _, rest = name.removeprefix(layers).partition(".")
        if rest in left_out or not layer.isdecimal() or int(layer[:9]) >= config.num_layers:
            return name
    return None


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    names, block = config.tensor_names, config.block
    hidden, mlp = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = (
        (names.query_key_value, (query, key, key), hidden, block.has_qkv_bias),
        ((names.output,), (hidden,), query, block.has_output_bias),
        (names.gate_up, (mlp, mlp), hidden, block.has_mlp_bias),
        ((names.down,), (hidden,), mlp, block.has_mlp_bias),
    )
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (hidden,) for name in layer_norms(config)}
    if block.qk_norm is not None:
        is_per_head = block.qk_norm is QkNorm.HEAD
        shapes[f"{names.query_norm}.weight"] = (config.head_dim if is_per_head else query,)
        shapes[f"{names.key_norm}.weight"] = (config.head_dim if is_per_head else key,)
    for modules, part_rows, columns, has_bias in linears:
        all_rows = part_rows if len(modules) == len(part_rows) else (sum(part_rows),)
        for module, rows in zip(modules, all_rows, strict=True):
            shapes[f"{module}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{module}.bias"] = (rows,)
    return shapes
