"""What each call is: its path, its request, its deadline, and how its answer is read. Shared by both clients.

Knows neither threads nor event loops, and opens no connection: a client sends a call's bytes and hands back what
comes, and only the waiting in between is its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2

from dash_api.v1 import generation_pb2, model_pb2
from dash_client import checks, requests, responses
from dash_client.channel import Target
from dash_client.connection import Connection, Metadata
from dash_client.decision_trace import RecordedDecisions
from dash_client.errors import CancelledError, DashError
from dash_client.rpc_errors import error_from_rpc
from dash_client.types import Generation, GenerationOptions, HealthStatus, Messages, ModelInfo, PolicyInfo, Prompt

FACTS_TIMEOUT_SECONDS = 10.0
"""Deadline of calls that generate nothing, where neither the client nor the call sets one."""

Answer = TypeVar("Answer")
M = TypeVar("M", bound=Message)

_GENERATION = "/dash_api.v1.GenerationService"
_MODEL = "/dash_api.v1.ModelService"


@dataclass(frozen=True, slots=True)
class Call(Generic[Answer]):
    """One call, ready to be sent."""

    path: str
    request: bytes = field(repr=False)
    timeout: float | None
    metadata: Metadata = field(repr=False)
    target: Target
    read: Callable[[bytes], Answer]
    """Turns the answer, or each message of a stream, into what the caller gets; raises ServerError."""

    def failed(self, error: grpc.RpcError, request_id: str | None = None) -> DashError:
        """The exception for a call that ended with this."""
        return error_from_rpc(error, target=self.target, timeout=self.timeout, request_id=request_id)

    def cancelled(self, request_id: str | None = None) -> DashError:
        """The exception for a call that this side ended."""
        return CancelledError("the call was cancelled", code="CANCELLED", request_id=request_id)


class Calls:
    """Makes the calls of one client. Raises InvalidArgumentError for what cannot be sent."""

    def __init__(self, connection: Connection, timeout: float | None) -> None:
        self._connection = connection
        self._timeout = checks.timeout(timeout, None)

    def generate(self, prompt: Prompt, timeout: float | None, options: GenerationOptions) -> Call[Generation]:
        return self._generate(requests.generation_parameters(prompt, **options), timeout)

    def chat(self, messages: Messages, timeout: float | None, options: GenerationOptions) -> Call[Generation]:
        return self._generate(self._chat_parameters(messages, options), timeout)

    def stream(
        self, prompt: Prompt, timeout: float | None, options: GenerationOptions
    ) -> Call[generation_pb2.StreamGenerateResponse]:
        return self._stream(requests.generation_parameters(prompt, **options), timeout)

    def chat_stream(
        self, messages: Messages, timeout: float | None, options: GenerationOptions
    ) -> Call[generation_pb2.StreamGenerateResponse]:
        return self._stream(self._chat_parameters(messages, options), timeout)

    def generate_each(self, timeout: float | None, options: GenerationOptions) -> Callable[[Prompt], Call[Generation]]:
        """For many prompts with the same options, which are checked once."""
        common = requests.option_parameters(**options)
        checks.timeout(timeout, self._timeout)

        def generate(prompt: Prompt) -> Call[Generation]:
            parameters = generation_pb2.GenerationParameters()
            parameters.CopyFrom(common)
            return self._generate(requests.with_prompt(parameters, prompt), timeout)

        return generate

    def tokenize(self, prompt: Prompt, timeout: float | None) -> Call[tuple[int, ...]]:
        request = requests.tokenize_request(prompt)
        return self._facts(f"{_MODEL}/Tokenize", request, timeout, model_pb2.TokenizeResponse, _token_ids)

    def model_info(self, timeout: float | None) -> Call[ModelInfo]:
        request = model_pb2.GetModelRequest()
        return self._facts(f"{_MODEL}/GetModel", request, timeout, model_pb2.GetModelResponse, responses.model_info)

    def policy_info(self, name: str | None, timeout: float | None) -> Call[PolicyInfo]:
        request = requests.policy_request(name)
        return self._facts(f"{_MODEL}/GetPolicy", request, timeout, model_pb2.GetPolicyResponse, responses.policy_info)

    def decisions(self, request_id: str, timeout: float | None) -> Call[RecordedDecisions]:
        # Few programs ask; the others should not wait for its import.
        from dash_client.trace.decision_trace_messages import recorded_decisions

        request = requests.decisions_request(request_id)
        kind = model_pb2.GetDecisionsResponse
        return self._facts(f"{_MODEL}/GetDecisions", request, timeout, kind, recorded_decisions)

    def health(self, timeout: float | None) -> Call[HealthStatus]:
        request = health_pb2.HealthCheckRequest()
        return self._facts("/grpc.health.v1.Health/Check", request, timeout, health_pb2.HealthCheckResponse, _status)

    def _generate(self, parameters: generation_pb2.GenerationParameters, timeout: float | None) -> Call[Generation]:
        kind = generation_pb2.GenerateResponse
        request = generation_pb2.GenerateRequest(parameters=parameters)
        seconds = checks.timeout(timeout, self._timeout)
        return self._call(
            f"{_GENERATION}/Generate", request, seconds, _reader(kind, responses.generation_from_response)
        )

    def _stream(
        self, parameters: generation_pb2.GenerationParameters, timeout: float | None
    ) -> Call[generation_pb2.StreamGenerateResponse]:
        request = generation_pb2.StreamGenerateRequest(parameters=parameters)
        seconds = checks.timeout(timeout, self._timeout)
        return self._call(f"{_GENERATION}/StreamGenerate", request, seconds, _read_event)

    def _chat_parameters(self, messages: Messages, options: GenerationOptions) -> generation_pb2.GenerationParameters:
        parameters = requests.option_parameters(**options)
        return requests.with_prompt(parameters, requests.chat_prompt(messages), argument="messages")

    def _facts(
        self, path: str, request: Message, timeout: float | None, kind: type[M], read: Callable[[M], Answer]
    ) -> Call[Answer]:
        default = FACTS_TIMEOUT_SECONDS if self._timeout is None else self._timeout
        return self._call(path, request, checks.timeout(timeout, default), _reader(kind, read))

    def _call(
        self, path: str, request: Message, timeout: float | None, read: Callable[[bytes], Answer]
    ) -> Call[Answer]:
        metadata = self._connection.metadata()
        return Call(path, request.SerializeToString(), timeout, metadata, self._connection.target, read)


def closed_error() -> DashError:
    """For a call of a client that is closed."""
    return CancelledError("this client is closed", code="CANCELLED")


def _reader(kind: type[M], read: Callable[[M], Answer]) -> Callable[[bytes], Answer]:
    return lambda data: read(responses.parse(kind, data))


def _read_event(data: bytes) -> generation_pb2.StreamGenerateResponse:
    # As `parse`, without its calls: this is done for every message.
    try:
        message: generation_pb2.StreamGenerateResponse = generation_pb2.StreamGenerateResponse.FromString(data)
    except DecodeError:
        return responses.parse(generation_pb2.StreamGenerateResponse, data)
    return message


def _token_ids(response: model_pb2.TokenizeResponse) -> tuple[int, ...]:
    return tuple(response.token_ids)


def _status(response: Any) -> HealthStatus:
    return responses.health_status(response.status)
