"""Records a sequence's first steps while it decodes, and packs them once it is over.

While tokens are made it only keeps references to times and tickets, which exist anyway. Numbers are computed
afterwards. Knows steps and deciders; knows no sink.
"""

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decision_trace import MAX_UINT32, DecisionTrace, StepKind, TraceStep
from dash_runtime.engine.decider import DecidedBlock, Decider
from dash_runtime.passes import PassResult
from dash_runtime.policy.catalog import Assignment


@dataclass(frozen=True, slots=True)
class _Pass:
    """One token's pass through the layers."""

    kind: StepKind
    token_id: int
    cost: float
    plan: bytes
    layer_times: array
    started_ns: int
    ended_ns: int
    scores: bytes | None = None
    """Those with which the pass decided its layers; None if it decided none."""
    blocks: Sequence[DecidedBlock] = ()
    """The blocks that were decided between layers."""
    place: int = 0
    """The row's index in these blocks."""

    @property
    def way(self) -> tuple[bool, bool]:
        """The way in which the pass decided: between layers, or by itself. Passes of one way are packed together. A
        sequence has several ways in mode EXACT, whose full depth decides nothing, and when it decodes alone and then in
        a batch."""
        return bool(self.blocks), self.scores is not None


@dataclass(frozen=True, slots=True)
class _Verification:
    token_ids: list[int]
    num_accepted: int
    num_from_text: int
    cost: float
    started_ns: int
    ended_ns: int


