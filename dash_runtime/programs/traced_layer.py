"""The parts of a decoder that are compiled, written for Inductor. To be traced, not run eagerly.

They are a layer for one row or for a few of one sequence, norm and attention for rows that share products, and the
head; `traced_skip.py` has skipped layers. They compute the same as `layer_body.py` (a test holds the two together).
Inductor makes one parallel region of a layer, so that its threads are woken once. Everything between the layer's input
and output stays float32. Knows tensors; knows no sequences.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from dash_runtime.actions import Action
from dash_runtime.linears.row_kernels import full_products, row_product
from dash_runtime.model_config import Activation, ModelConfig, NormPlacement, QkNorm
from dash_runtime.programs.packing import WeightPacking


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Everything that a decoder's programs depend on. Models with equal shapes share programs."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    has_qkv_bias: bool
    vocab_size: int
    activation: Activation = Activation.SILU
    attention_scale: float | None = None
    residual_multiplier: float = 1.0
    norm_placement: NormPlacement = NormPlacement.BEFORE
    qk_norm: QkNorm | None = None

    @classmethod
    def of(cls, model: ModelConfig) -> "ModelShape":
        sources = {field.name: model if hasattr(model, field.name) else model.block for field in fields(cls)}
        return cls(**{name: getattr(source, name) for name, source in sources.items()})

    @property
    def has_norms(self) -> tuple[bool, bool, bool, bool]:
        """Which norms a layer has, in the order in which it runs them: attention's input and output, the MLP's."""
        before, after = self.norm_placement != NormPlacement.AFTER, self.norm_placement != NormPlacement.BEFORE
        return before, after, before, after

    def vector_sizes(self) -> list[tuple[int, ...]]:
        """Returns the shapes of a layer's vectors: its norms, those of queries and keys, the bias of the first product.

        `QkNorm.HEAD` has one of `[num_heads + num_kv_heads, head_dim]`.
        """
        sizes: list[tuple[int, ...]] = [(self.hidden_size,)] * sum(self.has_norms)
        if self.qk_norm == QkNorm.HEAD:
            sizes.append((self.num_heads + self.num_kv_heads, self.head_dim))
        if self.qk_norm == QkNorm.WIDTH:
            sizes += [(self.query_size,), (self.key_value_size // 2,)]
        if self.has_qkv_bias:
            sizes.append((self.query_size + self.key_value_size,))
        return sizes

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def product_scale(self) -> float:
        """The factor of the products of queries and keys."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def key_value_size(self) -> int:
        """The size of one row's keys and values together."""
        return 2 * self.num_kv_heads * self.head_dim

    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Returns `(out_features, in_features)` of query-key-value, output, gate-up and down."""
        return (
            (self.query_size + self.key_value_size, self.hidden_size),
            (self.hidden_size, self.query_size),
            (2 * self.intermediate_size, self.hidden_size),
            (self.hidden_size, self.intermediate_size),
        )


class _Traced(nn.Module):
    """A module that is compiled for one shape, with the matrices of one action."""

    def __init__(self, shape: ModelShape, action: Action) -> None:
        super().__init__()
        self._shape = shape
        self._action = action


class TracedLayer(_Traced):
    """A module that takes the weights of a layer, joined (`WeightPacking`).

    The vectors are those of `ModelShape.vector_sizes`, the matrices query-key-value, output, gate-up and down.
    """

    def __init__(self, shape: ModelShape, action: Action, inputs: WeightPacking) -> None:
        super().__init__(shape, action)
        self._inputs = inputs

    def _norms(self, vectors: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Returns the weights of the layer's four norms, None for each that it has not."""
        each = iter(vectors)
        return [next(each) if is_present else None for is_present in self._shape.has_norms]

    def _normed(self, inputs: Tensor, weight: Tensor | None) -> Tensor:
        return inputs if weight is None else rms_norm(inputs, weight, self._shape.rms_norm_eps)


