"""Records a sequence's first steps while it is decoded, and packs them once it is over.

While tokens are made it only keeps what they leave behind anyway, the times and the tickets; numbers are taken apart
afterwards. Knows steps and deciders; knows no sink.
"""

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from dash_runtime.actions import Action
from dash_runtime.engine.step import DecidedBlock, Decider, StepOutput
from dash_runtime.policy.catalog import Assignment
from dash_runtime.recorded import RecordedRequest, RecordedStep, StepKind, pack_float32, pack_uint32


@dataclass(frozen=True, slots=True)
class _Pass:
    """One token's way through the layers."""

    kind: StepKind
    token_id: int
    plan: bytes
    layer_times: array
    blocks: Sequence[DecidedBlock]
    place: int
    """Of the row among its decider's."""
    started_ns: int
    ended_ns: int


@dataclass(frozen=True, slots=True)
class _Verification:
    token_ids: list[int]
    num_accepted: int
    started_ns: int
    ended_ns: int


class Recording:
    """Of one sequence; of up to 0 steps there is none. Times are `perf_counter_ns`'s until they are packed."""

    def __init__(self, assignment: Assignment, max_steps: int) -> None:
        self._assignment = assignment
        self._max_steps = max_steps
        self._steps: list[_Pass | _Verification] = []
        self._num_unrecorded = 0
        self._unix_offset_ns = time.time_ns() - time.perf_counter_ns()
        self._granted_ns = time.perf_counter_ns()
        self._first_token: tuple[int, int] | None = None

    def add_first_token(self, token_id: int) -> None:
        """The one that the prefill made, just now."""
        self._first_token = token_id, time.perf_counter_ns() + self._unix_offset_ns

    def add_pass(
        self, kind: StepKind, token_id: int, output: StepOutput, row: int, decider: Decider, started_ns: int
    ) -> None:
        """What `row` of the batch went through, until just now, to make this token."""
        if self._has_room():
            place = decider.rows.index(row)
            plan, times, ended_ns = output.plans[row], output.layer_times, time.perf_counter_ns()
            self._steps.append(_Pass(kind, token_id, plan, times, decider.blocks, place, started_ns, ended_ns))

    def add_verification(self, token_ids: list[int], num_accepted: int, started_ns: int) -> None:
        """A draft was verified until just now, and these tokens put out after it."""
        if self._has_room():
            self._steps.append(_Verification(token_ids, num_accepted, started_ns, time.perf_counter_ns()))

    def packed(self, request_id: str) -> RecordedRequest | None:
        """All of it, for a sequence that has just ended."""
        if not self._max_steps:
            return None
        policy, costs = self._assignment.policy, self._assignment.costs
        is_asked = len(policy.pinned) < costs.num_layers
        scores = self._all_scores()
        return RecordedRequest(
            request_id=request_id,
            policy=policy.name,
            compute_budget=self._assignment.compute_budget,
            price=self._assignment.price if is_asked and policy.score_actions else None,
            num_layers=costs.num_layers,
            pinned_layers=sorted(policy.pinned),
            score_actions=list(policy.score_actions),
            granted_unix_ns=self._granted_ns + self._unix_offset_ns,
            ended_unix_ns=time.perf_counter_ns() + self._unix_offset_ns,
            first_token_id=None if self._first_token is None else self._first_token[0],
            first_token_unix_ns=None if self._first_token is None else self._first_token[1],
            steps=[
                self._packed_pass(step, scores) if isinstance(step, _Pass) else self._packed_verification(step)
                for step in self._steps
            ],
            num_unrecorded_steps=self._num_unrecorded,
        )

    def _has_room(self) -> bool:
        if len(self._steps) < self._max_steps:
            return True
        self._num_unrecorded += 1
        return False

    def _all_scores(self) -> list[float]:
        """Those of all blocks of all steps, in order: from an accelerator they come in one piece."""
        parts = [
            block.scores[step.place].flatten()
            for step in self._steps
            if isinstance(step, _Pass)
            for block in step.blocks
            if block.scores is not None
        ]
        scores: list[float] = torch.cat(parts).tolist() if parts else []
        scores.reverse()  # so that they are taken off the end
        return scores

    def _packed_pass(self, step: _Pass, all_scores: list[float]) -> RecordedStep:
        policy, costs = self._assignment.policy, self._assignment.costs
        num_layers, width = costs.num_layers, len(policy.score_actions)
        starts, ends, exposed = [0] * num_layers, [0] * num_layers, [0] * num_layers
        scores = [0.0] * (num_layers * width)
        for block in step.blocks:
            ticket = block.ticket
            start, end = ticket.started_ns - step.started_ns, max(1, ticket.ended_ns - step.started_ns)
            exposed[block.layers[0]] = ticket.exposed_ns
            for layer in block.layers:
                starts[layer], ends[layer] = start, end
                if block.scores is not None:
                    scores[layer * width : (layer + 1) * width] = [all_scores.pop() for _ in range(width)]
        layer_costs = [costs.layer[Action(action)] for action in step.plan]
        return RecordedStep(
            kind=step.kind,
            token_ids=[step.token_id],
            start_unix_ns=step.started_ns + self._unix_offset_ns,
            duration_ns=step.ended_ns - step.started_ns,
            actions=step.plan,
            layer_starts=pack_uint32(time_ns - step.started_ns for time_ns in step.layer_times[0::2]),
            layer_ends=pack_uint32(time_ns - step.started_ns for time_ns in step.layer_times[1::2]),
            decision_starts=pack_uint32(starts),
            decision_ends=pack_uint32(ends),
            exposed=pack_uint32(exposed),
            scores=pack_float32(scores) if any(block.scores is not None for block in step.blocks) else b"",
            cost_spent=pack_float32(accumulate(layer_costs[:-1], initial=0.0)),
        )

    def _packed_verification(self, step: _Verification) -> RecordedStep:
        return RecordedStep(
            kind=StepKind.VERIFICATION,
            token_ids=step.token_ids,
            start_unix_ns=step.started_ns + self._unix_offset_ns,
            duration_ns=step.ended_ns - step.started_ns,
            accepted_token_count=step.num_accepted,
        )
