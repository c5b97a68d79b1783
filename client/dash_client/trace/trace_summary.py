"""Derives from recorded decisions what a trace page adds: drafts and their verdicts, shares, overlapping times.

Knows no HTML.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dash_client.decision_trace import RecordedDecisions, RecordedLayer, RecordedStep, StepKind
from dash_client.types import Action


@dataclass(frozen=True, slots=True)
class StepGroup:
    """Steps that belong together: a draft with its verification, or tokens that were not drafted."""

    first: int
    """The index of its first step, from 0."""
    steps: tuple[RecordedStep, ...]

    @property
    def drafted(self) -> int:
        """The number of its steps that are drafts."""
        return sum(step.kind is StepKind.DRAFT for step in self.steps)

    @property
    def from_text(self) -> int:
        """The number of drafted tokens that came from the text, in no step of their own."""
        return self.steps[-1].text_token_count or 0

    @property
    def accepted(self) -> int | None:
        """The number of accepted tokens of the draft. None if their verification was not recorded."""
        count = self.steps[-1].accepted_token_count
        if self.steps[-1].kind is not StepKind.VERIFICATION or count is None:
            return None
        return min(count, self.drafted + self.from_text)

    def verdicts(self) -> Iterator[bool | None]:
        """Yields for each step True if it is an accepted draft, False if a rejected one, else None."""
        for place, step in enumerate(self.steps):
            is_known = step.kind is StepKind.DRAFT and self.accepted is not None
            yield place < (self.accepted or 0) if is_known else None


def step_groups(steps: Sequence[RecordedStep]) -> list[StepGroup]:
    """Returns all steps, in order, in groups."""
    groups: list[StepGroup] = []
    first = 0
    for place, step in enumerate(steps):
        following = steps[place + 1].kind if place + 1 < len(steps) else None
        is_end = (
            following is None
            or step.kind is StepKind.VERIFICATION
            or (step.kind is StepKind.DECODE) != (following is StepKind.DECODE)
        )
        if is_end:
            groups.append(StepGroup(first, tuple(steps[first : place + 1])))
            first = place + 1
    return groups


def first_positions(groups: Sequence[StepGroup]) -> list[int]:
    """Returns for each step the position of its first token in the output; the prefill's token has position 0.

    A draft has the position that its token gets if it is accepted.
    """
    positions: list[int] = []
    begin = 1
    for group in groups:
        put_out = 0
        for place, step in enumerate(group.steps):
            # A verification puts out the accepted drafts again, so it starts at the same position.
            is_verification = step.kind is StepKind.VERIFICATION
            positions.append(begin if is_verification else begin + place)
            put_out += 0 if step.kind is StepKind.DRAFT else len(step.token_ids)
        begin += put_out
    return positions


def output_token_count(steps: Sequence[RecordedStep]) -> int:
    """Returns the number of tokens that the steps put out, without rejected drafts."""
    return sum(len(step.token_ids) for step in steps if step.kind is not StepKind.DRAFT)


def action_shares(steps: Sequence[RecordedStep]) -> dict[Action, float]:
    """Returns the share of each action in all layers, without verifications. Empty if there are no such layers."""
    actions = [layer.action for step in steps for layer in step.layers]
    return {action: actions.count(action) / len(actions) for action in Action} if actions else {}


def mean_cost_spent(steps: Sequence[RecordedStep]) -> float | None:
    """Returns the mean share of a full-depth token's cost spent before the last layer, without verifications."""
    spent = [cost for step in steps if step.layers and (cost := step.layers[-1].cost_spent) is not None]
    return sum(spent) / len(spent) if spent else None


def exposed_ns_per_token(decisions: RecordedDecisions) -> float | None:
    """Returns the mean exposed policy time per output token, in nanoseconds. None if there are no tokens."""
    tokens = output_token_count(decisions.steps)
    exposed = sum(layer.exposed_ns for step in decisions.steps for layer in step.layers)
    return exposed / tokens if tokens else None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of the policy: its layers and its times, in nanoseconds from the step's start."""

    first_layer: int
    last_layer: int
    start_ns: int
    end_ns: int
    hidden_ns: int
    """The part of it that passed while a layer was running."""
    wait_start_ns: int
    wait_end_ns: int
    """The exposed time, from `wait_start_ns` to here: the decoder was waiting for it."""


def evaluations(step: RecordedStep) -> list[Evaluation]:
    """Returns the policy's evaluations in one step, by layer."""
    return [_evaluation(step, *block) for block in _blocks(step.layers)]


def _blocks(layers: Sequence[RecordedLayer]) -> Iterator[tuple[int, int]]:
    """Returns the first and last layer of each block that was decided together; pinned layers may lie between."""
    blocks: dict[tuple[int, int], list[int]] = {}
    for place, layer in enumerate(layers):
        if layer.decision is not None:
            blocks.setdefault((layer.decision.start_ns, layer.decision.end_ns), []).append(place)
    return ((block[0], block[-1]) for block in blocks.values())


def _evaluation(step: RecordedStep, first: int, last: int) -> Evaluation:
    layer = step.layers[first]
    decision = layer.decision
    assert decision is not None
    hidden = sum(
        max(0, min(other.end_ns, decision.end_ns) - max(other.start_ns, decision.start_ns)) for other in step.layers
    )
    # Without overlap the evaluation itself stopped the decoder. Else the decoder waited just before the decided layer.
    wait_end = layer.start_ns if hidden else decision.end_ns
    return Evaluation(
        first_layer=first,
        last_layer=last,
        start_ns=decision.start_ns,
        end_ns=decision.end_ns,
        hidden_ns=hidden,
        wait_start_ns=max(0, wait_end - layer.exposed_ns),
        wait_end_ns=wait_end,
    )