class FewRowsLayer(TracedLayer):
    """One layer with one action, for the last one or few rows of a sequence; several rows run in FULL only.

    Each row's numbers are the same, bit for bit, alone and among others.
    """

    def _product(self, inputs: Tensor, matrix: tuple[Tensor, ...]) -> Tensor:
        return row_product(self._action, inputs, matrix) if len(inputs) == 1 else full_products(inputs, *matrix)

    def _scaled(self, branch: Tensor) -> Tensor:
        return branch if self._shape.residual_multiplier == 1 else branch * self._shape.residual_multiplier

    def forward(
        self, hidden: Tensor, keys: Tensor, values: Tensor, cosines: Tensor, sines: Tensor, weights: tuple[Tensor, ...]
    ) -> Tensor:
        """Maps `[rows, hidden_size]` to the same.

        Writes the last `rows` of `keys` and `values`, `[positions, num_kv_heads, head_dim]` each. Each row attends to
        all up to its own.
        """
        shape = self._shape
        vectors, matrices = self._inputs.split(weights)
        query_key_value, output, gate_up, down = matrices
        input_norm, attention_output_norm, mlp_norm, mlp_output_norm = self._norms(vectors)
        residual = hidden.float()
        normed = self._normed(residual, input_norm)
        fused = self._product(normed, query_key_value)
        if shape.has_qkv_bias:
            fused = fused + vectors[-1]
        num_rotated = shape.num_heads + shape.num_kv_heads
        rotated, others = rotate_first_heads(shape, fused, num_rotated, cosines, sines, vectors)
        first = keys.shape[0] - hidden.shape[0]
        keys[first:] = rotated[:, shape.num_heads :].to(keys.dtype)
        values[first:] = others.to(values.dtype)
        attended = attention(rotated[:, : shape.num_heads], keys, values, shape.product_scale)
        residual = residual + self._scaled(self._normed(self._product(attended, output), attention_output_norm))
        normed = self._normed(residual, mlp_norm)
        gate, up = self._product(normed, gate_up).chunk(2, dim=-1)
        is_silu = shape.activation == Activation.SILU
        gate = functional.silu(gate) if is_silu else functional.gelu(gate, approximate="tanh")
        residual = residual + self._scaled(self._normed(self._product(gate * up, down), mlp_output_norm))
        return residual.to(hidden.dtype)


class RowsAttention(_Traced):
    """The part of a layer between the query-key-value product and the output product.

    For rows of different sequences that share these products (`inductor.py`).
    """

    def forward(
        self,
        fused: Tensor,
        keys: Tensor,
        values: Tensor,
        attended: tuple[Tensor, ...],
        cosines: Tensor,
        sines: Tensor,
        vectors: tuple[Tensor, ...],
    ) -> Tensor:
        """Returns `[rows, num_heads * head_dim]` from `fused` `[rows, query and key and value]`, bias included.

        Writes into a whole pool's `keys` and `values`, `[blocks, BLOCK_TOKENS, num_kv_heads, head_dim]` each.
        `attended` has the fields of `kv_blocks.AttendedBlocks`.
        """
        shape = self._shape
        num_rotated = shape.num_heads + shape.num_kv_heads
        rotated, others = rotate_first_heads(shape, fused.float(), num_rotated, cosines, sines, vectors)
        write_tokens(keys, values, attended[0], rotated[:, shape.num_heads :], others)
        queries = rotated[:, : shape.num_heads]
        return attention_over_blocks(queries, keys, values, attended, shape.product_scale).to(fused.dtype)


class RowsNorm(_Traced):
    """The norm before a product that rows share."""

    def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Maps `[rows, hidden_size]` to the same."""
        return rms_norm(hidden.float(), weight, self._shape.rms_norm_eps).to(hidden.dtype)


class Head(_Traced):
    """The final norm and the language-model head of one row."""

    def forward(self, hidden: Tensor, norm: Tensor, matrix: tuple[Tensor, ...]) -> Tensor:
        """Returns float32 logits `[1, vocab_size]` from the last layer's output `[1, hidden_size]`."""
        return row_product(self._action, rms_norm(hidden.float(), norm, self._shape.rms_norm_eps), matrix)


