"""A whole decode step at full depth as one graph: what a decoder that decides nothing can reach.

Embedding, layers, head and the choice of the next token are one function of static tensors. It runs the layers' own
arithmetic, and attention over all positions that are reserved, with a mask. Knows layers; knows no actions.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_once.decoding import TokenIds
from benchmarks.gpu_once.graphs import layers_of
from dash_runtime.actions import Action
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.devices.cuda_graphs import Capture, Replay
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.layers.layer_body import run_layer_body, split_heads
from dash_runtime.layers.rotary import rotary_tables

_POSITION_MULTIPLE = 64
_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # cuDNN would plan, and flash takes no mask


class WholeStep:
    """One row per cache, whose keys and values are copied.

    Args:
        embedding: `[vocab_size, hidden_size]`.
        num_more: steps that a run may take.
    """

    @torch.inference_mode()
    def __init__(
        self, decoder: Decoder, embedding: Tensor, caches: Sequence[SequenceCache], num_more: int, capture: Capture
    ) -> None:
        config, device = decoder.config, decoder.device
        self._config = config
        self._embedding = embedding
        self._layers = layers_of(decoder)
        self._head = decoder.heads[Action.FULL]
        self._starts = [cache.length for cache in caches]
        num_positions = -(-(max(self._starts) + num_more) // _POSITION_MULTIPLE) * _POSITION_MULTIPLE
        (table,) = set(rotary_tables(config.ropes, config.head_dim, num_positions, decoder.dtype, decoder.devices))
        self._rotary = table
        shape = (len(caches), num_positions, config.num_kv_heads, config.head_dim)
        self._keys, self._values = (
            [torch.zeros(shape, dtype=decoder.dtype, device=device) for _ in self._layers] for _ in range(2)
        )
        for row, cache in enumerate(caches):
            for layer in range(config.num_layers):
                self._keys[layer][row, : cache.length] = cache.keys[layer][: cache.length]
                self._values[layer][row, : cache.length] = cache.values[layer][: cache.length]
        self._places = torch.arange(num_positions, device=device)
        self._rows = torch.arange(len(caches), device=device)
        self._positions = torch.tensor(self._starts, device=device)
        self._token_ids = torch.zeros(len(caches), dtype=torch.int64, device=device)
        self.logits: Tensor
        """The latest step's, float32 `[rows, vocab_size]`. A captured step writes them to the same place."""
        with sdpa_kernel(_BACKENDS):
            self._step = capture(self.step)

    @torch.inference_mode()
    def run(self, first_ids: TokenIds, num_steps: int) -> list[TokenIds]:
        """Returns the most likely tokens by step, and goes on with them. They are read after each step."""
        self._token_ids.copy_(torch.tensor(first_ids))
        self._positions.copy_(torch.tensor(self._starts))
        tokens = []
        with sdpa_kernel(_BACKENDS):  # where a step is not captured
            for _ in range(num_steps):
                self._step()
                tokens.append(self._token_ids.tolist())
        return tokens

    def step(self) -> None:
        """Runs the rows' tokens at their positions; puts the next ones in their places."""
        hidden = functional.embedding(self._token_ids, self._embedding)
        cosines, sines = self._rotary.cosines[self._positions], self._rotary.sines[self._positions]
        is_hidden = self._places > self._positions.unsqueeze(1)
        mask = torch.zeros(is_hidden.shape, dtype=hidden.dtype, device=hidden.device)
        mask = mask.masked_fill_(is_hidden, float("-inf"))[:, None, None]  # [rows, 1, 1, positions]
        for layer, weights in enumerate(self._layers):
            linears = weights.linears[Action.FULL]

            def attend(normed: Tensor, layer: int = layer) -> Tensor:
                weights = self._layers[layer]
                fused = weights.linears[Action.FULL].query_key_value(normed)
                heads = split_heads(self._config, weights, fused, self._config.num_heads, cosines, sines)
                return self._attend(layer, *heads, mask)

            hidden = run_layer_body(self._config.block, weights, linears, hidden, attend)
        self.logits = self._head(hidden)
        self._token_ids.copy_(self.logits.argmax(-1))
        self._positions.add_(1)

    def _attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Writes the rows' keys and values, and attends; returns `[rows, num_heads * head_dim]`."""
        self._keys[layer].index_put_((self._rows, self._positions), keys)
        self._values[layer].index_put_((self._rows, self._positions), values)
        # [rows, num_kv_heads, heads of a group or positions, head_dim]
        folded = queries.unflatten(1, (self._config.num_kv_heads, -1))
        own = self._keys[layer].transpose(1, 2), self._values[layer].transpose(1, 2)
        mask = mask.expand(*folded.shape[:3], -1)
        attended = functional.scaled_dot_product_attention(folded, *own, attn_mask=mask)
        return attended.flatten(1)


def as_it_is(step: Callable[[], None]) -> Replay:
    """Captures nothing."""
    return step
