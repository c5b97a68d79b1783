"""The frozen model for whole batches of text: plain differentiable operations, with rounded matrices as dense ones.

It computes what the serving decoder computes (a test holds the two together), with a gradient, and faster: its rounded
matrices need no unpacking. INT8 has a scale for each output, as in eager layers: native code's takes longer to make.
Used to learn; whatever is reported ran in the serving decoder. Knows weights and actions; knows no policy, no prices
and no optimiser.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.actions import Action
from dash_runtime.errors import ConfigError
from dash_runtime.layers.attention import causal_mask
from dash_runtime.layers.layer_body import Linears, Norms, after_attention, before_attention, split_heads
from dash_runtime.layers.rotary import RotaryTable, rotary_tables
from dash_runtime.layers.weight_loader import WeightLoader
from dash_runtime.linears.dense_linear import FullLinear, Linear
from dash_runtime.linears.grouped_matrix import Rounding, only
from dash_runtime.linears.quantization import BITS, rounded_linear
from dash_runtime.model_config import ModelConfig

Compensate = Callable[[int, Tensor], Tensor]
"""Maps `(layer, its input [rows, hidden_size])` to what replaces its output; every `Compensation` is one."""
_ROW_MULTIPLE = 32
"""oneDNN makes a program for each number of rows. That takes 2 ms, more than most products, and the program is kept."""


class DenseDecoder:
    """The model's layers, embedding and head, frozen. Gradients reach hidden states and compensation only.

    Args:
        weights: tensors by the names in `config.tensor_names`, in the shapes that `config` asks for.
        actions: the kernels to have; FULL is always among them.
        finer_keys, rounding: as in `WeightLoader`.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        actions: Sequence[Action] = (),
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
        finer_keys: Action | None = Action.INT8,
        rounding: Rounding | None = None,
    ) -> None:
        self.config = config
        self.num_layers = config.num_layers
        self.dtype = dtype
        self.device = torch.device("cpu") if device is None else device
        finer_keys = None if BITS.keys().isdisjoint(actions) else finer_keys
        own = only(rounding or {}, actions)
        loader = WeightLoader(config, weights, dtype, self.device, finer_keys=finer_keys, rounding=own)
        full = [loader.layer(index) for index in range(config.num_layers)]
        self._norms: Sequence[Norms] = full
        router = partial(_product, Action.FULL)
        self._linears = {
            action: [layer.linears.mapped(partial(_product, action), router) for layer in full]
            for action in {Action.FULL, *actions} - {Action.SKIP}
        }
        self._embedding = loader.embedding()
        self.final_norm = loader.final_norm()
        self.head = self._embedding if config.has_tied_head else loader.head()
        self._rotary = self._tables(0)

    def _tables(self, length: int) -> list[RotaryTable]:
        devices = [self.device] * self.config.num_layers
        return rotary_tables(self.config.ropes, self.config.head_dim, length, self.dtype, devices)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Returns `[..., hidden_size]`, the first layer's input."""
        hidden = functional.embedding(token_ids.to(self.device), self._embedding)
        return hidden if self.config.embedding_multiplier == 1 else hidden * self.config.embedding_multiplier

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns float32 `[..., vocab_size]` from the last layer's output `[..., hidden_size]`."""
        logits = functional.linear(self.final_norm(hidden), self.head).float()
        return logits if self.config.logits_multiplier == 1 else logits * self.config.logits_multiplier

    @torch.no_grad()
    def full_states(self, token_ids: Tensor) -> list[Tensor]:
        """Returns each layer's input and the last layer's output at full depth, `[batch, length, hidden_size]`."""
        states = [self.embed(token_ids)]
        for layer in range(self.num_layers):
            states.append(self.run_layer(layer, Action.FULL, states[-1]))
        return states

    def run_layer(
        self,
        layer: int,
        actions: Tensor | Action,
        hidden: Tensor,
        compensate: Compensate | None = None,
        skip_kernel: Action = Action.FULL,
        linears: Mapping[Action, Linears[Linear]] | None = None,
    ) -> Tensor:
        """Returns one layer's output for whole sequences, `[batch, length, hidden_size]`.

        Args:
            actions: one for all, or Action's numbers, `[batch, length]`.
            skip_kernel: projects the keys and values of tokens that skip.
            linears: matrices to run instead of the decoder's own, by action.
        """
        by_kernel = linears or {action: layers[layer] for action, layers in self._linears.items()}
        norms = self._norms[layer]
        groups = _Groups(actions, hidden.shape[:2])
        normed = groups.flat(before_attention(norms, hidden))
        fused = groups.join(
            [
                by_kernel[skip_kernel if action is Action.SKIP else action].query_key_value(rows)
                for action, rows in groups.split(normed)
            ]
        )
        length = hidden.shape[1]
        if length > self._rotary[0].context_length:
            self._rotary = self._tables(length)
        first = self._rotary[layer].first_row(length)
        tables = self._rotary[layer].at(slice(first, first + length))
        parts = split_heads(self.config, norms, fused, self.config.num_heads, *tables)
        attended = groups.flat(self._attend(layer, *(part.transpose(1, 2) for part in parts)))
        outputs = []
        for (action, rows), (_, own) in zip(groups.split(groups.flat(hidden)), groups.split(attended), strict=True):
            if action is Action.SKIP:
                assert compensate is not None
                outputs.append(compensate(layer, rows))
            else:
                outputs.append(after_attention(self.config.block, norms, by_kernel[action], rows, own))
        return groups.join(outputs)

    def _attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Returns causal attention, `[batch, length, num_heads * head_dim]`.

        Written out: the gradient of the fused kernel takes a third of a training step for sequences this short.
        """
        batch, num_heads, length, head_dim = queries.shape
        mask = causal_mask(range(length), range(length), self.config.sliding_window[layer], 1, queries)
        scale = self.config.block.attention_scale
        factors = self._rotary[layer].query_factors
        if factors is not None:
            queries = queries * factors[:length, 0]
        grouped = queries * (head_dim**-0.5 if scale is None else scale)
        grouped = grouped.reshape(batch, keys.shape[1], -1, head_dim)  # the heads of a group share their keys
        scores = torch.matmul(grouped, keys.transpose(2, 3)).view(batch, num_heads, length, length) + mask
        weights = torch.softmax(scores, dim=-1).view(batch, keys.shape[1], -1, length)
        attended = torch.matmul(weights, values).view(batch, num_heads, length, head_dim)
        return attended.transpose(1, 2).flatten(2)


class _Groups:
    """Rows of a batch by action: taken apart, so that each kernel runs its own rows only, and put together again.

    Each group is filled up to a multiple of `_ROW_MULTIPLE` rows, which count for nothing.
    """

    def __init__(self, actions: Tensor | Action, shape: torch.Size) -> None:
        self._shape = shape
        self._order: Tensor | None = None
        if isinstance(actions, Action):
            self._counts = {actions: shape.numel()}
            return
        flat = actions.flatten()
        own = {Action(number): (flat == number).nonzero().flatten() for number in flat.unique().tolist()}
        if len(own) == 1:
            self._counts = {action: len(rows) for action, rows in own.items()}
            return
        self._counts = {action: -(-len(rows) // _ROW_MULTIPLE) * _ROW_MULTIPLE for action, rows in own.items()}
        self._order = torch.cat([_filled_up(rows, self._counts[action]) for action, rows in own.items()])
        starts = accumulate(self._counts.values(), initial=0)
        places = [torch.arange(start, start + len(rows)) for start, rows in zip(starts, own.values(), strict=False)]
        self._places = torch.cat(places)[torch.cat(list(own.values())).argsort()]

    def flat(self, rows: Tensor) -> Tensor:
        """Returns `[batch, rows, …]` as `[all rows, …]`."""
        return rows.flatten(0, 1)

    def split(self, rows: Tensor) -> list[tuple[Action, Tensor]]:
        """Returns each action's rows of `[all rows, …]`."""
        ordered = rows if self._order is None else _Apart.apply(rows, self._order, self._places)
        return list(zip(self._counts, ordered.split(list(self._counts.values())), strict=True))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Returns `[batch, rows, …]` from each action's rows, in the order of `split`."""
        whole = parts[0] if self._order is None else _Together.apply(torch.cat(list(parts)), self._places)
        return whole.unflatten(0, self._shape)


def _filled_up(rows: Tensor, count: int) -> Tensor:
    """Returns the row numbers with the last one repeated, `[count]`."""
    return torch.cat([rows, rows[-1:].expand(count - len(rows))])


class _Apart(torch.autograd.Function):
    """Rows in the order of their groups. The gradient of plain indexing adds rows up one by one; here only a row's own
    place has one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradients[0].index_select(0, places), None, None


class _Together(torch.autograd.Function):
    """Rows in their own order again, out of groups; the rows that fill groups up have no gradient."""

    @staticmethod
    def forward(ctx: Any, grouped: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = grouped.shape
        return grouped.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return gradients[0].new_zeros(ctx.shape).index_copy_(0, places, gradients[0]), None


def _product(action: Action, full: FullLinear) -> Linear:
    """Returns the product with the matrix that `action` computes with, as a dense one."""
    own = full if action is Action.FULL else rounded_linear(action, full)

    def product(rows: Tensor) -> Tensor:
        num_missing = -len(rows) % _ROW_MULTIPLE  # an expert may have any number of rows
        return own(functional.pad(rows, (0, 0, 0, num_missing)))[: len(rows)] if num_missing else own(rows)

    return product


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
