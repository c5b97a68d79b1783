"""The names and shapes of a model's parameters.

Knows no files and no tensors: the weight reader and the GGUF conversion agree through it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from dash_runtime.model_config import BlockConfig, ModelConfig, NormPlacement, QkNorm


class Parameter(NamedTuple):
    """A tensor that a model needs, or one of each of a layer's experts, all of one shape."""

    names: tuple[str, ...]
    shape: tuple[int, ...]


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Yields the parameters that `config` needs. A tied head has none of its own."""
    names = config.tensor_names
    yield Parameter((f"{names.embedding}.weight",), (config.vocab_size, config.hidden_size))
    for layer in range(config.num_layers):
        for own in _layer_parameters(config, layer):
            yield Parameter(tuple(f"{names.layers}.{layer}.{name}" for name in own.names), own.shape)
    yield Parameter((f"{names.final_norm}.weight",), (config.hidden_size,))
    if not config.has_tied_head:
        yield Parameter((f"{names.head}.weight",), (config.vocab_size, config.hidden_size))


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor that `config` needs, by name."""
    return {name: own.shape for own in parameters(config) for name in own.names}


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
    left_out = _layer_names(config, everything) - _layer_names(config, config.block)
    layers = f"{config.tensor_names.layers}."
    for name in names:
        if not name.startswith(layers):
            continue
        layer, _, rest = name.removeprefix(layers).partition(".")
        if rest in left_out or not layer.isdecimal() or int(layer[:9]) >= config.num_layers:
            return name
    return None


def _layer_names(config: ModelConfig, block: BlockConfig) -> set[str]:
    """Returns the names of the tensors of all layers, relative to their layer, if they had this block."""
    own = replace(config, block=block)
    return {name for layer in range(own.num_layers) for each in _layer_parameters(own, layer) for name in each.names}


def _layer_parameters(config: ModelConfig, layer: int) -> Iterator[Parameter]:
    """Yields a layer's parameters, with names relative to the layer."""
    names, block, mixture = config.tensor_names, config.block, config.mixture_of(layer)
    hidden, mlp = config.hidden_size, config.mlp_size(layer)
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for name in layer_norms(config):
        yield Parameter((f"{name}.weight",), (hidden,))
    if block.qk_norm is not None:
        is_per_head = block.qk_norm is QkNorm.HEAD
        yield Parameter((f"{names.query_norm}.weight",), (config.head_dim if is_per_head else query,))
        yield Parameter((f"{names.key_norm}.weight",), (config.head_dim if is_per_head else key,))
    num_experts, gate_up, down = None, names.gate_up, names.down
    if mixture is not None:
        num_experts, gate_up, down = mixture.num_experts, names.expert_gate_up, names.expert_down
        yield Parameter((f"{names.router}.weight",), (mixture.num_experts, hidden))
    linears = (
        (None, names.query_key_value, (query, key, key), hidden, block.has_qkv_bias),
        (None, (names.output,), (hidden,), query, block.has_output_bias),
        (num_experts, gate_up, (mlp, mlp), hidden, block.has_mlp_bias),
        (num_experts, (down,), (hidden,), mlp, block.has_mlp_bias),
    )
    for count, modules, part_rows, columns, has_bias in linears:
        all_rows = part_rows if len(modules) == len(part_rows) else (sum(part_rows),)
        for module, rows in zip(modules, all_rows, strict=True):
            yield _of_each_expert(f"{module}.weight", (rows, columns), count)
            if has_bias:
                yield _of_each_expert(f"{module}.bias", (rows,), count)


def _of_each_expert(name: str, shape: tuple[int, ...], num_experts: int | None) -> Parameter:
    """Returns the parameter with this name in each expert, or with this name alone if there are none."""
    if num_experts is None:
        return Parameter((name,), shape)
    if "{}" not in name:
        return Parameter((name,), (num_experts, *shape))
    return Parameter(tuple(name.format(number) for number in range(num_experts)), shape)
