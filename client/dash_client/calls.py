"""Describes each call: its path, its request, its deadline, and how to read its answer. Shared by both clients.

Opens no connection, and knows neither threads nor event loops: a client sends a call's bytes, waits in its own way,
and hands the answer's bytes back.
"""

import functools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2

from dash_api.v1 import generation_pb2, model_pb2
from dash_client import checks, requests, responses
from dash_client.channel import Target
from dash_client.connection import TRACE_KEYS, Connection, Metadata
from dash_client.constraint import Constraint
from dash_client.decision_trace import RecordedDecisions
from dash_client.errors import CancelledError, DashError
from dash_client.options import GenerationOptions, Messages, Prompt
from dash_client.rpc_errors import error_from_rpc
from dash_client.score import Score, ScoreOptions
from dash_client.server_facts import Audit, ModelInfo, PolicyInfo, ServerLoad
from dash_client.tools import AnyTool
from dash_client.types import Generation, HealthStatus

FACTS_TIMEOUT_SECONDS = 10.0
"""Deadline of calls that generate nothing, if neither the client nor the call sets one."""

Answer = TypeVar("Answer")
M = TypeVar("M", bound=Message)

Requests = Iterator[bytes] | AsyncIterator[bytes]
"""The requests of a session."""

_GENERATION = "/dash_api.v1.GenerationService"
_MODEL = "/dash_api.v1.ModelService"


@dataclass(frozen=True, slots=True)
class Call(Generic[Answer]):
    """One call, ready to send."""

    path: str
    request: bytes | Requests = field(repr=False)
    timeout: float | None
    metadata: Metadata = field(repr=False)
    target: Target
    read: Callable[[bytes], Answer]
    """Turns the answer's bytes, or those of each message of a stream, into the result; raises ServerError."""
    constraint: Constraint | None = field(default=None, repr=False)
    """The rule that a stream's answer keeps."""
    num_answers: int = 1
    """The number of answers that a stream has."""

    def failed(self, error: grpc.RpcError, request_id: str | None = None) -> DashError:
        """Returns the exception for a call that failed with gRPC's `error`."""
        return error_from_rpc(error, target=self.target, timeout=self.timeout, request_id=request_id)

    def cancelled(self, request_id: str | None = None) -> DashError:
        """Returns the exception for a call that the client cancelled."""
        return CancelledError("the call was cancelled", code="CANCELLED", request_id=request_id)


StreamCall = Call[generation_pb2.StreamGenerateResponse]


