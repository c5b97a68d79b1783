"""The gRPC servicers: thin handlers that turn request bytes into a generation, and exceptions into statuses.

Knows neither the host process nor the worker's place, and no tensors.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from dash_api.v1 import generation_pb2, model_pb2
from dash_runtime.errors import InvalidRequest
from dash_server import wire
from dash_server.admission import Admission
from dash_server.generation import Generation, collect
from dash_server.handlers import rpc_handlers
from dash_server.reading import Request, has_grammar, prepare
from dash_server.served_model import ServedModel
from dash_server.service_state import ServiceState, errors_to_status, open_generations, together, work_of
from dash_server.session import Session
from dash_server.statuses import below
from dash_server.to_pb import (
    audit_to_pb,
    decisions_to_pb,
    load_to_pb,
    model_to_pb,
    policy_to_pb,
    score_to_pb,
    write_event,
)

_GENERATION = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]
_MODEL = model_pb2.DESCRIPTOR.services_by_name["ModelService"]
GENERATION_SERVICE = _GENERATION.full_name
MODEL_SERVICE = _MODEL.full_name


class GenerationServicer:
    """dash_api.v1.GenerationService. Its handlers receive the request's bytes."""

    def __init__(self, state: ServiceState) -> None:
        self._state = state

    async def generate(self, context: grpc.aio.ServicerContext) -> generation_pb2.GenerateResponse:
        async with self._generations(generation_pb2.GenerateRequest, context) as generations:
            first, *others = await together([collect(generation) for generation in generations])
            first.others.extend(others)
            return first

    async def stream_generate(self, context: grpc.aio.ServicerContext) -> None:
        async with self._generations(generation_pb2.StreamGenerateRequest, context) as generations:
            writing = asyncio.Lock()
            await together(
                [_stream(generation, index, context, writing) for index, generation in enumerate(generations)]
            )

    async def session(self, context: grpc.aio.ServicerContext) -> None:
        async with errors_to_status(context):
            await Session(self._state, context, f"{GENERATION_SERVICE}/Session").run()

    async def score(self, context: grpc.aio.ServicerContext) -> generation_pb2.ScoreResponse:
        async with self._generations(generation_pb2.ScoreRequest, context) as (generation,):
            return score_to_pb(await collect(generation), generation.num_top_logprobs)

    @asynccontextmanager
    async def _generations(
        self, message_class: type[Request], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[list[Generation]]:
        method, state = f"{GENERATION_SERVICE}/{message_class.__name__.removesuffix('Request')}", self._state
        source = state.received(context, message_class, prepare, has_grammar)
        async with (
            errors_to_status(context) as request_id,
            open_generations(state, context, request_id, method, source) as generations,
        ):
            with below("parameters"):
                yield generations


async def _stream(generation: Generation, index: int, context: grpc.aio.ServicerContext, writing: asyncio.Lock) -> None:
    """Writes one answer's events as they come."""
    async for event in generation.events():
        response = generation_pb2.StreamGenerateResponse()
        write_event(event, index, response)
        async with writing:
            await context.write(response)


class ModelServicer:
    """dash_api.v1.ModelService. Its handlers receive the request's bytes."""

    def __init__(self, state: ServiceState) -> None:
        self._state = state
        self._tokenize_calls = Admission(state.settings.max_tokenize_calls)

    async def get_model(self, context: grpc.aio.ServicerContext) -> model_pb2.GetModelResponse:
        async with errors_to_status(context):
            await self._state.request(model_pb2.GetModelRequest, context)
            return model_to_pb(self._state.require_model().facts, self._state.settings)

    async def get_policy(self, context: grpc.aio.ServicerContext) -> model_pb2.GetPolicyResponse:
        async with errors_to_status(context):
            request, _ = await self._state.request(model_pb2.GetPolicyRequest, context)
            facts = self._state.require_model().facts
            try:
                policy = facts.policy(request.name if request.HasField("name") else None)
            except InvalidRequest as error:
                raise InvalidRequest("name", error.description) from None
            return policy_to_pb(policy)

    async def tokenize(self, context: grpc.aio.ServicerContext) -> model_pb2.TokenizeResponse:
        async with errors_to_status(context):
            caller = self._state.caller(context)
            model = self._state.require_model()
            async with self._state.receiver.message(context, caller.name) as data:
                with self._tokenize_calls.admit(caller):
                    return await self._state.read(caller, work_of(len(data)), lambda: self._tokenize(data, model))

    async def get_load(self, context: grpc.aio.ServicerContext) -> model_pb2.GetLoadResponse:
        async with errors_to_status(context):
            await self._state.request(model_pb2.GetLoadRequest, context)
            state = self._state
            return load_to_pb(state.dispatcher.load(), state.admission, state.settings)

    async def get_audit(self, context: grpc.aio.ServicerContext) -> model_pb2.GetAuditResponse:
        async with errors_to_status(context):
            request, caller = await self._state.request(model_pb2.GetAuditRequest, context)
            if not request.request_id:
                raise InvalidRequest("request_id", "is required")
            return audit_to_pb(await self._state.auditor.audit(request.request_id, caller.name))

    async def get_decisions(self, context: grpc.aio.ServicerContext) -> model_pb2.GetDecisionsResponse:
        async with errors_to_status(context):
            request, caller = await self._state.request(model_pb2.GetDecisionsRequest, context)
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
