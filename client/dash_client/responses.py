"""Turns protobuf messages into the client's types. Shared by both clients."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2

from dash_api.v1 import common_pb2, generation_pb2, model_pb2
from dash_client.constraint import Constraint
from dash_client.errors import ServerError
from dash_client.score import Score
from dash_client.server_facts import Audit, ModelInfo, PolicyInfo, ServerLoad
from dash_client.tool_messages import tool_call
from dash_client.tools import ToolCall
from dash_client.types import (
    Action,
    Decisions,
    DepthStatistics,
    FinishReason,
    Generation,
    GenerationStarted,
    HealthStatus,
    Mode,
    SpeculationUsage,
    StreamDelta,
    TokenLogprobs,
    Usage,
)

_MODES = {getattr(common_pb2, f"MODE_{mode.name}"): mode for mode in Mode}
_REASONS = {
    getattr(generation_pb2, f"FINISH_REASON_{reason.name}"): reason
    for reason in FinishReason
    if reason is not FinishReason.UNKNOWN
}
_ACTIONS = {int(action): action for action in Action}
_ACTION_BYTES = bytes(_ACTIONS)

M = TypeVar("M", bound=Message)
T = TypeVar("T")


def parse(kind: type[M], data: bytes) -> M:
    """Parses a message of this kind.

    Raises:
        ServerError: the bytes are not such a message.
    """
    try:
        message: M = kind.FromString(data)
    except DecodeError:
        raise _unreadable(f"no {kind.DESCRIPTOR.name}") from None
    return message


def from_message(kind: type[T], message: Message, **others: Any) -> T:
    """Makes a dataclass from the message's fields of the same names; None for an optional one that is not set.

    Args:
        kind: the dataclass.
        message: holds all of its fields except `others`.
        others: the fields whose values are not the message's own.
    """
    for name in kind.__annotations__.keys() - others.keys():
        is_missing = message.DESCRIPTOR.fields_by_name[name].has_presence and not message.HasField(name)
        others[name] = None if is_missing else getattr(message, name)
    return kind(**others)


def generation_from_response(
    response: generation_pb2.GenerateResponse | generation_pb2.ScoreResponse, constraint: Constraint | None = None
) -> Generation:
    """Returns the complete answer of a unary call.

    Raises:
        ServerError: this client cannot read it.
    """
    answer = _Answer(constraint, 0)
    answer.add_started(response.started)
    answer.add_delta(response.output)
    generation = answer.finish(response.finished)
    if isinstance(response, generation_pb2.ScoreResponse) or not response.others:
        return generation
    return replace(generation, others=tuple(generation_from_response(other, constraint) for other in response.others))


def score(response: generation_pb2.ScoreResponse) -> Score:
    """Returns the score of a given output.

    Raises:
        ServerError: this client cannot read it.
    """
    output = generation_from_response(response)
    return Score(
        response.log_probability,
        response.is_greedy,
        output.text,
        output.token_ids,
        output.logprobs or (),
        output.usage,
        output.depth,
        output.decisions,
        output.started,
    )


class StreamAssembly:
    """Collects the messages of one stream, in order, into a `Generation`."""

    def __init__(self, constraint: Constraint | None = None, num_answers: int = 1) -> None:
        """`num_answers` is the number that was asked for."""
        self._constraint = constraint
        self._num_answers = num_answers
        self._answers = {0: _Answer(constraint, 0)}

    @property
    def started(self) -> GenerationStarted | None:
        """The facts of the first answer; None before its start."""
        return self._answers[0].started

    @property
    def generation(self) -> Generation | None:
        """The answer, with the others if there are any; None until all of those that have begun are complete."""
        complete = [self._answers[index].generation for index in sorted(self._answers)]
        first, *others = complete
        if first is None or None in others:
            return None
        return replace(first, others=tuple(other for other in others if other)) if others else first

    @property
    def is_whole(self) -> bool:
        """True if all answers that were asked for are complete."""
        return len(self._answers) >= self._num_answers and self.generation is not None

    def add(self, message: generation_pb2.StreamGenerateResponse) -> StreamDelta | None:
        """Adds the next message; returns its piece of the output, if it has one.

        Raises:
            ServerError: the message is out of order, or this client cannot read it.
        """
        event, index = message.WhichOneof("event"), message.answer_index
        answer = self._answers.get(index)
        if answer is None:
            answer = self._answers[index] = _Answer(self._constraint, index)
        if event == "delta":
            return answer.add_delta(message.delta)
        if event == "started":
            answer.add_started(message.started)
        elif event == "finished":
            answer.finish(message.finished)
        return None


class _Answer:
    """Collects one answer."""

    def __init__(self, constraint: Constraint | None, index: int) -> None:
        self._constraint = constraint
        self._index = index
        self.started: GenerationStarted | None = None
        self.generation: Generation | None = None
        self._deltas: list[StreamDelta] = []

    def add_started(self, started: generation_pb2.GenerationStarted) -> None:
        """Adds the facts that are known once the request has its slot."""
        mode = _MODES.get(started.mode)
        if mode is None:
            raise _unreadable(f"mode {started.mode}")
        action = _ACTIONS.get(started.prefill_action)
        self.started = from_message(GenerationStarted, started, mode=mode, prefill_action=action)

    def add_delta(self, delta: generation_pb2.GenerationDelta) -> StreamDelta:
        """Adds a piece of output."""
        if self.started is None:
            raise _unreadable("output before its start")
        # Runs for every message, so it passes arguments by position and skips what was not asked for.
        actions, logprobs, calls = delta.actions, delta.logprobs, delta.tool_calls
        piece = StreamDelta(
            delta.text,
            tuple(delta.token_ids),
            self._decisions(actions) if actions else None,
            tuple([_token_logprobs(entry) for entry in logprobs]) if logprobs else None,
            tuple(map(_tool_call, calls)) if calls else (),
            self._index,
        )
        self._deltas.append(piece)
        return piece

    def finish(self, finished: generation_pb2.GenerationFinished) -> Generation:
        """Adds the last message, and assembles the answer."""
        if self.started is None:
            raise _unreadable("an end before its start")
        actions = b"".join(delta.decisions.data for delta in self._deltas if delta.decisions is not None)
        logprobs = tuple(entry for delta in self._deltas for entry in delta.logprobs or ())
        usage, depth = finished.usage, finished.depth
        speculation = None
        if usage.HasField("speculation"):
            lengths = tuple(usage.speculation.accepted_length_counts)
            speculation = from_message(SpeculationUsage, usage.speculation, accepted_length_counts=lengths)
        self.generation = Generation(
            text="".join(delta.text for delta in self._deltas),
            token_ids=tuple(token_id for delta in self._deltas for token_id in delta.token_ids),
            finish_reason=_REASONS.get(finished.reason, FinishReason.UNKNOWN),
            stop_string=finished.stop_string if finished.HasField("stop_string") else None,
            usage=from_message(Usage, usage, speculation=speculation),
            depth=from_message(
                DepthStatistics,
                depth,
                action_counts=_by_action((entry.action, entry.count) for entry in depth.action_counts),
                speculative_action_counts=_by_action(
                    (entry.action, entry.count) for entry in depth.speculative_action_counts
                ),
                mean_cost=depth.mean_cost if depth.decode_token_count else None,
            ),
            decisions=Decisions(actions, self.started.layer_count) if actions else None,
            logprobs=logprobs or None,
            started=self.started,
            constraint=self._constraint,
            tool_calls=tuple(call for delta in self._deltas for call in delta.tool_calls),
        )
        return self.generation

    def _decisions(self, actions: bytes) -> Decisions:
        assert self.started is not None
        if actions.translate(None, _ACTION_BYTES):
            raise _unreadable("an action")
        try:
            return Decisions(actions, self.started.layer_count)
        except ValueError as error:
            raise _unreadable(str(error)) from None


def model_info(response: model_pb2.GetModelResponse) -> ModelInfo:
    """Returns the facts of a model.

    Raises:
        ServerError: this client does not know the default mode.
    """
    default_mode = _MODES.get(response.default_mode)
    if default_mode is None:
        raise _unreadable(f"mode {response.default_mode}")
    return from_message(
        ModelInfo,
        response,
        actions=tuple(_ACTIONS[number] for number in response.actions if number in _ACTIONS),
        modes=tuple(_MODES[number] for number in response.modes if number in _MODES),
        default_mode=default_mode,
        policy_names=tuple(response.policy_names),
    )


def policy_info(response: model_pb2.GetPolicyResponse) -> PolicyInfo:
    """Returns the facts of a policy."""
    costs = _by_action((entry.action, entry.cost) for entry in response.action_costs)
    return from_message(PolicyInfo, response, pinned_layers=tuple(response.pinned_layers), action_costs=costs)


def audit(response: model_pb2.GetAuditResponse) -> Audit:
    """Returns the comparison of an answer with full depth."""
    return from_message(Audit, response)


def server_load(response: model_pb2.GetLoadResponse) -> ServerLoad:
    """Returns the load."""
    return from_message(ServerLoad, response)


def token_ids(response: model_pb2.TokenizeResponse) -> tuple[int, ...]:
    """Returns the token ids of a prompt."""
    return tuple(response.token_ids)


def health_status(response: health_pb2.HealthCheckResponse) -> HealthStatus:
    """Converts a status of the standard health protocol (grpc.health.v1)."""
    return {1: HealthStatus.SERVING, 2: HealthStatus.NOT_SERVING}.get(response.status, HealthStatus.UNKNOWN)


def _token_logprobs(entry: generation_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(entry.chosen, tuple((top.token_id, top.logprob) for top in entry.top))


def _tool_call(message: common_pb2.ToolCall) -> ToolCall:
    try:
        return tool_call(message)
    except ValueError:
        raise _unreadable("the arguments of a call") from None


def _by_action(entries: Iterable[tuple[int, Any]]) -> dict[Action, Any]:
    own = dict(entries)
    return {action: own[number] for number, action in _ACTIONS.items() if number in own}


def _unreadable(what: str) -> ServerError:
    return ServerError(
        f"the server sent what this client cannot read: {what} (is it of another version? `pip install -U dash-llm`)",
        code="INTERNAL",
    )
