"""Models and policies with random weights, in the shapes of real ones. Knows shapes and seeds; reads no files."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.memory import head_bytes, layer_bytes
from dash_runtime.actions import Action, CostTable
from dash_runtime.layers.compensation import Compensation, LowRank, packed
from dash_runtime.model_config import BlockConfig, ModelConfig, RopeConfig, RopeKind
from dash_runtime.policy.budgets import BudgetCalibration
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.network import PolicyNetwork
from dash_runtime.policy.plan_spec import PlanSpec

MAX_CONTEXT = 4096
"""Positions in the rotary tables."""
_EMBEDDING_SPREAD = 0.02
"""Small beside the layers' outputs: a tied head would otherwise repeat its input for ever."""
_POLICY_WIDTHS = (64, 32)
_COMPENSATION_RANK = 96
_QUANTISING_BYTES = 20
"""Bytes per weight of the largest matrix, the head, while it is rounded to INT8."""


def _llama(
    name: str,
    rope: RopeConfig,
    *,
    num_layers: int,
    hidden_size: int,
    heads: tuple[int, int, int],
    intermediate_size: int,
    vocab_size: int,
    has_tied_head: bool,
) -> ModelConfig:
    """`heads`: number of query heads, number of key heads, channels of each."""
    num_heads, num_kv_heads, head_dim = heads
    return ModelConfig(
        name=name,
        architecture="LlamaForCausalLM",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
        rms_norm_eps=1e-5,
        context_length=MAX_CONTEXT,
        block=BlockConfig(),
        ropes=(rope,) * num_layers,
        sliding_window=(None,) * num_layers,
        has_tied_head=has_tied_head,
        eos_token_ids=frozenset(),
    )


SHAPES: Mapping[str, ModelConfig] = {
    "tiny": _llama(
        "tiny",
        RopeConfig(1e4),
        num_layers=6,
        hidden_size=128,
        heads=(4, 2, 32),
        intermediate_size=256,
        vocab_size=512,
        has_tied_head=True,
    ),
    "135m": _llama(
        "SmolLM2-135M",
        RopeConfig(1e5),
        num_layers=30,
        hidden_size=576,
        heads=(9, 3, 64),
        intermediate_size=1536,
        vocab_size=49152,
        has_tied_head=True,
    ),
    "8b": _llama(
        "Llama-3.1-8B",
        RopeConfig(5e5, RopeKind.LLAMA3, factor=8.0),
        num_layers=32,
        hidden_size=4096,
        heads=(32, 8, 128),
        intermediate_size=14336,
        vocab_size=128256,
        has_tied_head=False,
    ),
}
"""Smallest first."""


def drawn_on(device: torch.device) -> torch.device:
    """Returns where random numbers for a device are drawn: there, if it can do so. On a host 8B would take a minute."""
    return device if device.type == "cuda" else torch.device("cpu")


class RandomWeights(Mapping[str, Tensor]):
    """A Llama's tensors by name. Each is made when it is asked for, always with the same numbers.

    Args:
        made_on: where the numbers are drawn. They differ between kinds of devices.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, made_on: torch.device, seed: int = 0) -> None:
        self._shapes = tensor_shapes(config)
        self._dtype = dtype
        self._device = made_on
        self._seed = seed

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        numbers = torch.randn(shape, generator=generator, device=self._device, dtype=self._dtype)
        if len(shape) == 1:
            return numbers.mul_(0.1).add_(1)
        is_vocabulary = name.startswith(("model.embed_tokens", "lm_head"))
        return numbers.mul_(_EMBEDDING_SPREAD if is_vocabulary else shape[1] ** -0.5)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a Llama's tensors by name; it has no biases."""
    names, hidden = config.tensor_names, config.hidden_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    outer: dict[str, tuple[int, ...]] = {
        names.embedding: (config.vocab_size, hidden),
        names.final_norm: (hidden,),
    }
    if not config.has_tied_head:
        outer[names.head] = (config.vocab_size, hidden)
    inner: dict[str, tuple[int, ...]] = {
        names.input_norm: (hidden,),
        names.mlp_norm: (hidden,),
        **{name: (size, hidden) for name, size in zip(names.query_key_value, (query, key, key), strict=True)},
        names.output: (hidden, query),
        **dict.fromkeys(names.gate_up, (config.intermediate_size, hidden)),
        names.down: (hidden, config.intermediate_size),
    }
    layers = {
        f"{names.layers}.{layer}.{name}": shape for layer in range(config.num_layers) for name, shape in inner.items()
    }
    return {f"{name}.weight": shape for name, shape in {**outer, **layers}.items()}


