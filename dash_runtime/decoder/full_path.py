"""Runs whole sequences through the layers, under teacher forcing. Knows the decoder; knows no policies."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.layers.batch import Batch, PassKind
from dash_runtime.layers.compensation import Compensation, Identity

_ROWS_TOGETHER = 512
"""More make no layer faster, and a path's states of all layers take memory."""


def parts_of(sequences: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """Splits sequences into parts that are best run together."""
    size = max(1, _ROWS_TOGETHER // max(map(len, sequences)))
    for first in range(0, len(sequences), size):
        yield sequences[first : first + size]


def sequence_rows(
    decoder: Decoder, sequences: Sequence[Sequence[int]], compensation: Compensation, kv_action: Action | None = None
) -> Batch:
    lengths = [len(ids) for ids in sequences]
    count = len(lengths)
    return decoder.batch(
        PassKind.PREFILL,
        decoder.caches(lengths),
        lengths,
        [compensation] * count,
        [kv_action or decoder.highest] * count,
    )


@torch.no_grad()
def full_path(decoder: Decoder, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Runs every layer in the highest action. Returns each layer's input and the last one's output, each `[rows,
    hidden_size]`."""
    batch = sequence_rows(decoder, sequences, Identity())
    actions = (decoder.highest,) * batch.num_rows
    states = [decoder.embed([token_id for ids in sequences for token_id in ids])]
    for layer in range(decoder.num_layers):
        states.append(decoder.run_layer(layer, actions, states[-1], batch))
    return states


def full_outputs(decoder: Decoder, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Runs every layer in the highest action. Returns the last one's output, `[rows, hidden_size]`."""
    return torch.cat([full_path(decoder, part)[-1] for part in parts_of(sequences)])
