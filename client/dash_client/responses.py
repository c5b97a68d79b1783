"""Turns protobuf messages into the client's types. Shared by both clients."""

from collections.abc import Iterable
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from dash_api.v1 import common_pb2, generation_pb2, model_pb2
from dash_client.errors import ServerError
from dash_client.types import (
    Action,
    Decisions,
    DepthStatistics,
    FinishReason,
    Generation,
    GenerationStarted,
    HealthStatus,
    Mode,
    ModelInfo,
    PolicyInfo,
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


def generation_from_response(response: generation_pb2.GenerateResponse) -> Generation:
    """Returns the complete answer of a unary call.

    Raises:
        ServerError: this client cannot read it.
    """
    assembly = StreamAssembly()
    assembly.add_started(response.started)
    assembly.add_delta(response.output)
    return assembly.finish(response.finished)


class StreamAssembly:
    """Collects the messages of one stream, in order, into a `Generation`."""

    def __init__(self) -> None:
        self.started: GenerationStarted | None = None
        self.generation: Generation | None = None
        self._deltas: list[StreamDelta] = []

    def add(self, message: generation_pb2.StreamGenerateResponse) -> StreamDelta | None:
        """Adds the next message; returns its piece of the output, if it has one.

        Raises:
            ServerError: the message is out of order, or this client cannot read it.
        """
        event = message.WhichOneof("event")
        if event == "delta":
            return self.add_delta(message.delta)
        if event == "started":
            self.add_started(message.started)
        elif event == "finished":
            self.finish(message.finished)
        return None

    def add_started(self, started: generation_pb2.GenerationStarted) -> None:
        """Adds the facts that are known once the request has its slot."""
        mode = _MODES.get(started.mode)
        if mode is None:
            raise _unreadable(f"mode {started.mode}")
        self.started = GenerationStarted(
            request_id=started.request_id,
            prompt_token_count=started.prompt_token_count,
            seed=started.seed,
            model=started.model,
            mode=mode,
            policy=started.policy,
            policy_note=started.policy_note,
            compute_budget=started.compute_budget if started.HasField("compute_budget") else None,
            layer_count=started.layer_count,
        )

    def add_delta(self, delta: generation_pb2.GenerationDelta) -> StreamDelta:
        """Adds a piece of output."""
        if self.started is None:
            raise _unreadable("output before its start")
        # Runs for every message, so it passes arguments by position and skips what was not asked for.
        actions, logprobs = delta.actions, delta.logprobs
        piece = StreamDelta(
            delta.text,
            tuple(delta.token_ids),
            self._decisions(actions) if actions else None,
            tuple([_token_logprobs(entry) for entry in logprobs]) if logprobs else None,
        )
        self._deltas.append(piece)
        return piece

    def finish(self, finished: generation_pb2.GenerationFinished) -> Generation:
        """Adds the last message, and assembles the answer."""
        if self.started is None:
            raise _unreadable("an end before its start")
        actions = b"".join(delta.decisions.data for delta in self._deltas if delta.decisions is not None)
        logprobs = tuple(entry for delta in self._deltas for entry in delta.logprobs or ())
        self.generation = Generation(
            text="".join(delta.text for delta in self._deltas),
            token_ids=tuple(token_id for delta in self._deltas for token_id in delta.token_ids),
            finish_reason=_REASONS.get(finished.reason, FinishReason.UNKNOWN),
            stop_string=finished.stop_string if finished.HasField("stop_string") else None,
            usage=_usage(finished.usage),
            depth=_depth(finished.depth),
            decisions=Decisions(actions, self.started.layer_count) if actions else None,
            logprobs=logprobs or None,
            started=self.started,
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
    return ModelInfo(
        name=response.name,
        architecture=response.architecture,
        layer_count=response.layer_count,
        vocabulary_size=response.vocabulary_size,
        context_length=response.context_length,
        max_new_tokens_limit=response.max_new_tokens_limit,
        default_max_new_tokens=response.default_max_new_tokens,
        cache_tokens=response.cache_tokens,
        slot_count=response.slot_count,
        actions=tuple(_ACTIONS[number] for number in response.actions if number in _ACTIONS),
        modes=tuple(_MODES[number] for number in response.modes if number in _MODES),
        default_mode=default_mode,
        policy_names=tuple(response.policy_names),
        default_policy_name=response.default_policy_name,
        default_draft_policy_name=response.default_draft_policy_name,
        device=response.device,
    )


def policy_info(response: model_pb2.GetPolicyResponse) -> PolicyInfo:
    """Returns the facts of a policy."""
    return PolicyInfo(
        name=response.name,
        note=response.note,
        learned=response.learned,
        lookahead=response.lookahead,
        pinned_layers=tuple(response.pinned_layers),
        action_costs=_by_action((entry.action, entry.cost) for entry in response.action_costs),
        lowest_budget=response.lowest_budget,
        recommended_budget=response.recommended_budget,
        compensation=response.compensation,
        is_drafter=response.is_drafter,
    )


def health_status(number: int) -> HealthStatus:
    """Converts a status of the standard health protocol (grpc.health.v1)."""
    return {1: HealthStatus.SERVING, 2: HealthStatus.NOT_SERVING}.get(number, HealthStatus.UNKNOWN)


def _token_logprobs(entry: generation_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(entry.chosen, tuple((top.token_id, top.logprob) for top in entry.top))


def _usage(usage: generation_pb2.Usage) -> Usage:
    return Usage(
        prompt_token_count=usage.prompt_token_count,
        output_token_count=usage.output_token_count,
        queue_seconds=usage.queue_seconds,
        prefill_seconds=usage.prefill_seconds,
        decode_seconds=usage.decode_seconds,
        speculation=_speculation(usage.speculation) if usage.HasField("speculation") else None,
        cached_prompt_token_count=usage.cached_prompt_token_count,
    )


def _speculation(speculation: generation_pb2.SpeculationUsage) -> SpeculationUsage:
    return SpeculationUsage(
        drafted_token_count=speculation.drafted_token_count,
        accepted_token_count=speculation.accepted_token_count,
        wasted_token_count=speculation.wasted_token_count,
        verification_count=speculation.verification_count,
        draft_seconds=speculation.draft_seconds,
        verification_seconds=speculation.verification_seconds,
    )


def _depth(depth: generation_pb2.DepthStatistics) -> DepthStatistics:
    return DepthStatistics(
        decode_token_count=depth.decode_token_count,
        action_counts=_by_action((entry.action, entry.count) for entry in depth.action_counts),
        mean_cost=depth.mean_cost if depth.decode_token_count else None,
        exposed_policy_seconds=depth.exposed_policy_seconds,
    )


def _by_action(entries: Iterable[tuple[int, Any]]) -> dict[Action, Any]:
    return {_ACTIONS[number]: value for number, value in sorted(entries) if number in _ACTIONS}


def _unreadable(what: str) -> ServerError:
    return ServerError(
        f"the server sent what this client cannot read: {what} (is it of another version? `pip install -U dash-llm`)",
        code="INTERNAL",
    )
