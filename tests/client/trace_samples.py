"""Recorded decisions as a server records them, with made-up numbers.

`python tests/client/trace_samples.py FILE` writes a request in the shape of the embedded model, in the format of
`dash-client trace --save`, to look at the page without a server.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from dash_api.v1 import common_pb2, model_pb2

SKIP, INT4, INT8, FULL = 1, 2, 3, 4
ACTIONS = (SKIP, INT4, INT8, FULL)
LAYER_NANOS = {SKIP: 38_000, INT4: 272_000, INT8: 318_000, FULL: 516_000}
LAYER_COST = {SKIP: 0.0012, INT4: 0.0151, INT8: 0.0175, FULL: 0.0283}
HEAD_NANOS = 1_150_000
POLICY_NANOS = 58_000
START_UNIX_NANOS = 1_764_000_000_000_000_000

Step = model_pb2.RecordedStep


def recorded(steps: Sequence[Step], **changes: Any) -> model_pb2.GetDecisionsResponse:
    fields: dict[str, Any] = {
        "request_id": "r-1",
        "model": "smollm2-135m-instruct",
        "policy": "smollm2-135m-four-actions",
        "mode": common_pb2.MODE_ADAPTIVE,
        "compute_budget": 0.6,
        "price_of_compute": 0.8125,
        "layer_count": 30,
        "pinned_layers": [0, 1, 29],
        "score_actions": ACTIONS,
        "steps": steps,
    }
    return model_pb2.GetDecisionsResponse(**(fields | changes))


class StepMaker:
    """Makes one step after another, as the engine would run them.

    Args:
        is_inline: the policy runs in the decoder's thread, between layers, instead of beside it.
        block_size: number of layers decided together, from the input of the layer before them.
    """

    def __init__(
        self,
        *,
        layer_count: int = 30,
        pinned: Sequence[int] = (0, 1, 29),
        is_inline: bool = False,
        block_size: int = 4,
        seed: int = 0,
    ) -> None:
        self._layer_count = layer_count
        self._is_inline = is_inline
        free = [layer for layer in range(layer_count) if layer not in pinned]
        self._blocks = [free[place : place + block_size] for place in range(0, len(free), block_size)]
        self._random = random.Random(seed)
        self._now = START_UNIX_NANOS

    def decode(self, kind: int = model_pb2.STEP_KIND_DECODE) -> Step:
        """Makes a token whose layers the policy decides."""
        actions, scores = self._choices()
        step = self._begin(kind, [self._random.randrange(49_152)])
        step.actions = bytes(actions)
        for row in scores:
            step.scores.extend(row)
        self._run_layers(step, actions, self._blocks)
        return step

    def full_depth(self) -> Step:
        """Makes a token in mode EXACT that nothing drafted."""
        step = self._begin(model_pb2.STEP_KIND_DECODE, [self._random.randrange(49_152)])
        actions = [FULL] * self._layer_count
        step.actions = bytes(actions)
        self._run_layers(step, actions, [])
        return step

    def draft(self, length: int, accepted: int) -> list[Step]:
        """Makes drafts and their verification."""
        drafts = [self.decode(model_pb2.STEP_KIND_DRAFT) for _ in range(length)]
        tokens = [token for step in drafts[:accepted] for token in step.token_ids]
        verification = self._begin(model_pb2.STEP_KIND_VERIFICATION, [*tokens, self._random.randrange(49_152)])
        verification.accepted_token_count = accepted
        verification.duration_nanos = self._about(29_000_000)
        self._now += verification.duration_nanos + 100_000
        return [*drafts, verification]

    def _choices(self) -> tuple[list[int], list[list[float]]]:
        actions, scores = [FULL] * self._layer_count, [[0.0] * len(ACTIONS)] * self._layer_count
        need = self._random.gauss(0, 0.9)
        for layer in (layer for block in self._blocks for layer in block):
            depth = layer / self._layer_count
            # Skips layers in the middle of the model; some tokens need more than others.
            importance = 5 * abs(depth - 0.6) - 1.3 + need + self._random.gauss(0, 0.8)
            row = [-importance - 0.6, 0.9, 0.2 + 0.3 * importance, importance - 0.4]
            scores[layer] = [score + self._random.gauss(0, 0.25) for score in row]
            actions[layer] = ACTIONS[max(range(len(ACTIONS)), key=scores[layer].__getitem__)]
        return actions, scores

    def _begin(self, kind: int, token_ids: Sequence[int]) -> Step:
        return Step(kind=kind, token_ids=token_ids, start_unix_nanos=self._now)

    def _run_layers(self, step: Step, actions: Sequence[int], blocks: Sequence[Sequence[int]]) -> None:
        count = self._layer_count
        decided = {block[0]: block for block in blocks}
        decision_starts, decision_ends, exposed = [0] * count, [0] * count, [0] * count
        now, spent = self._about(42_000), 0.0
        for layer, action in enumerate(actions):
            if not self._is_inline and layer in decided and decision_ends[layer] > now:
                exposed[layer] = decision_ends[layer] - now + 4_000
                now += exposed[layer]
            if block := decided.get(layer + 1):
                start, length = now + 3_000, self._about(POLICY_NANOS)
                for other in block:
                    decision_starts[other], decision_ends[other] = start, start + length
                if self._is_inline:
                    exposed[block[0]] = length
                    now = start + length + 2_000
            step.cost_spent.append(spent)
            spent += LAYER_COST[action]
            step.layer_start_nanos.append(now)
            now += self._about(LAYER_NANOS[action])
            step.layer_end_nanos.append(now)
            now += 3_000
        step.decision_start_nanos.extend(decision_starts)
        step.decision_end_nanos.extend(decision_ends)
        step.exposed_nanos.extend(exposed)
        step.duration_nanos = now + self._about(HEAD_NANOS)
        self._now += step.duration_nanos + 60_000

    def _about(self, nanos: int) -> int:
        return round(nanos * self._random.lognormvariate(0, 0.09))


def adaptive(count: int = 24, **options: Any) -> model_pb2.GetDecisionsResponse:
    """A request in mode ADAPTIVE, in the shape of the embedded model."""
    maker = StepMaker(**options)
    return recorded([maker.decode() for _ in range(count)])


def exact() -> model_pb2.GetDecisionsResponse:
    """A request in mode EXACT: 3 of 3 and 1 of 3 accepted, a token that nothing drafted, and unverified drafts."""
    maker = StepMaker()
    steps = [*maker.draft(3, 3), *maker.draft(3, 1), maker.full_depth(), *maker.draft(2, 2)[:2]]
    return recorded(steps, mode=common_pb2.MODE_EXACT, unrecorded_step_count=9)


def small(**changes: Any) -> model_pb2.GetDecisionsResponse:
    """Two steps of four layers; the policy decides the middle two, one by one."""
    maker = StepMaker(layer_count=4, pinned=(0, 3), block_size=1)
    fields = {"steps": [maker.decode(), maker.decode()], "layer_count": 4, "pinned_layers": [0, 3]}
    return recorded(**(fields | changes))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json_format.MessageToJson(adaptive()))
