"""The blocks of the pool that the rows of a batch attend to, as inputs of one program for all rows.

Rows of different lengths share one loop over all their blocks; the partial results are then added up row by row (flash
decoding, Dao et al. 2023, over paged keys and values, Kwon et al. 2023). Uses numpy, whose small operations take a
third of torch's time. numpy is imported when blocks are first wanted: only programs want them, and torch does not bring
it. Knows positions; knows no weights.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_TOKENS = 16
_MIN_PARTS = 2  # programs take no dimension of 1


class AttendedBlocks(NamedTuple):
    """The blocks that a batch's rows attend to, with one entry for each block of each row: inputs of a program.

    An entry has a block's number in the pool (`blocks`), its row (`rows`), and what is added to its scores (`biases`,
    float32 `[blocks, BLOCK_TOKENS]`, 0 or minus infinity). `slots` `[rows]` are the rows' own tokens in the pool.
    `parts` `[rows, most]` lists each row's entries, then −1.
    """

    slots: Tensor
    blocks: Tensor
    rows: Tensor
    biases: Tensor
    parts: Tensor


def attended_blocks(starts: Sequence[int], positions: Sequence[int], window: int | None) -> AttendedBlocks:
    """Returns the blocks of rows at `positions` of sequences that begin at the pool's tokens `starts`.

    `window` is how many of the latest positions a row attends to, its own included; None for all.
    """
    import numpy

    own, first_tokens = numpy.array(positions), numpy.array(starts)
    first_seen = numpy.zeros_like(own) if window is None else numpy.maximum(own + 1 - window, 0)
    first_block = first_seen // BLOCK_TOKENS
    counts = own // BLOCK_TOKENS + 1 - first_block
    firsts = counts.cumsum() - counts  # each row's first entry
    rows = numpy.arange(len(own)).repeat(counts)
    numbers = numpy.arange(len(rows)) - (firsts - first_block)[rows]  # of each entry's block in its sequence
    tokens = numbers[:, None] * BLOCK_TOKENS + numpy.arange(BLOCK_TOKENS)
    is_hidden = (tokens > own[rows, None]) | (tokens < first_seen[rows, None])
    places = numpy.arange(max(_MIN_PARTS, counts.max()))
    parts = numpy.where(places < counts[:, None], firsts[:, None] + places, -1)
    blocks = first_tokens[rows] // BLOCK_TOKENS + numbers
    biases = numpy.array([0, -numpy.inf], numpy.float32)[is_hidden.astype(numpy.int8)]
    return AttendedBlocks(*map(torch.from_numpy, (first_tokens + own, blocks, rows, biases, parts)))
