"""The native code, compiled once for all tests and runs of a user, and sizes of models that it can decode."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import default_cache_folder
from dash_runtime.files.atomic_file import replacing
from dash_runtime.linears.grouped_matrix import quantize_grouped
from dash_runtime.linears.quantization import BITS, quantize_int8
from dash_runtime.native.code_files import library_path, load_native_code
from dash_runtime.native.levels import best_level
from dash_runtime.native.library import NativeLibrary
from dash_runtime.native.recipe import LEVELS, Level

NATIVE_SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 272}
"""Whole numbers of lanes; in FULL some of the matrices fill blocks, and others do not."""
_named = {level.name: level for level in LEVELS}
_levels = [_named[os.environ["DASH_TEST_LEVEL"]] if "DASH_TEST_LEVEL" in os.environ else best_level()]
"""The level of this run, and those of tests that run at several."""


def native_library() -> NativeLibrary:
    """Returns the native code of the level that is tested."""
    return _library(_levels[-1])


@cache
def _library(level: Level) -> NativeLibrary:
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    said: list[str] = []
    library = load_native_code(default_cache_folder(os.environ) / "native", said.append, level)
    assert library is not None, said
    return library


@contextmanager
def at_level(level: Level) -> Iterator[None]:
    """Tests native code of a level in this process."""
    _levels.append(level)
    yield
    _levels.pop()


def lay_library_for_processes() -> None:
    """Puts the native code of this run's level where processes that tests start look for the best one."""
    native_library()
    folder = default_cache_folder(os.environ) / "native"
    with replacing(library_path(folder, best_level())) as partial:
        shutil.copyfile(library_path(folder, _levels[0]), partial)


def rounded(action: Action, weight: Tensor) -> Tensor:
    """Returns the matrix that native code computes with, in float32."""
    if action in BITS:
        return quantize_grouped(weight, BITS[action]).dequantized()
    if action is Action.INT8:
        quantized, scales = quantize_int8(weight)
        return quantized.float() * scales.float().unsqueeze(1)
    return weight.float()


def in_bytes(rows: Tensor) -> Tensor:
    """Returns rows of which 32 inputs at a time are multiples of 1/127 of the largest."""
    groups = rows.split(32, dim=-1)
    units = [own.abs().amax(-1, keepdim=True) / 127 for own in groups]
    return torch.cat([(own / unit).round() * unit for own, unit in zip(groups, units, strict=True)], dim=-1)
