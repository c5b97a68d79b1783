"""Attention of consecutive rows of one sequence over its keys and values. Knows tensors; knows no caches and no layers.

The query heads that share a key head become rows of one attention, so that no keys are expanded.
"""

import torch
from torch import Tensor
from torch.nn import functional


def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Returns `[rows, num_heads * head_dim]`.

    Args:
        queries: `[rows, num_heads, head_dim]`.
        keys: `[positions, num_kv_heads, head_dim]`, as `values`.
        mask: from `causal_mask`; None for a single row, which sees every key.
        scale: factor of the scores; None means `head_dim ** -0.5`.
    """
    num_rows, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    keys, values = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    if num_rows == 1:
        folded = queries.view(1, num_kv_heads, group, head_dim)
        return functional.scaled_dot_product_attention(folded, keys, values, scale=scale).view(1, -1)
    folded = queries.view(num_rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    folded = folded.reshape(1, num_kv_heads, group * num_rows, head_dim)
    attended = functional.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    attended = attended.view(num_kv_heads, group, num_rows, head_dim).permute(2, 0, 1, 3)
    return attended.reshape(num_rows, num_heads * head_dim)


def causal_mask(rows: range, keys: range, window: int | None, group: int, like: Tensor) -> Tensor:
    """Returns what `attention` adds to the scores of rows at positions `rows` over keys at positions `keys`.

    `[group * rows, keys]`: 0 where a row sees a key, minus infinity elsewhere. `window` is how many of the latest
    positions a row sees, its own included; None for all.
    """
    own = torch.arange(rows.start, rows.stop, device=like.device).unsqueeze(1)
    others = torch.arange(keys.start, keys.stop, device=like.device)
    visible = others <= own
    if window is not None:
        visible &= others > own - window
    bias = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
    return bias.masked_fill_(~visible, float("-inf")).repeat(group, 1)