def write_tokens(keys: Tensor, values: Tensor, slots: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
    """Writes keys and values, `[rows, num_kv_heads, head_dim]` each, at the tokens `slots` of a pool's blocks."""
    keys.flatten(0, 1)[slots] = new_keys.to(keys.dtype)
    values.flatten(0, 1)[slots] = new_values.to(values.dtype)


def rotate_first_heads(
    shape: ModelShape, fused: Tensor, num_rotated: int, cosines: Tensor, sines: Tensor, vectors: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Splits a product into queries, if any, and keys, both normed and rotated; and values, as they are.

    Returns `[rows, heads, head_dim]` twice.
    """
    own_norms = vectors[sum(shape.has_norms) :]
    if shape.qk_norm == QkNorm.WIDTH:
        sizes = [(num_rotated - shape.num_kv_heads) * shape.head_dim, *[shape.key_value_size // 2] * 2]
        queries, keys, values = fused.split(sizes, dim=-1)
        queries = rms_norm(queries, own_norms[0], shape.rms_norm_eps) if sizes[0] else queries
        fused = torch.cat((queries, rms_norm(keys, own_norms[1], shape.rms_norm_eps), values), dim=-1)
    heads = fused.view(-1, num_rotated + shape.num_kv_heads, shape.head_dim)
    rotated = heads[:, :num_rotated]
    if shape.qk_norm == QkNorm.HEAD:
        rotated = rms_norm(rotated, own_norms[0][-num_rotated:], shape.rms_norm_eps)
    swapped = rotated.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return rotated * cosines.float() + swapped * sines.float(), heads[:, num_rotated:]


def rms_norm(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32."""
    return inputs * torch.rsqrt(inputs.square().mean(-1, keepdim=True) + eps) * weight


def attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attends with the last rows' queries `[rows, num_heads, head_dim]`, each over all keys up to its own.

    Returns `[rows, num_heads * head_dim]`. Loops over keys take less time than the library's attention needs to prepare
    for one query. The heads of a group are written out one by one, so that they share a loop that reads the keys once,
    in the order of memory. Scores are then transposed, since the next loops read them head by head.
    """
    num_rows, num_heads, head_dim = queries.shape
    num_keys, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    by_group = (queries * scale).view(num_rows, 1, num_kv_heads, group, head_dim)
    own_scores = [(by_group[:, :, :, own] * keys.float()).sum(-1) for own in range(group)]
    scores = torch.stack([own.transpose(1, 2) for own in own_scores], dim=2)
    if num_rows > 1:  # keys after a row's own add zeros to its sums, which does not change them
        last = torch.arange(num_rows).unsqueeze(1) + (num_keys - num_rows)
        scores = scores.masked_fill((torch.arange(num_keys) > last)[:, None, None], float("-inf"))
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    by_head = values.float().transpose(0, 1)
    sums = torch.stack([(weights[:, :, own].unsqueeze(-1) * by_head).sum(2) for own in range(group)], dim=2)
    return (sums / weights.sum(-1, keepdim=True)).view(num_rows, -1)


def attention_over_blocks(
    queries: Tensor, keys: Tensor, values: Tensor, attended: tuple[Tensor, ...], scale: float
) -> Tensor:
    """Attends with rows of different sequences, each over its own blocks: every block alone, then each row's together.

    What a loop reads is written out anew for every head, since a shared tensor would be copied first.
    """
    _, blocks, block_rows, biases, parts = attended
    num_rows, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[2]
    group = num_heads // num_kv_heads
    scores = torch.stack(
        [
            (queries[block_rows, head].unsqueeze(1) * keys[blocks, :, head // group].float()).sum(-1)
            for head in range(num_heads)
        ],
        dim=1,
    )
    scores = scores * scale + biases.unsqueeze(1)
    largest = scores.amax(-1)
    weights = torch.exp(scores - largest.unsqueeze(-1))
    by_group = weights.view(-1, num_kv_heads, group, keys.shape[1], 1)
    sums = [(by_group[:, :, own] * values[blocks].float().transpose(1, 2)).sum(2) for own in range(group)]
    is_missing, places = (parts < 0).unsqueeze(-1), parts.clamp(min=0)
    levels = largest[places].masked_fill(is_missing, float("-inf"))
    factors = torch.exp(levels - levels.amax(1, keepdim=True))
    total = (factors * weights.sum(-1)[places]).sum(1)
    outputs = (factors.unsqueeze(-1) * torch.stack(sums, dim=2).view(-1, num_heads, head_dim)[places]).sum(1)
    return (outputs / total.unsqueeze(-1)).view(num_rows, -1)
