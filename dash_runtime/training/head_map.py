"""Fits the map of a narrow head to the states that a model's head gets. Knows text and models; knows no policies."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.errors import ConfigError
from dash_runtime.layers.narrow_head import HeadMap, NarrowMatrices
from dash_runtime.linears.grouped_matrix import GROUP_SIZE, is_packable
from dash_runtime.linears.quantization import grouped
from dash_runtime.training.dense_decoder import DenseDecoder
from dash_runtime.training.loaded_model import LoadedModel

_SHRINKAGE = 0.01
"""The share of the mean square that is added to every direction: text has not shown all of them."""
_MOST_SEQUENCES = 512
_SEQUENCES_TOGETHER = 8
_TOKENS_TOGETHER = 8192


def with_narrow_head(
    model: LoadedModel, sequences: Sequence[Sequence[int]], num_prompt_tokens: int
) -> tuple[LoadedModel, HeadMap]:
    """Returns the model with a narrow head, the one in SKIP, and its map, fitted to this text.

    Raises:
        ConfigError: there is no text, or no such head for this model or device.
    """
    vocab_size, hidden_size = model.config.vocab_size, model.config.hidden_size
    if model.device.type != "cpu" or not is_packable(vocab_size, hidden_size):
        raise ConfigError("head", f"SKIP is for a CPU and tokens by the 16, not for {model.device} and {vocab_size}")
    if not sequences:
        raise ConfigError("data", "has no sequences left that a narrow head could be fitted to")
    head_map = fit_head_map(model.dense_decoder(), sequences, num_prompt_tokens)
    return model.with_head_map(head_map), head_map


@torch.no_grad()
def fit_head_map(decoder: DenseDecoder, sequences: Sequence[Sequence[int]], num_prompt_tokens: int) -> HeadMap:
    """Returns the map with the least mean square error of the logits at full depth, over all tokens of the vocabulary.

    It is a third as wide as the states, and takes the first 512 sequences. Positions before `num_prompt_tokens` do not
    count: the first few states of a text are unlike all others.
    """
    moments = _moments(decoder, sequences[:_MOST_SEQUENCES], num_prompt_tokens)
    moments += _SHRINKAGE * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    weight = decoder.head.float()
    weight = weight - weight.mean(dim=0)
    size = len(moments)
    rank = max(GROUP_SIZE, round(size / 3 / GROUP_SIZE) * GROUP_SIZE)
    # In coordinates in which all states are alike in every direction, the best map keeps the matrix's largest
    # singular directions.
    values, vectors = torch.linalg.eigh(moments)
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    _, directions = torch.linalg.eigh(root @ (weight.T @ weight).double() @ root)
    kept = directions.flip(1)[:, :rank]
    narrow, widen = (kept.T @ inverse).float(), (root @ kept).float()
    scale = (widen.abs().amax() / narrow.abs().amax()).sqrt()  # a file has both in half precision
    narrow, widen = narrow * scale, widen / scale
    return HeadMap(narrow, widen, _offsets(decoder, weight, narrow, widen, moments.float()))


def _moments(decoder: DenseDecoder, sequences: Sequence[Sequence[int]], num_prompt_tokens: int) -> Tensor:
    """Returns the second moments of the head's inputs, float64 `[hidden_size, hidden_size]`."""
    total, count = torch.zeros(()).double(), 0
    for start in range(0, len(sequences), _SEQUENCES_TOGETHER):
        token_ids = torch.tensor(sequences[start : start + _SEQUENCES_TOGETHER])
        last = decoder.full_states(token_ids)[-1][:, num_prompt_tokens:]
        states = decoder.final_norm(last).flatten(0, 1).float()
        total = total + (states.T @ states).double()
        count += len(states)
    return (total / count).cpu()


def _offsets(decoder: DenseDecoder, weight: Tensor, narrow: Tensor, widen: Tensor, moments: Tensor) -> Tensor:
    """Returns half the variance of what each rough logit lacks, for logits that are multiplied as the model's are."""
    widened = NarrowMatrices.of(decoder.head, widen).widened
    parts: list[Tensor] = []
    for start in range(0, len(weight), _TOKENS_TOGETHER):
        tokens = slice(start, start + _TOKENS_TOGETHER)
        own = widened.outputs(start, min(start + _TOKENS_TOGETHER, len(weight)))
        rounded = grouped(Action.INT4, own).dequantized()
        rest = weight[tokens] - rounded.float() @ narrow
        parts.append(torch.linalg.vecdot(rest @ moments, rest))
    return torch.cat(parts) * (decoder.config.logits_multiplier / 2)
