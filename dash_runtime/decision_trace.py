"""What was recorded of one request: its first steps through the layers, with the decisions and all times.

Imports no torch: msgspec carries it from the worker to the server. Numbers that there are one of per layer are packed,
so that a request's record is a few buffers and not thousands of objects. All clocks are the worker's.
"""

import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from dash_runtime.actions import Action

MAX_UINT32 = 0xFFFF_FFFF


class StepKind(StrEnum):
    """What a step did."""

    DECODE = "decode"
    """One token at the depth that was decided, put out at once."""
    DRAFT = "draft"
    """One token in mode EXACT, to be verified."""
    VERIFICATION = "verification"
    """A draft's tokens, verified at full depth."""


@dataclass(frozen=True, slots=True)
class TraceStep:
    """One way through the layers.

    The packed fields have one number per layer, `pack_uint32`'s nanoseconds from the step's start unless said
    otherwise, and are empty for a verification, which runs every layer in full.
    """

    kind: StepKind
    token_ids: list[int]
    """The tokens that it put out, drafted, or, in a verification, put out after it."""
    start_unix_ns: int
    duration_ns: int
    """The head and the choice of the token included."""
    actions: bytes = b""
    """One byte per layer: what ran."""
    layer_starts: bytes = b""
    layer_ends: bytes = b""
    """When the layer's work was done or, on an accelerator, queued."""
    decision_starts: bytes = b""
    """When the evaluation that decided the layer began; 0 for layers without a decision."""
    decision_ends: bytes = b""
    """When it was done; 0 for layers without a decision, and for no others."""
    exposed: bytes = b""
    """How long the decoder waited for the decision, or spent on it inline; counted at the first layer of a block."""
    scores: bytes = b""
    """`pack_float32`, `[layers, score_actions]`; 0 for layers without a decision. Empty where there are none."""
    cost_spent: bytes = b""
    """`pack_float32`: share of a full-depth token's cost spent before the layer, by the policy's own table."""
    accepted_token_count: int | None = None
    """Of a verification: how many drafted tokens it accepted."""


@dataclass(frozen=True, slots=True)
class DecisionTrace:
    """A request that is over, or was cancelled. The first token comes from the prefill and is in no step."""

    request_id: str
    policy: str
    compute_budget: float | None
    price: float | None
    """The price of compute λ; None where no policy is asked, or it knows none."""
    num_layers: int
    pinned_layers: list[int]
    score_actions: list[Action]
    """The action of each score, in order."""
    granted_unix_ns: int
    """When it got its slot."""
    ended_unix_ns: int
    first_token_id: int | None = None
    """None: it was cancelled before."""
    first_token_unix_ns: int | None = None
    steps: list[TraceStep] = field(default_factory=list)
    num_unrecorded_steps: int = 0
    """After those that are recorded."""


def pack_uint32(values: Sequence[int]) -> bytes:
    """Little-endian, 4 bytes each; what does not fit becomes the nearest number that does."""
    try:
        packed = array("I", values)
    except OverflowError:
        packed = array("I", [min(max(value, 0), MAX_UINT32) for value in values])
    return _little_endian(packed).tobytes()


def unpack_uint32(data: bytes) -> array:
    """An array of ints. Raises ValueError where `data` is cut off."""
    return _unpack("I", data)


def pack_float32(values: Iterable[float]) -> bytes:
    """Little-endian, 4 bytes each."""
    return _little_endian(array("f", values)).tobytes()


def unpack_float32(data: bytes) -> array:
    """An array of floats. Raises ValueError where `data` is cut off."""
    return _unpack("f", data)


def _unpack(typecode: str, data: bytes) -> array:
    values = array(typecode)
    values.frombytes(data)
    return _little_endian(values)


def _little_endian(values: array) -> array:
    if sys.byteorder == "big":
        values.byteswap()
    return values