class TraceRecorder:
    """Records one sequence, or nothing if `max_steps` is 0. Times are `perf_counter_ns`'s until they are packed."""

    def __init__(self, assignment: Assignment, max_steps: int) -> None:
        self._assignment = assignment
        self._layer_costs = numpy.zeros(max(Action) + 1)
        """Indexed by Action's number."""
        for action, cost in assignment.costs.layer.items():
            self._layer_costs[action] = cost
        self._max_steps = max_steps
        self._steps: list[_Pass | _Verification] = []
        self._num_unrecorded = 0
        self._unix_offset_ns = time.time_ns() - time.perf_counter_ns()
        self._granted_ns = time.perf_counter_ns()
        self._first_token: tuple[int, int] | None = None

    def add_first_token(self, token_id: int) -> None:
        """Records the token that the prefill has just made."""
        self._first_token = token_id, time.perf_counter_ns() + self._unix_offset_ns

    def add_pass(
        self, kind: StepKind, token_id: int, cost: float, result: PassResult, place: int, decider: Decider
    ) -> None:
        """Records the pass of a token, which has just ended with it, by its place in the result; `cost` is in
        full-depth tokens."""
        if self._has_room():
            record, blocks = result.record, decider.blocks
            own = result.plans[place], record.layer_times(place), *record.times(place), record.scores(place)
            row = decider.rows.index(place) if blocks else 0
            self._steps.append(_Pass(kind, token_id, cost, *own, blocks, row))

    def add_verification(
        self, token_ids: list[int], num_accepted: int, num_from_text: int, cost: float, started_ns: int
    ) -> None:
        """Records a verification that has just ended, and its output tokens. `num_from_text` of the draft's came from
        the text, in no pass."""
        if self._has_room():
            ended_ns = time.perf_counter_ns()
            self._steps.append(_Verification(token_ids, num_accepted, num_from_text, cost, started_ns, ended_ns))

    def packed(self, request_id: str) -> DecisionTrace | None:
        """Returns the whole trace of a sequence that has just ended; None if nothing was to be recorded."""
        if not self._max_steps:
            return None
        policy, costs = self._assignment.policy, self._assignment.costs
        return DecisionTrace(
            request_id=request_id,
            policy=policy.name,
            compute_budget=self._assignment.compute_budget,
            price=None if self._assignment.is_planned or not policy.score_actions else self._assignment.price,
            num_layers=costs.num_layers,
            pinned_layers=sorted(policy.pinned),
            score_actions=list(policy.score_actions),
            granted_unix_ns=self._granted_ns + self._unix_offset_ns,
            ended_unix_ns=time.perf_counter_ns() + self._unix_offset_ns,
            first_token_id=None if self._first_token is None else self._first_token[0],
            first_token_unix_ns=None if self._first_token is None else self._first_token[1],
            steps=self._packed_steps(),
            num_unrecorded_steps=self._num_unrecorded,
        )

    @property
    def has_room(self) -> bool:
        """True if the next step will be recorded."""
        return len(self._steps) < self._max_steps

    def _has_room(self) -> bool:
        self._num_unrecorded += not self.has_room
        return self.has_room

    def _packed_steps(self) -> list[TraceStep]:
        steps: dict[int, TraceStep] = {}
        groups: dict[tuple[bool, bool], dict[int, _Pass]] = {}
        for index, step in enumerate(self._steps):
            if isinstance(step, _Pass):
                groups.setdefault(step.way, {})[index] = step
        for passes in groups.values():
            steps |= zip(passes, self._packed_passes(list(passes.values())), strict=True)
        return [
            self._packed_verification(step) if isinstance(step, _Verification) else steps[index]
            for index, step in enumerate(self._steps)
        ]

    def _packed_passes(self, passes: list[_Pass]) -> list[TraceStep]:
        """Packs passes with the same decision blocks.

        All at once: an operation on all layers of all steps costs as much as one on a few numbers.
        """
        num_layers, blocks = self._assignment.costs.num_layers, passes[0].blocks
        policy = self._assignment.policy
        begun = numpy.array([step.started_ns for step in passes])[:, None, None]
        times = numpy.frombuffer(b"".join(step.layer_times for step in passes), numpy.int64)
        layers = times.reshape(len(passes), num_layers, 2).swapaxes(1, 2) - begun
        decisions = numpy.zeros((len(passes), 3, num_layers), numpy.int64)
        if passes[0].scores is not None:  # the program of the layer before decided
            decided = [layer for layer in range(num_layers) if layer not in policy.pinned]
            evaluations = layers[:, :, [layer - 1 for layer in decided]]
            decisions[:, :2, decided] = numpy.maximum(evaluations, 1)  # 0 means no decision
        elif blocks:
            first_layers = [block.layers[0] for block in blocks]
            tickets = numpy.array([[_ticket_times(block) for block in own.blocks] for own in passes]).swapaxes(1, 2)
            evaluations = tickets[:, :2] - begun
            decisions[:, 2, first_layers] = tickets[:, 2]
            decided = [layer for block in blocks for layer in block.layers]
            block_of = [index for index, block in enumerate(blocks) for _ in block.layers]
            decisions[:, :2, decided] = numpy.maximum(evaluations[:, :, block_of], 1)
        numbers = numpy.concatenate((layers, decisions), axis=1).clip(0, MAX_UINT32).astype("<u4")
        plans = numpy.frombuffer(b"".join(step.plan for step in passes), numpy.uint8).reshape(len(passes), num_layers)
        spent = numpy.zeros((len(passes), num_layers), "<f4")
        spent[:, 1:] = self._layer_costs[plans[:, :-1]].cumsum(axis=1)
        scores = self._all_scores(passes)
        steps = []
        for step, own_numbers, own_scores, own_spent in zip(passes, numbers, scores, spent, strict=True):
            layer_starts, layer_ends, decision_starts, decision_ends, exposed = map(numpy.ndarray.tobytes, own_numbers)
            steps.append(
                TraceStep(
                    kind=step.kind,
                    token_ids=[step.token_id],
                    start_unix_ns=step.started_ns + self._unix_offset_ns,
                    duration_ns=step.ended_ns - step.started_ns,
                    actions=step.plan,
                    layer_starts=layer_starts,
                    layer_ends=layer_ends,
                    decision_starts=decision_starts,
                    decision_ends=decision_ends,
                    exposed=exposed,
                    scores=own_scores,
                    cost_spent=own_spent.tobytes(),
                    cost=step.cost,
                )
            )
        return steps

    def _all_scores(self, passes: list[_Pass]) -> list[bytes]:
        """Returns each step's packed scores, in the order of layers."""
        blocks = passes[0].blocks
        if not blocks or blocks[0].scores is None:
            return [step.scores or b"" for step in passes]
        policy, costs = self._assignment.policy, self._assignment.costs
        scores = numpy.zeros((len(passes), costs.num_layers, len(policy.score_actions)), "<f4")
        where = [layer for block in blocks for layer in block.layers]
        scores[:, where] = _decided_scores(passes).reshape(len(passes), len(where), -1)
        return [own.tobytes() for own in scores]

    def _packed_verification(self, step: _Verification) -> TraceStep:
        return TraceStep(
            kind=StepKind.VERIFICATION,
            token_ids=step.token_ids,
            start_unix_ns=step.started_ns + self._unix_offset_ns,
            duration_ns=step.ended_ns - step.started_ns,
            cost=step.cost,
            accepted_token_count=step.num_accepted,
            text_token_count=step.num_from_text,
        )


def _ticket_times(block: DecidedBlock) -> tuple[int, int, int]:
    """Returns when an evaluation started and ended, and the time that the decoder lost."""
    return block.ticket.started_ns, block.ticket.ended_ns, block.ticket.exposed_ns


def _decided_scores(passes: list[_Pass]) -> numpy.ndarray:
    """Returns the scores of passes with the same decision blocks, in order."""
    parts = [[block.scores for block in step.blocks if block.scores is not None] for step in passes]
    if len({(step.place, len(own[0])) for step, own in zip(passes, parts, strict=True)}) == 1:
        return _joined([part for own in parts for part in own], passes[0].place).numpy()
    # The batch changed in between.
    return torch.cat([_joined(own, step.place) for step, own in zip(passes, parts, strict=True)]).numpy()


def _joined(parts: Sequence[Tensor], place: int) -> Tensor:
    """Returns a row's scores of several decision blocks, `[rows, layers, actions]` each."""
    return torch.cat([*parts], dim=1)[place]
