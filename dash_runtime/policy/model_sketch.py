"""A sketch of a model: short numbers by which a policy knows its model again, however its weights are stored.

It has the shapes and, for a sample of each tensor's rows, a few projections on random signs. Two sketches are of one
model if their projections differ as the rounding of their weights explains. Rounding to a few bits leaves a grid in the
weights, whose step shows in the smallest gap between weights that were rounded together. Knows weights; knows no
policies.
"""

import contextlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from dash_runtime.checkpoints import Parameter, Weights, parameters
from dash_runtime.files.disk_cache import digest, keep
from dash_runtime.model_config import ModelConfig

_VERSION = 1
_NUM_ROWS = 32
"""Of each matrix, evenly spaced."""
_NUM_SIGNS = 4
"""Projections of each tensor."""
_UNIT = 1000
"""Projections are whole numbers in this fraction of the tensor's root mean square."""
_BLOCK = 32
"""Weights of a row that formats round together, or a multiple of them."""

_STORING = 0.002
"""Difference that storing the weights in bfloat16, float16 or 8 bits makes, with what projections lose as integers."""
_VECTOR_STORING = 0.001
"""The same for norms and biases, which every format keeps unrounded."""
_COARSER = 1.5
"""A rounding error this many times another's is a coarser one."""
_DEVIATIONS = 4.0
"""Standard errors of a measured difference that chance is allowed."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor. `rounding` is its root mean square rounding error as a share of `scale`, its root mean square."""

    scale: float
    rounding: float
    projections: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Sketch:
    shape: tuple[int, ...]
    vectors: list[_Entry]
    matrices: list[_Entry]

    def groups(self) -> list[list[int]]:
        """Returns the places of matrices that are judged together: all, each layer's, and those of one role in all
        layers. So a change of a few layers, or of queries and values alone, is not lost among the others."""
        num_layers, num_matrices = self.shape[0], len(self.matrices)
        per_layer = (num_matrices - 1) // num_layers  # the first one is the embedding
        layers = [list(range(1 + layer * per_layer, 1 + (layer + 1) * per_layer)) for layer in range(num_layers)]
        return [list(range(num_matrices)), [0], *layers, *(list(role) for role in zip(*layers, strict=True))]


def model_fingerprint(config: ModelConfig, weights: Weights) -> str:
    """Returns the sketch of a model as JSON text.

    The same weights have the same text wherever it is made, and weights that were rounded otherwise have another, so
    caches are named by it. Policies ask `is_same_model`.

    Takes 0.3 seconds for 135 million parameters, and reads only the rows that it needs.

    Raises:
        CorruptCheckpoint: a tensor is missing or holds a value that is not finite.
    """
    vectors, matrices = [], []
    for parameter in parameters(config):
        name = parameter.names[0]
        if name == f"{config.tensor_names.head}.weight":
            continue  # some files store a tied head twice
        if len(parameter.shape) == 1:
            vectors.append(_measure(weights[name]))
        elif name.endswith(f".{config.tensor_names.router}.weight"):
            vectors.append(_measure(weights[name].flatten()))  # unrounded in every format, as norms are
        else:
            matrices.append(_measure(_some_rows(weights, parameter)))
    heads, mixture = (config.num_heads, config.num_kv_heads, config.head_dim), config.mixture
    sizes = [config.num_layers, config.hidden_size, *heads, config.intermediate_size, config.vocab_size]
    if mixture is not None:
        sizes += [mixture.num_experts, mixture.num_chosen, mixture.expert_size, int(mixture.has_normed_shares)]
    return json.dumps([_VERSION, sizes, vectors, matrices], separators=(",", ":"))


def kept_fingerprint(config: ModelConfig, weights: Weights, folder: Path) -> str:
    """Returns `model_fingerprint`, from `folder` if the same files were read before. Raises as that does."""
    file = folder / f"{digest((_VERSION, weights.identity))}.json"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if kept := file.read_text():
            return kept
    fingerprint = model_fingerprint(config, weights)
    keep(file, lambda partial: partial.write_text(fingerprint))
    return fingerprint


def is_same_model(sketch: str, other: str) -> bool:
    """Returns True if both sketches are of one model, up to the rounding of its weights.

    The unrounded original of a model of few bits differs from it as much as the rounding says, and so do its
    fine-tunes as long as they are smaller than that: they pass. What differs by less is neither the original nor
    stored anew, and is refused. A text that is no sketch is the same model as its equal only.
    """
    if sketch == other:
        return True
    ours, theirs = _parse(sketch), _parse(other)
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return False
    if len(ours.vectors) != len(theirs.vectors) or len(ours.matrices) != len(theirs.matrices):
        return False
    vectors = _difference(list(zip(ours.vectors, theirs.vectors, strict=True)))
    pairs = list(zip(ours.matrices, theirs.matrices, strict=True))
    return vectors <= _VECTOR_STORING and all(
        _is_rounding([pairs[place] for place in group]) for group in ours.groups()
    )


