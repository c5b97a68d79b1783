"""The gRPC servicers: thin handlers that turn request bytes into a generation, and exceptions into statuses.

Knows neither the host process nor the worker's place, and no tensors.
"""

import asyncio
import functools
import logging
import re
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from dash_api.v1 import generation_pb2, model_pb2
from dash_runtime.errors import InvalidRequest
from dash_server import wire
from dash_server.admission import Admission
from dash_server.auth import Authenticator, Caller
from dash_server.dispatcher import Dispatcher
from dash_server.from_pb import PreparedRequest, prepare_request, prepare_score
from dash_server.generation import Generation, collect
from dash_server.logs import request_id_of_task, trace_id_of_task
from dash_server.recent_decisions import RecentDecisions
from dash_server.request_record import Observer, RequestRecord, observed, record_of_call
from dash_server.served_model import ServedModel
from dash_server.settings import Settings
from dash_server.statuses import WorkerUnavailable, below, failure_of
from dash_server.to_pb import decisions_to_pb, load_to_pb, model_to_pb, policy_to_pb, score_to_pb

logger = logging.getLogger(__name__)

_GENERATION = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]
_MODEL = model_pb2.DESCRIPTOR.services_by_name["ModelService"]
GENERATION_SERVICE = _GENERATION.full_name
MODEL_SERVICE = _MODEL.full_name

# Reading a longer request takes milliseconds, too long for the event loop; a shorter one costs less than a thread.
_MAX_INLINE_BYTES = 4096
_NUM_READER_THREADS = 2

T = TypeVar("T")
M = TypeVar("M", bound=Message)


class ServiceState:
    """State that both servicers share. `model` is None until the first worker is ready."""

    def __init__(
        self, settings: Settings, admission: Admission, dispatcher: Dispatcher, authenticator: Authenticator
    ) -> None:
        self.settings = settings
        self.admission = admission
        self.dispatcher = dispatcher
        self.authenticator = authenticator
        self.recent_decisions = RecentDecisions(settings.recent_requests)
        self.start_observers: list[Observer] = []
        """Called with each generation call that begins."""
        self.observers: list[Observer] = []
        """Called with each generation call that is over."""
        self.model: ServedModel | None = None
        self._readers = ThreadPoolExecutor(_NUM_READER_THREADS, thread_name_prefix="request-reader")

    def caller(self, context: grpc.aio.ServicerContext) -> Caller:
        """Returns the caller; raises Unauthenticated."""
        names = (context.auth_context() or {}).get("x509_common_name", ())
        return self.authenticator.identify(context.invocation_metadata() or (), context.peer(), names)

    def require_model(self) -> ServedModel:
        if self.model is None:
            raise WorkerUnavailable("the model is still being loaded; try again later")
        return self.model

    async def read(self, data: bytes, function: Callable[[], T]) -> T:
        """Runs `function`, which reads the request `data`: a long one in a thread, off the event loop."""
        if len(data) <= _MAX_INLINE_BYTES:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._readers, function)

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)


