"""Makes the spans of a decision trace: tokens with their decisions, and drafts. Knows no server and no caller.

token                a decode step, or a drafted token that was accepted
  skip layer 12, …   a decision: its name shows what was done with which layer, so that pages can be read and searched
  layer 12, …        one per layer, if asked for
draft                in mode EXACT: from the first drafted token to the end of the verification
  verification
  rejected token     with its decisions; `drafted token` if it was neither rejected nor put out
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from opentelemetry.sdk.trace import ReadableSpan

from dash_runtime.actions import Action
from dash_runtime.decision_trace import DecisionTrace, StepKind, TraceStep, unpack_float32, unpack_uint32
from dash_server.telemetry.span_tree import Attributes, ParentSpan, SpanTree

_ACTION_NAMES = {action.value: action.name.lower() for action in Action}


def layer_counts(counts: Mapping[Action, int], prefix: str = "dash.layers") -> Attributes:
    """Returns the attributes that say how many layers ran each action; those that none ran are left out."""
    return {f"{prefix}.{action.name.lower()}": count for action, count in counts.items() if count}


@dataclass(frozen=True, slots=True)
class SpanOptions:
    """The optional parts of a request's spans."""

    has_layers: bool = False
    has_content: bool = False
    """True if spans hold prompts, outputs, token ids and stop strings."""
    max_spans: int = 9_000


@dataclass(slots=True)
class _Group:
    """Steps that are traced together or not at all: a decode step, or a draft and its verification."""

    drafted: list[TraceStep] = field(default_factory=list)
    last: TraceStep | None = None
    """The decode step or the verification; None: the draft was never verified."""

    @property
    def steps(self) -> list[TraceStep]:
        return self.drafted if self.last is None else [*self.drafted, self.last]

    @property
    def is_decode(self) -> bool:
        return self.last is not None and self.last.kind is StepKind.DECODE

    @property
    def num_from_text(self) -> int:
        """Tokens of the draft that no step made."""
        return 0 if self.last is None else self.last.text_token_count or 0

    @property
    def num_accepted(self) -> int:
        """Accepted tokens that steps made."""
        return 0 if self.last is None else min(self.last.accepted_token_count or 0, len(self.drafted))

    @property
    def num_drafted_put_out(self) -> int:
        """Drafted tokens in the output: fewer than accepted if the output ended within them."""
        return 0 if self.last is None else min(self.num_accepted, len(self.last.token_ids))


def _groups(steps: Sequence[TraceStep]) -> Iterator[_Group]:
    group = _Group()
    for step in steps:
        if step.kind is StepKind.DRAFT:
            group.drafted.append(step)
            continue
        if step.kind is StepKind.DECODE and group.drafted:
            yield group
            group = _Group()
        group.last = step
        yield group
        group = _Group()
    if group.drafted:
        yield group


