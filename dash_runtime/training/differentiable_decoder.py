"""A pass through the frozen model that gradients flow through: each layer's output is blended with its compensation.

It computes what the serving decoder computes with FULL and SKIP (a test holds the two together), in plain
differentiable operations instead of packed kernels and caches. Knows weights, gates and compensation; knows no policy,
no prices and no optimiser.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dash_runtime.errors import ConfigError
from dash_runtime.layers.attention import causal_mask
from dash_runtime.layers.layer_body import run_layer_body, split_heads
from dash_runtime.layers.rotary import RotaryTable, rotary_tables
from dash_runtime.layers.weight_loader import WeightLoader
from dash_runtime.model_config import ModelConfig

Gates = Callable[[int, Tensor], Tensor | None]
"""Maps `(layer, its input [batch, length, hidden_size])` to the share of the layer's own output in the blend,
`[batch, length, 1]` in 0…1; None if the layer runs in full for all."""

Compensate = Callable[[int, Tensor], Tensor]
"""Maps `(layer, its input [rows, hidden_size])` to what replaces its output; every `Compensation` is one."""

_LOGIT_ROWS = 128


class DifferentiableDecoder:
    """The model's layers, embedding and head, frozen. Gradients reach hidden states, gates and compensation only.

    Args:
        weights: tensors by the names in `config.tensor_names`, in the shapes that `config` asks for.
        recomputes_layers: if True, keep only each layer's input for the backward pass and run the layer again there.
            That takes a third more time, and a small part of the memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
        recomputes_layers: bool = False,
    ) -> None:
        self.config = config
        self.num_layers = config.num_layers
        self.dtype = dtype
        self.device = torch.device("cpu") if device is None else device
        self._recomputes_layers = recomputes_layers
        loader = WeightLoader(config, weights, dtype, self.device)
        self._layers = [loader.layer(index) for index in range(config.num_layers)]
        self._embedding = loader.embedding()
        self._final_norm = loader.final_norm()
        self._head = self._embedding if config.has_tied_head else loader.head()
        self._rotary = self._tables(0)

    def _tables(self, length: int) -> list[RotaryTable]:
        return rotary_tables(self.config.ropes, self.config.head_dim, length, self.dtype, self.device)

    def run(self, token_ids: Tensor, gates: Gates, compensate: Compensate) -> Tensor:
        """Returns the last layer's output, `[batch, length, hidden_size]`, for int64 `[batch, length]`, teacher-forced.

        A layer passes on `g · layer(hidden) + (1 − g) · compensate(layer, hidden)`. Keys and values come from the
        layer's input in every row, whatever its gate (the KV rule). `gates` is called once per layer, in order.
        """
        length = token_ids.shape[1]
        if length > len(self._rotary[0].cosines):
            self._rotary = self._tables(length)
        hidden = functional.embedding(token_ids.to(self.device), self._embedding)
        if self.config.embedding_multiplier != 1:
            hidden = hidden * self.config.embedding_multiplier
        for layer in range(self.num_layers):
            gate = gates(layer, hidden)
            if self._recomputes_layers and torch.is_grad_enabled():
                hidden = checkpoint(
                    self._blend, layer, hidden, gate, compensate, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = self._blend(layer, hidden, gate, compensate)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns float32 `[..., vocab_size]` from the last layer's output `[..., hidden_size]`."""
        logits = functional.linear(self._final_norm(hidden), self._head).float()
        return logits if self.config.logits_multiplier == 1 else logits * self.config.logits_multiplier

    def _blend(self, layer: int, hidden: Tensor, gate: Tensor | None, compensate: Compensate) -> Tensor:
        outputs = self._run_layer(layer, hidden)
        if gate is None:
            return outputs
        compensated = compensate(layer, hidden.flatten(0, 1)).view_as(hidden)
        # lerp is exact at 0 and 1, and its slope takes the difference before it multiplies. The two outputs are large
        # and alike, so separate products would cancel badly in bf16.
        return torch.lerp(compensated, outputs, gate.to(hidden.dtype))

    def _run_layer(self, layer: int, hidden: Tensor) -> Tensor:
        weights = self._layers[layer]
        return run_layer_body(self.config.block, weights, weights, hidden, partial(self._attend, layer))

    def _attend(self, layer: int, normed: Tensor) -> Tensor:
        """Returns causal attention, `[batch, length, num_heads * head_dim]`."""
        config, weights = self.config, self._layers[layer]
        length = normed.shape[1]
        fused, tables = weights.query_key_value(normed), self._rotary[layer].at(slice(length))
        parts = split_heads(config, weights, fused, config.num_heads, *tables)
        queries, keys, values = (part.transpose(1, 2) for part in parts)
        # Repeated keys, since enable_gqa takes a slow path in bf16 on CPUs.
        group = config.num_heads // config.num_kv_heads
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        window, scale = config.sliding_window[layer], config.block.attention_scale
        if window is None or window >= length:
            attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
        else:
            mask = causal_mask(range(length), range(length), window, 1, queries)
            attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
        return attended.transpose(1, 2).flatten(2)


def all_full(layer: int, hidden: Tensor) -> None:
    """The gates of full depth."""


def pass_on(layer: int, hidden: Tensor) -> Tensor:
    """The compensation of full depth, which never uses it."""
    return hidden


def fixed_gates(skipped: Tensor) -> Gates:
    """Returns gates of 0 where bool `skipped` `[num_layers, batch, length]` is true, and 1 elsewhere."""
    is_whole = [not bool(layer.any()) for layer in skipped]

    def gates(layer: int, hidden: Tensor) -> Tensor | None:
        if is_whole[layer]:
            return None
        return (~skipped[layer]).unsqueeze(-1).to(hidden.device, hidden.dtype)

    return gates


def keep_prompts(gates: Gates, num_prompt_tokens: int) -> Gates:
    """Returns the same gates, except that each sequence's first `num_prompt_tokens` positions run in full."""

    def kept(layer: int, hidden: Tensor) -> Tensor | None:
        gate = gates(layer, hidden)
        if gate is None:
            return None
        return torch.cat((torch.ones_like(gate[:, :num_prompt_tokens]), gate[:, num_prompt_tokens:]), dim=1)

    return kept


def token_batch(sequences: Sequence[Sequence[int]], num_prompt_tokens: int) -> Tensor:
    """Returns the sequences as int64 `[batch, length]`.

    Raises:
        ConfigError: there are none, they differ in length, or they are all prompt.
    """
    lengths = {len(ids) for ids in sequences}
    if len(lengths) != 1:
        raise ConfigError("sequences", f"must be of one length, found {sorted(lengths) or 'none'}")
    if num_prompt_tokens >= min(lengths):
        raise ConfigError("num_prompt_tokens", f"must be less than the sequences' {min(lengths)} tokens")
    return torch.tensor([list(ids) for ids in sequences])


def row_divergences(decoder: DifferentiableDecoder, full: Tensor, ours: Tensor) -> Tensor:
    """Returns KL(full-depth distribution ‖ ours) in nats for each row, float32 `[rows]`, differentiable in `ours`.

    Both inputs are last-layer outputs, `[rows, hidden_size]`. Logits exist for only a few rows at a time, in the
    backward pass too.
    """
    divergence: Tensor = _RowDivergences.apply(ours, full, decoder)
    return divergence


class _RowDivergences(torch.autograd.Function):
    """Computes divergences and, in the same pass, their slopes: each depends on the state of its own row alone."""

    @staticmethod
    def forward(ctx: Any, ours: Tensor, full: Tensor, decoder: DifferentiableDecoder) -> Tensor:
        divergences, slopes = [], []
        for reference_rows, rows in zip(full.split(_LOGIT_ROWS), ours.split(_LOGIT_ROWS), strict=True):
            reference = torch.log_softmax(decoder.logits(reference_rows), dim=-1)
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                leaf = rows.detach().requires_grad_(ctx.needs_input_grad[0])
                adaptive = torch.log_softmax(decoder.logits(leaf), dim=-1)
                own = (reference.exp() * (reference - adaptive)).sum(dim=-1)
                if ctx.needs_input_grad[0]:
                    slopes.append(torch.autograd.grad(own.sum(), leaf)[0])
            divergences.append(own.detach())
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(divergences)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradients[0].unsqueeze(-1).to(slopes.dtype), None, None
