"""The structures and constants of the native code, field for field: every one is eight bytes wide, or made of such.

The library is refused if it has others (layout.py): a structure here is a line there.
"""

from ctypes import POINTER, Structure, c_double, c_int64, c_void_p

from dash_runtime.linears.grouped_matrix import LANES as LANES
from dash_runtime.passes import LONGEST_MATCH as LONGEST_MATCH
from dash_runtime.passes import MOST_GUESSES as MOST_GUESSES

MOST_CHANNELS, MOST_NUMBERS, MOST_EXACT_TILES, LINE_BYTES, ROUNDED_TOKENS = 512, 256, 64, 64, 16
"""As in the source: a head's channels, a policy's features, facts and scores, tiles of a row's logits that are computed
again, the floats of a vector, a cache line, and the positions whose rounded keys and values lie together: a sequence's
memory begins with a multiple of them."""
NO_FILE = -1
"""As in the source: the file of a burst that nobody ends early."""
NUM_ACTIONS, NUM_MATRICES = 5, 5
"""As in the source: of a layer's matrices."""


def _pointers(*names: str) -> list[tuple[str, type[c_void_p]]]:
    return [(name, c_void_p) for name in names]


def _numbers(*names: str) -> list[tuple[str, type[c_int64]]]:
    return [(name, c_int64) for name in names]


class MatrixStruct(Structure):
    _fields_ = [*_pointers("words", "further", "scales"), *_numbers("layout", "num_inputs", "block_tiles", "num_tiles")]


class HeadsStruct(Structure):
    _fields_ = [*_numbers("num_heads", "num_kv_heads", "head_dim"), ("attention_scale", c_double)]


class ModelStruct(Structure):
    _fields_ = [
        ("heads", HeadsStruct),
        *_numbers("hidden_size", "intermediate_size", "activation", "num_layers"),
        *((name, c_double) for name in ("eps", "residual_multiplier")),
        *_numbers("num_experts", "num_chosen", "expert_size"),
    ]


class MixtureStruct(Structure):
    _fields_ = [("router", MatrixStruct), *_numbers("num_experts", "num_chosen", "has_normed_shares")]


NORMS = ("input_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm")
"""A layer's norms, in the order in which it runs them."""
_VECTORS = (*NORMS, "head_norm", "query_norm", "key_norm", "bias")


class LayerStruct(Structure):
    _fields_ = [
        *_pointers(*_VECTORS),
        ("matrices", (MatrixStruct * NUM_MATRICES) * NUM_ACTIONS),
        ("mixture", MixtureStruct),
    ]


class CompensationStruct(Structure):
    _fields_ = [("narrow", MatrixStruct), ("widen", MatrixStruct), *_pointers("vectors"), *_numbers("rank")]


class DrawStruct(Structure):
    _fields_ = [*((name, c_double) for name in ("temperature", "top_p", "min_p", "number")), *_numbers("top_k")]


class RotaryStruct(Structure):
    _fields_ = _pointers("cosines", "sines")


class SpanStruct(Structure):
    _fields_ = [
        *_pointers("memory"),
        *_numbers("layer_bytes", "values_bytes", "num_tokens", "first_row", "num_rows"),
        *_pointers("rounded"),
        *_numbers("rounded_bytes"),
        *_pointers("filled"),
    ]


class BlockStruct(Structure):
    _fields_ = _pointers("terms", "facts", "inner_terms", "outputs", "output_terms")


class PolicyStruct(Structure):
    _fields_ = [
        *_pointers("hidden_weight", "inner_weight"),
        ("blocks", POINTER(BlockStruct)),
        *_numbers("hidden_size", "width", "inner_width", "num_facts", "num_actions", "block_size"),
    ]


class DecisionsStruct(Structure):
    _fields_ = [
        ("policy", POINTER(PolicyStruct)),
        *_pointers("facts"),
        ("actions", POINTER(c_int64)),
        ("layer_costs", POINTER(c_double)),
        *_pointers("scores"),
        *_numbers("num_known"),
    ]


class RowPlanStruct(Structure):
    _fields_ = [
        *_pointers("pinned"),
        ("decisions", POINTER(DecisionsStruct)),
        ("compensations", POINTER(CompensationStruct)),
        *_numbers("kv_action"),
        *_pointers("plan"),
    ]


class PlannerStruct(Structure):
    _fields_ = [("seconds", POINTER(c_double)), *_numbers("most_rows"), ("split_seconds", c_double)]


class EmbeddingStruct(Structure):
    _fields_ = [*_pointers("words"), ("multiplier", c_double)]


class BoundsStruct(Structure):
    _fields_ = [("rough", MatrixStruct), *_pointers("errors", "lengths")]


class TokenRowsStruct(Structure):
    _fields_ = [*_pointers("words", "units"), *_numbers("num_inputs")]


class HeadStruct(Structure):
    _fields_ = [
        *_pointers("norm"),
        *((name, MatrixStruct) for name in ("matrix", "rough", "narrow")),
        ("repeated", POINTER(c_int64)),
        *_pointers("mean", "offsets"),
        ("rows", TokenRowsStruct),
        ("bounds", BoundsStruct),
        *_numbers("num_exact", "num_tiles"),
        ("multiplier", c_double),
    ]


class BurstStruct(Structure):
    _fields_ = _pointers("tokens", "plans", "times", "scores", "marks", "rows")


class GuessesStruct(Structure):
    _fields_ = [*_pointers("tokens"), *_numbers("num_tokens", "num_left"), ("numbers", c_int64 * (LONGEST_MATCH + 1))]


class PassStruct(Structure):
    _fields_ = [
        *_pointers("workspace"),
        ("shape", POINTER(ModelStruct)),
        ("layers", POINTER(LayerStruct)),
        ("plans", POINTER(RowPlanStruct)),
        ("planner", POINTER(PlannerStruct)),
        *((name, POINTER(c_int64)) for name in ("windows", "rotary_of")),
        ("rotary", POINTER(RotaryStruct)),
        ("spans", POINTER(SpanStruct)),
        ("tokens", POINTER(c_int64)),
        ("embedding", POINTER(EmbeddingStruct)),
        *_pointers("input", "output"),
        ("head", POINTER(HeadStruct)),
        *_pointers("logits"),
        ("likeliest", POINTER(c_int64)),
        *_numbers("num_spans", "num_rotaries", "token_bytes"),
        *_numbers("num_rows", "num_plans", "num_threads", "first_layer", "last_layer", "attends_rounded"),
        *_pointers("times"),
    ]
