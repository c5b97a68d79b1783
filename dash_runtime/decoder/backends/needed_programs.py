"""Names the programs that decoding a model needs (`inductor.py` runs them). Knows models; knows no weights."""

from collections.abc import Sequence

from dash_runtime.actions import Action
from dash_runtime.layers.rotary import queries_grow
from dash_runtime.linears.row_kernels import is_packable
from dash_runtime.model_config import ModelConfig
from dash_runtime.programs.program_cache import ProgramKind, ProgramSpec
from dash_runtime.programs.traced_layer import ModelShape

_VERIFIED_ROWS = (8, 4, 1)
"""Rows of one sequence that one call can take in FULL. More rows take several calls."""


def program_specs(model: ModelConfig, actions: Sequence[Action], num_threads: int) -> list[ProgramSpec]:
    """Returns the programs that decoding needs.

    They are a layer, and a skipped layer with factors and offsets, for each action that runs; a skipped layer for
    several rows with the cheapest of these; a layer in FULL for a few rows of one sequence; norm and attention for rows
    that share products; and the INT8 head.
    """
    running: list[Action] = [action for action in actions if action is not Action.SKIP]
    wanted = [(kind, action, 1) for kind in (ProgramKind.LAYER, ProgramKind.SKIP) for action in running]
    if Action.INT8 in actions:
        wanted.append((ProgramKind.HEAD, Action.INT8, 1))
    wanted += [(ProgramKind.LAYER, Action.FULL, rows) for rows in _VERIFIED_ROWS if rows > 1]
    wanted.append((ProgramKind.SKIP_ROWS, min(running), 1))
    wanted += [(kind, Action.FULL, 1) for kind in (ProgramKind.ATTENTION, ProgramKind.NORM)]
    shape = ModelShape.of(model)
    return [ProgramSpec(kind, action, shape, num_threads, rows) for kind, action, rows in wanted]


def layer_spec(model: ModelConfig, action: Action, num_threads: int) -> ProgramSpec:
    """Returns the program of a layer for one row."""
    return ProgramSpec(ProgramKind.LAYER, action, ModelShape.of(model), num_threads)


def skip_specs(model: ModelConfig, kv_action: Action, rank: int, num_threads: int) -> list[ProgramSpec]:
    """Returns the programs with which one row, and several rows, skip a layer with a compensation of this rank."""
    kinds, shape = (ProgramKind.SKIP, ProgramKind.SKIP_ROWS), ModelShape.of(model)
    return [ProgramSpec(kind, kv_action, shape, num_threads, rank=rank) for kind in kinds]


def why_eager(model: ModelConfig, context_length: int) -> str | None:
    """Returns what the programs cannot compute of this model's layers, None if they can compute all of it."""
    block, sizes = model.block, [*ModelShape.of(model).matrices(), (model.vocab_size, model.hidden_size)]
    reasons = {
        "mixtures of experts": model.mixture is not None,
        "biases of outputs": block.has_output_bias or block.has_mlp_bias,
        "sliding windows of one position": 1 in model.sliding_window,
        "queries that grow with their position": any(
            rope is not None and queries_grow(rope, context_length) for rope in model.ropes
        ),
        "matrices of these sizes": not all(is_packable(*size) for size in sizes),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)