class TokenSpans:
    """The spans of one request's steps: as many whole tokens and drafts as fit in `max_spans`."""

    def __init__(self, decision_trace: DecisionTrace, options: SpanOptions, num_prompt_tokens: int) -> None:
        self._decision_trace = decision_trace
        self._num_prompt_tokens = num_prompt_tokens
        self._options = options
        self._score_names = [f"dash.scores.{action.name.lower()}" for action in decision_trace.score_actions]
        self._groups: list[_Group] = []
        self.num_spans = 0
        """An upper bound of the spans that `make` yields."""
        room = options.max_spans - (decision_trace.first_token_id is not None)
        for group in _groups(decision_trace.steps):
            num_spans = self._most_spans(group)
            if self.num_spans + num_spans > room:
                break
            self._groups.append(group)
            self.num_spans += num_spans
        self.num_spans += decision_trace.first_token_id is not None
        num_traced = sum(len(group.steps) for group in self._groups)
        self.num_untraced_steps = decision_trace.num_unrecorded_steps + len(decision_trace.steps) - num_traced

    def _most_spans(self, group: _Group) -> int:
        num_layers = self._decision_trace.num_layers
        num_spans = sum(
            num_layers - len(self._decision_trace.pinned_layers) for step in group.steps if step.decision_ends
        )
        if self._options.has_layers:
            num_spans += sum(num_layers for step in group.steps if step.layer_ends)
        if group.is_decode:
            return num_spans + 1
        num_spans += 1 + len(group.drafted)
        if group.last is not None:
            num_spans += 1 + len(group.last.token_ids) - group.num_drafted_put_out
        return num_spans

    def make(self, tree: SpanTree, generation: ParentSpan) -> Iterator[ReadableSpan]:
        """Yields the spans, parents first."""
        decision_trace, index = self._decision_trace, 0
        if decision_trace.first_token_id is not None and decision_trace.first_token_unix_ns is not None:
            start, end = decision_trace.granted_unix_ns, decision_trace.first_token_unix_ns
            attributes = self._token_attributes(decision_trace.first_token_id, index)
            yield tree.span("token", generation, start, end, attributes)[0]
            index += 1
        for group in self._groups:
            if group.last is not None and group.is_decode:
                yield from self._token(tree, "token", generation, group.last, index)
                index += 1
            else:
                yield from self._draft(tree, generation, group, index)
                index += 0 if group.last is None else len(group.last.token_ids)

    def _draft(self, tree: SpanTree, generation: ParentSpan, group: _Group, index: int) -> Iterator[ReadableSpan]:
        """Yields a draft, its verification and their tokens. `index` is the first token's place in the output."""
        verification = group.last
        attributes: Attributes = {
            "dash.draft.verified": verification is not None,
            "dash.draft.drafted": len(group.drafted) + group.num_from_text,
        }
        if verification is not None:
            attributes["dash.draft.from_text"] = group.num_from_text
            attributes["dash.draft.accepted"] = verification.accepted_token_count or 0
        start, end = group.steps[0].start_unix_ns, _end(group.steps[-1])
        span, draft = tree.span("draft", generation, start, end, attributes)
        yield span
        for position, step in enumerate(group.drafted):
            if position < group.num_drafted_put_out:
                yield from self._token(tree, "token", generation, step, index + position)
            elif verification is None or position < group.num_accepted:
                yield from self._token(tree, "drafted token", draft, step)
            else:
                yield from self._token(tree, "rejected token", draft, step)
        if verification is None:
            return
        start, end = verification.start_unix_ns, _end(verification)
        put_out = verification.token_ids
        attributes = {"dash.verification.tokens": len(put_out)}
        if verification.cost is not None:
            attributes["dash.cost"] = verification.cost
        yield tree.span("verification", draft, start, end, attributes)[0]
        for position in range(group.num_drafted_put_out, len(put_out)):
            attributes = self._token_attributes(put_out[position], index + position)
            yield tree.span("token", generation, start, end, attributes)[0]

    def _token(
        self, tree: SpanTree, name: str, parent: ParentSpan, step: TraceStep, index: int | None = None
    ) -> Iterator[ReadableSpan]:
        (token_id,) = step.token_ids
        attributes = self._token_attributes(token_id, index)
        attributes |= layer_counts({action: step.actions.count(action) for action in Action})
        if step.cost is not None:
            attributes["dash.cost"] = step.cost
        span, token = tree.span(name, parent, step.start_unix_ns, _end(step), attributes)
        yield span
        if step.decision_ends:
            yield from self._decisions(tree, token, step)
        if self._options.has_layers and step.layer_ends:
            yield from self._layers(tree, token, step)

    def _decisions(self, tree: SpanTree, token: ParentSpan, step: TraceStep) -> Iterator[ReadableSpan]:
        starts, ends = unpack_uint32(step.decision_starts), unpack_uint32(step.decision_ends)
        exposed, cost_spent = unpack_uint32(step.exposed), unpack_float32(step.cost_spent)
        scores, num_scores = unpack_float32(step.scores), len(self._score_names)
        for layer, end in enumerate(ends):
            if not end:
                continue
            action = step.actions[layer]
            attributes: Attributes = {"dash.layer": layer, "dash.action": _ACTION_NAMES[action]}
            if exposed:
                attributes["dash.exposed_ns"] = exposed[layer]
            if cost_spent:
                attributes["dash.cost_spent"] = cost_spent[layer]
            if self._decision_trace.price is not None:
                attributes["dash.price_of_compute"] = self._decision_trace.price
            if scores:
                self._add_scores(attributes, action, scores[layer * num_scores : (layer + 1) * num_scores])
            begin = step.start_unix_ns
            name = f"{_ACTION_NAMES[action]} layer {layer}"
            yield tree.span(name, token, begin + starts[layer], begin + end, attributes)[0]

    def _add_scores(self, attributes: Attributes, action: int, scores: array) -> None:
        attributes.update(zip(self._score_names, scores, strict=True))
        best = self._decision_trace.score_actions[max(range(len(scores)), key=scores.__getitem__)]
        # A batch may agree on a dearer action than a row of it would have taken.
        if action > best:
            attributes["dash.raised_from"] = best.name.lower()

    def _layers(self, tree: SpanTree, token: ParentSpan, step: TraceStep) -> Iterator[ReadableSpan]:
        starts, ends = unpack_uint32(step.layer_starts), unpack_uint32(step.layer_ends)
        begin = step.start_unix_ns
        for layer, action in enumerate(step.actions):
            attributes: Attributes = {"dash.layer": layer, "dash.action": _ACTION_NAMES[action]}
            yield tree.span(f"layer {layer}", token, begin + starts[layer], begin + ends[layer], attributes)[0]

    def _token_attributes(self, token_id: int, index: int | None) -> Attributes:
        attributes: Attributes = {}
        if index is not None:
            attributes |= {"dash.token.index": index, "dash.token.position": self._num_prompt_tokens + index}
        if self._options.has_content:
            attributes["dash.token.id"] = token_id
        return attributes


def _end(step: TraceStep) -> int:
    return step.start_unix_ns + step.duration_ns
