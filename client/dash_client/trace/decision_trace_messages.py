"""Turns recorded decisions into protobuf messages and back. Knows no files and no server."""

from collections.abc import Sequence
from typing import Any, TypeVar

from dash_api.v1 import common_pb2, model_pb2
from dash_client.decision_trace import RecordedDecision, RecordedDecisions, RecordedLayer, RecordedStep, StepKind
from dash_client.errors import ServerError
from dash_client.types import Action, Mode

_MAX_LAYERS = 1_000
"""Far more than any model has; guards against damaged files."""

_MODES = {getattr(common_pb2, f"MODE_{mode.name}"): mode for mode in Mode}
_KINDS = {getattr(model_pb2, f"STEP_KIND_{kind.name}"): kind for kind in StepKind}
_ACTIONS = {int(action): action for action in Action}

T = TypeVar("T")


def recorded_decisions(response: model_pb2.GetDecisionsResponse) -> RecordedDecisions:
    """Returns the recorded decisions in a server's answer.

    Raises:
        ServerError: this client cannot read it.
    """
    try:
        return decisions_from_message(response)
    except ValueError as error:
        raise ServerError(f"the server sent what this client cannot read: {error}", code="INTERNAL") from None


def decisions_from_message(response: model_pb2.GetDecisionsResponse) -> RecordedDecisions:
    """Returns the recorded decisions in a message from any source.

    Raises:
        ValueError: a part is missing, or does not fit the rest.
    """
    if not response.request_id:
        raise ValueError("no request id")
    count = response.layer_count
    if not 1 <= count <= _MAX_LAYERS:
        raise ValueError(f"{count} layers")
    if any(layer >= count for layer in response.pinned_layers):
        raise ValueError(f"a pinned layer that is none of the {count}")
    score_actions = tuple(_known(_ACTIONS, "action", number) for number in response.score_actions)
    return RecordedDecisions(
        request_id=response.request_id,
        model=response.model,
        policy=response.policy,
        mode=_known(_MODES, "mode", response.mode),
        compute_budget=response.compute_budget if response.HasField("compute_budget") else None,
        price_of_compute=response.price_of_compute if response.HasField("price_of_compute") else None,
        layer_count=count,
        pinned_layers=tuple(response.pinned_layers),
        score_actions=score_actions,
        steps=tuple(_step(step, count, score_actions) for step in response.steps),
        unrecorded_step_count=response.unrecorded_step_count,
    )


def _step(step: model_pb2.RecordedStep, layer_count: int, score_actions: Sequence[Action]) -> RecordedStep:
    kind = _known(_KINDS, "kind of step", step.kind)
    return RecordedStep(
        kind=kind,
        token_ids=tuple(step.token_ids),
        start_unix_ns=step.start_unix_nanos,
        duration_ns=step.duration_nanos,
        layers=() if kind is StepKind.VERIFICATION else _layers(step, layer_count, score_actions),
        accepted_token_count=step.accepted_token_count if step.HasField("accepted_token_count") else None,
        text_token_count=step.text_token_count if step.HasField("text_token_count") else None,
    )


def _layers(
    step: model_pb2.RecordedStep, layer_count: int, score_actions: Sequence[Action]
) -> tuple[RecordedLayer, ...]:
    actions, starts, ends = step.actions, step.layer_start_nanos, step.layer_end_nanos
    if not len(actions) == len(starts) == len(ends) == layer_count:
        raise ValueError(f"a step of {len(actions)} layers with {len(starts)} starts and {len(ends)} ends")
    decision_starts = _per_layer(step.decision_start_nanos, layer_count, 0)
    decision_ends = _per_layer(step.decision_end_nanos, layer_count, 0)
    exposed = _per_layer(step.exposed_nanos, layer_count, 0)
    cost_spent = _per_layer(step.cost_spent, layer_count, None)
    width = len(score_actions)
    if len(step.scores) not in (0, layer_count * width):
        raise ValueError(f"{len(step.scores)} scores of {width} actions and {layer_count} layers")
    scores = iter(step.scores)
    decisions = []
    for start, end in zip(decision_starts, decision_ends, strict=True):
        # Takes this layer's scores from the iterator, one for each action.
        by_action = dict(zip(score_actions, scores, strict=False)) or None
        # A real decision ends after the step's start, so 0 means that there is none.
        decisions.append(RecordedDecision(start, end, by_action) if end else None)
    known_actions = [_known(_ACTIONS, "action", number) for number in actions]
    return tuple(map(RecordedLayer, known_actions, starts, ends, decisions, exposed, cost_spent))


def _per_layer(values: Sequence[T], layer_count: int, missing: Any) -> Sequence[T]:
    if len(values) not in (0, layer_count):
        raise ValueError(f"{len(values)} values for {layer_count} layers")
    return values or (missing,) * layer_count


def _known(names: dict[int, T], what: str, number: int) -> T:
    if number not in names:
        raise ValueError(f"{what} {number}")
    return names[number]


def message_from_decisions(decisions: RecordedDecisions) -> model_pb2.GetDecisionsResponse:
    """Returns a message that `decisions_from_message` reads."""
    return model_pb2.GetDecisionsResponse(
        request_id=decisions.request_id,
        model=decisions.model,
        policy=decisions.policy,
        mode=getattr(common_pb2, f"MODE_{decisions.mode.name}"),
        compute_budget=decisions.compute_budget,
        price_of_compute=decisions.price_of_compute,
        layer_count=decisions.layer_count,
        pinned_layers=decisions.pinned_layers,
        score_actions=[getattr(common_pb2, f"ACTION_{action.name}") for action in decisions.score_actions],
        steps=[_step_message(step, decisions.score_actions) for step in decisions.steps],
        unrecorded_step_count=decisions.unrecorded_step_count,
    )


def _step_message(step: RecordedStep, score_actions: Sequence[Action]) -> model_pb2.RecordedStep:
    layers = step.layers
    made = [layer.decision for layer in layers]
    has_scores = any(decision is not None and decision.scores is not None for decision in made)
    return model_pb2.RecordedStep(
        kind=getattr(model_pb2, f"STEP_KIND_{step.kind.name}"),
        token_ids=step.token_ids,
        start_unix_nanos=step.start_unix_ns,
        duration_nanos=step.duration_ns,
        actions=bytes(layer.action for layer in layers),
        layer_start_nanos=[layer.start_ns for layer in layers],
        layer_end_nanos=[layer.end_ns for layer in layers],
        decision_start_nanos=[decision.start_ns if decision else 0 for decision in made],
        decision_end_nanos=[decision.end_ns if decision else 0 for decision in made],
        exposed_nanos=[layer.exposed_ns for layer in layers],
        scores=[
            decision.scores[action] if decision and decision.scores else 0.0
            for decision in made
            for action in score_actions
        ]
        if has_scores
        else [],
        cost_spent=[layer.cost_spent for layer in layers if layer.cost_spent is not None],
        accepted_token_count=step.accepted_token_count,
        text_token_count=step.text_token_count,
    )
