"""Native code of a start: found or compiled, if it can run the model, and given to the policies that it evaluates.

Knows models, devices and policies; knows no folders but the cache's.
"""

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

import torch

from dash_runtime.actions import Action
from dash_runtime.config import LaneKind
from dash_runtime.decoder.backends.native import NativeBackend, why_eager
from dash_runtime.decoder.backends.native_compensation import runs_natively
from dash_runtime.decoder.backends.packed_model import PackedModel, parts_of
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.loading import make_native_decoder
from dash_runtime.devices import device_of
from dash_runtime.model_config import ModelConfig
from dash_runtime.native.code_files import PREBUILT, compile_ahead, load_native_code
from dash_runtime.native.library import NativeLibrary
from dash_runtime.native.policy import NativePolicy, fits
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.progress import Progress
from dash_runtime.startup.native_check import check_native_code
from dash_runtime.startup.packed_files import PackedFiles, WeightsPlace


class NativeCode(StrEnum):
    """The origin of native code."""

    AUTO = "auto"
    """From the package, or compiled here if that brings none for this machine."""
    BUILD = "build"
    """Compiled here."""
    OFF = "off"
    """There is none: layers run eagerly."""

    @property
    def prebuilt(self) -> Path | None:
        """The package's folder of it, if that may be used."""
        return PREBUILT if self is NativeCode.AUTO else None


def begin_to_compile(cache_folder: Path, source: NativeCode) -> None:
    """Begins to compile native code if there is none, while the start does other things."""
    if source is not NativeCode.OFF:
        compile_ahead(cache_folder / "native", source.prebuilt)


def native_code_for(
    model: ModelConfig,
    context_length: int,
    dtype: torch.dtype,
    device: torch.device,
    cache_folder: Path,
    progress: Progress,
    source: NativeCode = NativeCode.AUTO,
) -> tuple[NativeLibrary | None, str]:
    """Returns the native code; None if it cannot run this model there, or not be compiled here, and the reason."""
    if source is NativeCode.OFF:
        return None, "layers run eagerly"
    if not device_of(device).runs_native_code or dtype is not torch.bfloat16:
        return None, f"no native code runs {str(dtype).removeprefix('torch.')} on {device}"
    reason = why_eager(model, context_length)
    if reason is not None:
        progress(f"layers run eagerly: native code has no {reason}")
        return None, f"native code has no {reason}"
    library = load_native_code(cache_folder / "native", progress, prebuilt=source.prebuilt, check=check_native_code)
    return library, "there is no native code here"


def native_decoder(
    library: NativeLibrary,
    files: PackedFiles,
    actions: Sequence[Action],
    *,
    context_length: int,
    place: WeightsPlace,
    shares_heads: bool,
    progress: Progress,
) -> tuple[Decoder, PackedModel]:
    """Returns a decoder that runs in native code, and its weights, which are packed first if no file has them.

    Args:
        shares_heads: as in `NativeBackend`.
    """
    model, head_map = files.loader.config, files.head_map
    backend = NativeBackend(model, library, actions, torch.get_num_threads(), shares_heads=shares_heads)
    packed = files.open(parts_of(actions, head_map), place, progress)
    return (
        make_native_decoder(model, packed, backend, tuple(actions), context_length=context_length, head_map=head_map),
        packed,
    )


def with_native_code(policy: LearnedPolicy, library: NativeLibrary, lane: LaneKind | None) -> LearnedPolicy:
    """Returns the policy with what evaluates it: layers do where no other lane was asked for."""
    network = policy.native_network
    evaluator = NativePolicy(library, network) if fits(network) else None
    decides_next = evaluator is not None and policy.block_size == 1 and policy.lookahead == 1
    decides_in_pass = decides_next and lane in (None, LaneKind.INLINE) and runs_natively(policy.compensation)
    return replace(policy, evaluator=evaluator, decides_in_pass=decides_in_pass)
