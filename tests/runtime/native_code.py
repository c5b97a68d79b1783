"""The native code, compiled once for all tests and runs of a user, and sizes of models that it can decode."""

import os
from functools import cache

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import default_cache_folder
from dash_runtime.linears.int4_matrix import quantize_int4
from dash_runtime.linears.quantization import quantize_int8
from dash_runtime.rows.library import RowsLibrary, load_rows

NATIVE_SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 272}
"""Whole numbers of lanes; in FULL some of the matrices fill blocks, and others do not."""


@cache
def native_library() -> RowsLibrary:
    said: list[str] = []
    library = load_rows(default_cache_folder(os.environ) / "native", said.append)
    assert library is not None, said
    return library


def rounded(action: Action, weight: Tensor) -> Tensor:
    """Returns the matrix that native code computes with, in float32."""
    if action is Action.INT4:
        return quantize_int4(weight).dequantized()
    if action is Action.INT8:
        quantized, scales = quantize_int8(weight)
        return quantized.float() * scales.float().unsqueeze(1)
    return weight.float()


def in_bytes(rows: Tensor) -> Tensor:
    """Returns rows of which 32 inputs at a time are multiples of 1/127 of the largest."""
    groups = rows.split(32, dim=-1)
    units = [own.abs().amax(-1, keepdim=True) / 127 for own in groups]
    return torch.cat([(own / unit).round() * unit for own, unit in zip(groups, units, strict=True)], dim=-1)