class Calls:
    """Makes the calls of one client. Raises InvalidArgumentError for arguments that cannot be sent."""

    def __init__(self, connection: Connection, timeout: float | None) -> None:
        self._connection = connection
        self._timeout = checks.timeout(timeout, None)

    def generate(self, prompt: Prompt, timeout: float | None, options: GenerationOptions) -> Call[Generation]:
        return self._generate(requests.generation_parameters(prompt, **options), timeout, options.get("constraint"))

    def chat(self, messages: Messages, timeout: float | None, options: GenerationOptions) -> Call[Generation]:
        return self._generate(requests.chat_parameters(messages, **options), timeout, options.get("constraint"))

    def stream(self, prompt: Prompt, timeout: float | None, options: GenerationOptions) -> StreamCall:
        return self._stream(requests.generation_parameters(prompt, **options), timeout, options.get("constraint"))

    def chat_stream(self, messages: Messages, timeout: float | None, options: GenerationOptions) -> StreamCall:
        return self._stream(requests.chat_parameters(messages, **options), timeout, options.get("constraint"))

    def session(self, requests: Requests) -> Call[bytes]:
        """Returns the call of a session. Each of its requests says itself of which trace it is part."""
        metadata = tuple(pair for pair in self._connection.metadata() if pair[0] not in TRACE_KEYS)
        return Call(f"{_GENERATION}/Session", requests, None, metadata, self._connection.target, bytes)

    def generate_each(self, timeout: float | None, options: GenerationOptions) -> Callable[[Prompt], Call[Generation]]:
        """Returns a function that makes the call for a prompt. Checks the options, which all prompts share, once."""
        common = requests.option_parameters(**options)
        checks.timeout(timeout, self._timeout)

        def generate(prompt: Prompt) -> Call[Generation]:
            parameters = generation_pb2.GenerationParameters()
            parameters.CopyFrom(common)
            return self._generate(requests.with_prompt(parameters, prompt), timeout, options.get("constraint"))

        return generate

    def score(
        self, prompt: Prompt, continuation: str | Sequence[int] | None, timeout: float | None, options: ScoreOptions
    ) -> Call[Score]:
        request = requests.score_request(prompt, continuation, **options)
        read = _reader(generation_pb2.ScoreResponse, responses.score)
        return self._call(f"{_GENERATION}/Score", request, checks.timeout(timeout, self._timeout), read)

    def tokenize(self, prompt: Prompt, tools: Sequence[AnyTool] | None, timeout: float | None) -> Call[tuple[int, ...]]:
        request = requests.tokenize_request(prompt, tools)
        return self._facts(f"{_MODEL}/Tokenize", request, timeout, model_pb2.TokenizeResponse, responses.token_ids)

    def model_info(self, timeout: float | None) -> Call[ModelInfo]:
        request = model_pb2.GetModelRequest()
        return self._facts(f"{_MODEL}/GetModel", request, timeout, model_pb2.GetModelResponse, responses.model_info)

    def policy_info(self, name: str | None, timeout: float | None) -> Call[PolicyInfo]:
        request = model_pb2.GetPolicyRequest(name=None if name is None else checks.text("name", name))
        return self._facts(f"{_MODEL}/GetPolicy", request, timeout, model_pb2.GetPolicyResponse, responses.policy_info)

    def load(self, timeout: float | None) -> Call[ServerLoad]:
        request = model_pb2.GetLoadRequest()
        return self._facts(f"{_MODEL}/GetLoad", request, timeout, model_pb2.GetLoadResponse, responses.server_load)

    def audit(self, request_id: str, timeout: float | None) -> Call[Audit]:
        request = model_pb2.GetAuditRequest(request_id=checks.text("request_id", request_id))
        # Like a generation, it lasts until the server has computed it.
        seconds = checks.timeout(timeout, self._timeout)
        return self._call(f"{_MODEL}/GetAudit", request, seconds, _reader(model_pb2.GetAuditResponse, responses.audit))

    def decisions(self, request_id: str, timeout: float | None) -> Call[RecordedDecisions]:
        # Imported here, since few programs need it and the import takes time.
        from dash_client.trace.decision_trace_messages import recorded_decisions

        request = model_pb2.GetDecisionsRequest(request_id=checks.text("request_id", request_id))
        kind = model_pb2.GetDecisionsResponse
        return self._facts(f"{_MODEL}/GetDecisions", request, timeout, kind, recorded_decisions)

    def health(self, timeout: float | None) -> Call[HealthStatus]:
        request, kind = health_pb2.HealthCheckRequest(), health_pb2.HealthCheckResponse
        return self._facts("/grpc.health.v1.Health/Check", request, timeout, kind, responses.health_status)

    def _generate(
        self, parameters: generation_pb2.GenerationParameters, timeout: float | None, constraint: Constraint | None
    ) -> Call[Generation]:
        request = generation_pb2.GenerateRequest(parameters=parameters)
        answer = functools.partial(responses.generation_from_response, constraint=constraint)
        read = _reader(generation_pb2.GenerateResponse, answer)
        return self._call(f"{_GENERATION}/Generate", request, checks.timeout(timeout, self._timeout), read)

    def _stream(
        self, parameters: generation_pb2.GenerationParameters, timeout: float | None, constraint: Constraint | None
    ) -> StreamCall:
        request = generation_pb2.StreamGenerateRequest(parameters=parameters)
        deadline = checks.timeout(timeout, self._timeout)
        num_answers = max(1, parameters.n)
        return self._call(f"{_GENERATION}/StreamGenerate", request, deadline, _read_event, constraint, num_answers)

    def _facts(
        self, path: str, request: Message, timeout: float | None, kind: type[M], read: Callable[[M], Answer]
    ) -> Call[Answer]:
        default = FACTS_TIMEOUT_SECONDS if self._timeout is None else self._timeout
        return self._call(path, request, checks.timeout(timeout, default), _reader(kind, read))

    def _call(
        self,
        path: str,
        request: Message,
        timeout: float | None,
        read: Callable[[bytes], Answer],
        constraint: Constraint | None = None,
        num_answers: int = 1,
    ) -> Call[Answer]:
        metadata, target = self._connection.metadata(), self._connection.target
        return Call(path, request.SerializeToString(), timeout, metadata, target, read, constraint, num_answers)


def closed_error(what: str = "client") -> DashError:
    """Returns the error for a call on a closed client, or on a closed `what`."""
    return CancelledError(f"this {what} is closed", code="CANCELLED")


def _reader(kind: type[M], read: Callable[[M], Answer]) -> Callable[[bytes], Answer]:
    return lambda data: read(responses.parse(kind, data))


def _read_event(data: bytes) -> generation_pb2.StreamGenerateResponse:
    # Does the same as `parse` with fewer function calls, since it runs for every message.
    try:
        message: generation_pb2.StreamGenerateResponse = generation_pb2.StreamGenerateResponse.FromString(data)
    except DecodeError:
        return responses.parse(generation_pb2.StreamGenerateResponse, data)
    return message
