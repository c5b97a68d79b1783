"""The record of one request: its first steps through the layers, with decisions and times.

Imports no torch: msgspec carries it from the worker to the server. Numbers per layer are packed, so a request's record
is a few buffers instead of thousands of objects. All clocks are the worker's.
"""

import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from dash_runtime.actions import Action

MAX_UINT32 = 0xFFFF_FFFF


class StepKind(StrEnum):
    """The kind of a step."""

    DECODE = "decode"
    """One token at the decided depth, output at once."""
    DRAFT = "draft"
    """One token in mode EXACT, to be verified later."""
    VERIFICATION = "verification"
    """A draft's tokens, verified at full depth."""


@dataclass(frozen=True, slots=True)
class TraceStep:
    """One pass through the layers.

    The packed fields have one number per layer. Unless their docs differ, they are nanoseconds from the step's start,
    by `pack_uint32`. They are empty for a verification, which runs every layer in full.
    """

    kind: StepKind
    token_ids: list[int]
    """The token that was output or drafted; for a verification, the tokens that it output."""
    start_unix_ns: int
    duration_ns: int
    """Includes the head and the choice of the token."""
    actions: bytes = b""
    """One byte per layer: the action that ran."""
    layer_starts: bytes = b""
    layer_ends: bytes = b""
    """The times at which the layer's work was done, or queued on an accelerator."""
    decision_starts: bytes = b""
    """The start of the evaluation that decided the layer; 0 for layers without a decision."""
    decision_ends: bytes = b""
    """The end of that evaluation; 0 for layers without a decision, and for no others."""
    exposed: bytes = b""
    """Time that the decoder waited for the decision or spent on it inline, at the first layer of a decision block."""
    scores: bytes = b""
    """`pack_float32`, `[layers, score_actions]`; 0 for layers without a decision. Empty without any scores."""
    cost_spent: bytes = b""
    """`pack_float32`: share of a full-depth token's cost spent before the layer, by the policy's own table."""
    cost: float | None = None
    """Cost of the step in full-depth tokens, by the table that the answer's mean cost comes from."""
    accepted_token_count: int | None = None
    """Number of drafted tokens that a verification accepted; None for other kinds."""
    text_token_count: int | None = None
    """Number of tokens of a verified draft that came from the text, in no step of their own; None for other kinds."""


@dataclass(frozen=True, slots=True)
class DecisionTrace:
    """The record of a finished or cancelled request. The first token comes from the prefill and is in no step."""

    request_id: str
    policy: str
    compute_budget: float | None
    price: float | None
    """The price of compute λ; None if no policy is asked, or the policy has no price."""
    num_layers: int
    pinned_layers: list[int]
    score_actions: list[Action]
    """The action of each score, in order."""
    granted_unix_ns: int
    """The time at which the request got its slot."""
    ended_unix_ns: int
    first_token_id: int | None = None
    """None if the request was cancelled before it."""
    first_token_unix_ns: int | None = None
    steps: list[TraceStep] = field(default_factory=list)
    num_unrecorded_steps: int = 0
    """Number of further steps, which were not recorded."""


def pack_uint32(values: Sequence[int]) -> bytes:
    """Packs little-endian, 4 bytes each. A value out of range becomes the nearest one in range."""
    try:
        packed = array("I", values)
    except OverflowError:
        packed = array("I", [min(max(value, 0), MAX_UINT32) for value in values])
    return _little_endian(packed).tobytes()


def unpack_uint32(data: bytes) -> array:
    """Returns an array of ints. Raises ValueError if `data` is cut off."""
    return _unpack("I", data)


def pack_float32(values: Iterable[float]) -> bytes:
    """Packs little-endian, 4 bytes each."""
    return _little_endian(array("f", values)).tobytes()


def unpack_float32(data: bytes) -> array:
    """Returns an array of floats. Raises ValueError if `data` is cut off."""
    return _unpack("f", data)


def _unpack(typecode: str, data: bytes) -> array:
    values = array(typecode)
    values.frombytes(data)
    return _little_endian(values)


def _little_endian(values: array) -> array:
    if sys.byteorder == "big":
        values.byteswap()
    return values