class GenerationServicer:
    """dash_api.v1.GenerationService. Its handlers take the request's bytes."""

    def __init__(self, state: ServiceState) -> None:
        self._state = state

    async def generate(self, data: bytes, context: grpc.aio.ServicerContext) -> generation_pb2.GenerateResponse:
        async with self._generation(generation_pb2.GenerateRequest, data, context) as generation:
            return await collect(generation)

    async def stream_generate(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        response = generation_pb2.StreamGenerateResponse
        async with self._generation(generation_pb2.StreamGenerateRequest, data, context) as generation:
            await context.write(response(started=await generation.start()))
            while (delta := await generation.next_delta()) is not None:
                await context.write(response(delta=delta))
            await context.write(response(finished=generation.finish()))

    async def score(self, data: bytes, context: grpc.aio.ServicerContext) -> generation_pb2.ScoreResponse:
        async with self._generation(generation_pb2.ScoreRequest, data, context) as generation:
            return score_to_pb(await collect(generation), generation.num_top_logprobs)

    @asynccontextmanager
    async def _generation(
        self, message_class: type[M], data: bytes, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Generation]:
        state = self._state
        method = f"{GENERATION_SERVICE}/{message_class.__name__.removesuffix('Request')}"
        async with _errors_to_status(context) as request_id:
            record = record_of_call(request_id, method, context)
            for observer in state.start_observers:
                observer(record)
            if record.trace_id:
                trace_id_of_task.set(record.trace_id)
            with observed(record, context, state.observers):
                record.caller = caller = state.caller(context)
                model = state.require_model()
                record.model = model.facts.name
                with state.admission.admit(caller) as place:
                    prepared = await state.read(
                        data, functools.partial(self._prepare, message_class, data, record, model, caller)
                    )
                    record.prepared = prepared
                    state.admission.claim(place, prepared.request.num_cache_tokens)
                    seconds_left = context.time_remaining()
                    generation = Generation(state.dispatcher, model, prepared, place, seconds_left, record)
                    # gRPC may never resume a cancelled handler: free its slot all the same.
                    context.add_done_callback(lambda _: generation.close())
                    try:
                        with below("parameters"):
                            yield generation
                    finally:
                        generation.close()

    def _prepare(
        self, message_class: type[M], data: bytes, record: RequestRecord, model: ServedModel, caller: Caller
    ) -> PreparedRequest:
        message = wire.parse(message_class, data)
        parameters: generation_pb2.GenerationParameters = message.parameters
        record.is_chat = parameters.WhichOneof("prompt") == "chat"
        record.wants_trace = parameters.output.trace
        common: dict[str, Any] = {
            "request_id": record.request_id,
            "model": model,
            "settings": self._state.settings,
            "cache_namespace": caller.cache_namespace,
        }
        if isinstance(message, generation_pb2.ScoreRequest):
            prepared = prepare_score(message, **common)
        else:
            with below("parameters"):
                prepared = prepare_request(parameters, **common)
        if record.trace_id and self._state.settings.trace_content:
            record.prompt, record.output = model.prompt_messages(parameters), ""
        return prepared


class ModelServicer:
    """dash_api.v1.ModelService. Its handlers take the request's bytes."""

    def __init__(self, state: ServiceState) -> None:
        self._state = state
        self._tokenize_calls = Admission(state.settings.max_tokenize_calls)

    async def get_model(self, data: bytes, context: grpc.aio.ServicerContext) -> model_pb2.GetModelResponse:
        async with _errors_to_status(context):
            self._state.caller(context)
            wire.parse(model_pb2.GetModelRequest, data)
            return model_to_pb(self._state.require_model().facts, self._state.settings)

    async def get_policy(self, data: bytes, context: grpc.aio.ServicerContext) -> model_pb2.GetPolicyResponse:
        async with _errors_to_status(context):
            self._state.caller(context)
            request = wire.parse(model_pb2.GetPolicyRequest, data)
            facts = self._state.require_model().facts
            try:
                policy = facts.policy(request.name if request.HasField("name") else None)
            except InvalidRequest as error:
                raise InvalidRequest("name", error.description) from None
            return policy_to_pb(policy)

    async def tokenize(self, data: bytes, context: grpc.aio.ServicerContext) -> model_pb2.TokenizeResponse:
        async with _errors_to_status(context):
            caller = self._state.caller(context)
            model = self._state.require_model()
            with self._tokenize_calls.admit(caller):
                return await self._state.read(data, functools.partial(self._tokenize, data, model))

    async def get_load(self, data: bytes, context: grpc.aio.ServicerContext) -> model_pb2.GetLoadResponse:
        async with _errors_to_status(context):
            self._state.caller(context)
            wire.parse(model_pb2.GetLoadRequest, data)
            state = self._state
            return load_to_pb(state.dispatcher.load(), state.admission, state.settings)

    async def get_decisions(self, data: bytes, context: grpc.aio.ServicerContext) -> model_pb2.GetDecisionsResponse:
        async with _errors_to_status(context):
            caller = self._state.caller(context)
            request = wire.parse(model_pb2.GetDecisionsRequest, data)
            if not request.request_id:
                raise InvalidRequest("request_id", "is required")
            return decisions_to_pb(self._state.recent_decisions.get(request.request_id, caller.name))

    def _tokenize(self, data: bytes, model: ServedModel) -> model_pb2.TokenizeResponse:
        response = model_pb2.TokenizeResponse(token_ids=model.tokenize(wire.parse(model_pb2.TokenizeRequest, data)))
        limit = self._state.settings.max_message_bytes
        if response.ByteSize() > limit:
            raise InvalidRequest("prompt", f"has more tokens than fit in a message of {limit} bytes")
        return response


def add_to_server(state: ServiceState, server: grpc.aio.Server) -> None:
    """Registers both services on `server`."""
    for service, servicer in ((_GENERATION, GenerationServicer(state)), (_MODEL, ModelServicer(state))):
        handlers = rpc_handlers(service, servicer)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def rpc_handlers(service: ServiceDescriptor, servicer: object) -> dict[str, grpc.RpcMethodHandler]:
    """Returns the handler of each method of `service`, without deserialisers: see `wire`.

    Raises:
        TypeError: `servicer` lacks a method of the service, or has a public one that is none of the service's.
    """
    methods = {_snake_case(method.name): method for method in service.methods}
    public = {name for name in dir(servicer) if not name.startswith("_")}
    for problem, names in (("lacks", methods.keys() - public), ("has no use for", public - methods.keys())):
        if names:
            raise TypeError(f"{service.full_name} {problem} {type(servicer).__name__}.{min(names)}")
    return {method.name: _rpc_handler(method, getattr(servicer, name)) for name, method in methods.items()}


def _rpc_handler(method: MethodDescriptor, handler: Callable) -> grpc.RpcMethodHandler:
    assert not method.client_streaming
    is_stream = method.server_streaming
    make = grpc.unary_stream_rpc_method_handler if is_stream else grpc.unary_unary_rpc_method_handler
    return make(handler, response_serializer=lambda response: response.SerializeToString())


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


@asynccontextmanager
async def _errors_to_status(context: grpc.aio.ServicerContext) -> AsyncIterator[str]:
    """Gives the call its request id and turns exceptions into the call's status."""
    request_id = uuid.uuid4().hex
    request_id_of_task.set(request_id)
    try:
        yield request_id
    except grpc.aio.BaseError:
        raise  # the call itself is over
    except Exception as error:
        failure = failure_of(error, request_id)
        if failure.is_internal:
            logger.exception("unexpected error")
        else:
            logger.info("refused: %s %s", failure.code.name, type(error).__name__)
        await context.abort(failure.code, failure.message, failure.trailing_metadata)