def _is_rounding(pairs: Sequence[tuple[_Entry, _Entry]]) -> bool:
    """Returns True if rounding explains by how much the tensors differ."""
    finer, coarser = sorted(_mean_square([entry.rounding for entry in side]) for side in zip(*pairs, strict=True))
    chance = _DEVIATIONS / math.sqrt(2 * _NUM_SIGNS * len(pairs))
    difference = _difference(pairs)
    if difference > (1 + chance) * math.sqrt(finer + coarser + _STORING**2):
        return False
    is_coarser = coarser > _COARSER**2 * (finer + _STORING**2)
    return not is_coarser or difference >= (1 - chance) * math.sqrt(coarser - finer)


def _difference(pairs: Sequence[tuple[_Entry, _Entry]]) -> float:
    """Returns the root mean square difference of the tensors, as a share of their root mean square, as the
    projections estimate it."""
    squares = []
    for ours, theirs in pairs:
        unit = max(ours.scale, theirs.scale) or 1.0
        for first, second in zip(ours.projections, theirs.projections, strict=True):
            squares.append(((first * ours.scale - second * theirs.scale) / unit / _UNIT) ** 2)
    return math.sqrt(sum(squares) / max(1, len(squares)))


def _mean_square(values: Sequence[float]) -> float:
    return sum(value * value for value in values) / len(values)


def _measure(sample: Tensor) -> tuple[float, float, list[int]]:
    """Returns scale, rounding error and projections of a tensor of which these are some rows, `[rows, columns]` or
    `[columns]`, in the form that is stored."""
    # Every format is compared as the layers run it. Sums in float64 do not depend on their order here.
    values = sample.to(torch.bfloat16).to(torch.float64)
    scale = float(values.square().mean().sqrt())
    if not scale:
        return 0.0, 0.0, [0] * _NUM_SIGNS
    signs = _signs(values.numel())
    projections = signs @ values.flatten() / (scale * math.sqrt(values.numel()))
    rounding = 0.0 if values.dim() == 1 else _grid_step(values) / math.sqrt(12) / scale
    return _short(scale), _short(rounding), [round(value * _UNIT) for value in projections.tolist()]


def _grid_step(values: Tensor) -> float:
    """Returns the root mean square, over blocks, of the smallest gap between different weights of a block.

    A block that was rounded to few bits has neighbours on its grid, one step apart. Unrounded weights have smaller
    gaps, which say that there is no grid worth speaking of.
    """
    width = min(_BLOCK, values.shape[1])
    blocks = values[:, : values.shape[1] // width * width].reshape(-1, width)
    gaps = blocks.sort(dim=1).values.diff(dim=1)
    return float(gaps.where(gaps > 0, torch.inf).min(dim=1).values.nan_to_num(posinf=0.0).square().mean().sqrt())


def _some_rows(weights: Weights, parameter: Parameter) -> Tensor:
    """Returns evenly spaced rows of a matrix, or of all experts' matrices, one below the other."""
    num_rows = parameter.shape[0]
    by_place = groupby(_spaced(num_rows * len(parameter.names)), lambda row: row // num_rows)
    parts = [weights.rows(parameter.names[place], [row % num_rows for row in rows]) for place, rows in by_place]
    return torch.cat(parts)


def _spaced(num_rows: int) -> list[int]:
    count = min(_NUM_ROWS, num_rows)
    return [(2 * place + 1) * num_rows // (2 * count) for place in range(count)]


@lru_cache(maxsize=8)
def _signs(length: int) -> Tensor:
    """Returns random signs, float64 `[_NUM_SIGNS, length]`, the same for every version of every library."""
    generator = random.Random(0)
    num_bytes = -(-length // 8)
    random_bytes = torch.frombuffer(bytearray(generator.randbytes(_NUM_SIGNS * num_bytes)), dtype=torch.uint8)
    bits = random_bytes.view(_NUM_SIGNS, num_bytes, 1) >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(1)[:, :length].to(torch.float64) * 2 - 1


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _parse(text: str) -> _Sketch | None:
    """Returns the sketch that was written as `text`; None if it is none of this version."""
    try:
        version, shape, vectors, matrices = json.loads(text)
        parsed = _Sketch(tuple(map(int, shape)), _entries(vectors), _entries(matrices))
        num_layers = parsed.shape[0]
        is_whole = num_layers > 0 and len(parsed.matrices) > 1 and (len(parsed.matrices) - 1) % num_layers == 0
        return parsed if version == _VERSION and is_whole else None
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
        return None


def _entries(rows: Sequence[tuple[float, float, Sequence[float]]]) -> list[_Entry]:
    entries = [_Entry(float(scale), float(rounding), tuple(map(float, own))) for scale, rounding, own in rows]
    for entry in entries:
        numbers = (entry.scale, entry.rounding, *entry.projections)
        if len(entry.projections) != _NUM_SIGNS or not all(map(math.isfinite, numbers)):
            raise ValueError
    return entries