def matrix_shapes(config: ModelConfig) -> set[tuple[int, int]]:
    """Returns the `(out_features, in_features)` of a layer's matrices as they are packed."""
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    return {(query + 2 * key, hidden), (2 * key, hidden), (hidden, query), (2 * inner, hidden), (hidden, inner)}


def cached_bytes(config: ModelConfig) -> int:
    """Returns the bytes of one token's keys and values in a layer, in bf16."""
    return 2 * 2 * config.num_kv_heads * config.head_dim


def needed_bytes(config: ModelConfig, actions: Sequence[Action], cache_tokens: int) -> float:
    """Returns the device's memory that a model in bf16 takes at most: matrices, cache, and the whole step's embedding.

    While the head is rounded, that takes more than the cache. A tenth is added for graphs and workspaces, a guess.
    """
    numbers = range(config.num_layers)
    layers = sum(layer_bytes(config, layer, own, is_native=False) for layer in numbers for own in actions)
    matrix = head_bytes(config, Action.FULL)
    heads = matrix + (head_bytes(config, Action.INT8) if Action.INT8 in actions else 0)
    embeddings = matrix if config.has_tied_head else 2 * matrix
    rounding = _QUANTISING_BYTES * matrix / 2 if Action.INT8 in actions else 0
    cache = cache_tokens * config.num_layers * cached_bytes(config)
    return 1.1 * (layers + heads + embeddings + max(rounding, cache))


def some_costs(num_layers: int) -> CostTable:
    """Returns costs that nobody measured. Policies here only pass them around."""
    layer = {Action.SKIP: 0.1, Action.INT4: 0.4, Action.INT8: 0.6, Action.FULL: 1.0}
    return CostTable.from_seconds(num_layers, layer, {Action.INT8: 1.0, Action.FULL: 2.0})


def random_compensation(config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Compensation:
    """Returns a low-rank map of the shipped policies' rank, in the form that the device serves."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(_COMPENSATION_RANK, config.hidden_size // 4)
    shape = (config.num_layers, rank, config.hidden_size)
    down, up = (torch.randn(shape, generator=generator) * config.hidden_size**-0.5 for _ in range(2))
    offsets = 0.1 * torch.randn(shape[0], shape[2], generator=generator)
    return packed(LowRank(down, up.transpose(1, 2).contiguous(), offsets).to(device), dtype)


def random_policy(
    config: ModelConfig,
    actions: Sequence[Action],
    heads: Sequence[Action],
    compensation: Compensation,
    device: torch.device,
    lookahead: int = 1,
    seed: int = 0,
) -> LearnedPolicy:
    """Returns a network in the shipped policies' shape that has learned nothing: it takes every action somewhere.

    It decides each layer by itself, and leaves the last and the first `lookahead` in FULL.
    """
    pinned = dict.fromkeys([*range(lookahead), config.num_layers - 1], Action.FULL)
    head = Action.INT8 if Action.INT8 in heads else Action.FULL
    spec = PlanSpec(tuple(sorted(actions)), pinned, lookahead, 1, head, some_costs(config.num_layers))
    sizes = (spec.num_evaluations, 1, len(spec.actions), config.hidden_size, len(Action), *_POLICY_WIDTHS)
    generator = torch.Generator().manual_seed(seed)
    network = PolicyNetwork(
        **{
            name: torch.randn(shape, generator=generator) * (1 if name.endswith("bias") else shape[-1] ** -0.5)
            for name, shape in PolicyNetwork.shapes(*sizes).items()
        }
    )
    # Unlearned damages hardly depend on the state. Larger last weights make plans differ from token to token.
    network = replace(network, output_weight=network.output_weight * 4)
    name = f"random-lookahead-{lookahead}"
    return LearnedPolicy(name, network.to(device), spec, compensation, BudgetCalibration(()))
