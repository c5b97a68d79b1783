"""The service `vllm.grpc.engine.VllmEngine`, which the SMG gateway speaks: OpenAI's HTTP in front of our engine.

Turns its requests into our own, so that they pass the same checks, limits and queue. The gateway has the tokenizer, the
chat template and the tool parsers. Imported only if DASH_VLLM_ENGINE is on: the messages come with the extra `smg`.
"""

import asyncio
import hashlib
import io
import time
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import grpc
from smg_grpc_proto.generated import common_pb2 as smg_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm_pb2

from dash_api.v1 import generation_pb2
from dash_server.from_pb import PreparedRequest, prepare_request
from dash_server.generation import Generation
from dash_server.handlers import rpc_handlers
from dash_server.reading import Reading
from dash_server.service_state import ServiceState, errors_to_status, open_generations, together
from dash_server.vllm_requests import aborted, chunk, complete, parameters_of

_SERVICE = vllm_pb2.DESCRIPTOR.services_by_name["VllmEngine"]
VLLM_ENGINE_SERVICE = _SERVICE.full_name
_CHUNK_BYTES = 1 << 20
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
)


class VllmEngineServicer:
    """vllm.grpc.engine.VllmEngine, as far as a text model has answers. Its handlers receive the request's bytes."""

    def __init__(self, state: ServiceState) -> None:
        self._state = state
        self._started = time.monotonic()
        # By the caller's name and its id of the request, which several requests may have.
        self._running: dict[tuple[str, str], set[asyncio.Future[list[None]]]] = {}

    async def generate(self, context: grpc.aio.ServicerContext) -> None:
        method = f"{VLLM_ENGINE_SERVICE}/Generate"
        request = vllm_pb2.GenerateRequest()

        def prepare(message: vllm_pb2.GenerateRequest, reading: Reading) -> PreparedRequest:
            request.CopyFrom(message)
            return prepare_request(
                parameters_of(message),
                **reading.common,
                is_streamed=message.stream,
                check_grammar=reading.check_grammar,
            )

        source = self._state.received(context, vllm_pb2.GenerateRequest, prepare, _has_constraint)
        async with (
            errors_to_status(context) as own_id,
            open_generations(self._state, context, own_id, method, source) as generations,
        ):
            writing = asyncio.Lock()
            answering = asyncio.ensure_future(
                together(
                    [
                        _answer(generation, index, request.stream, context, writing)
                        for index, generation in enumerate(generations)
                    ]
                )
            )
            caller = generations[0].record.caller
            assert caller is not None
            running = self._running.setdefault((caller.name, request.request_id), set())
            running.add(answering)
            try:
                await answering
            except asyncio.CancelledError:
                if answering in running:
                    raise  # the call itself is over
                for index in range(len(generations)):
                    await _write(context, writing, aborted(index))
            finally:
                answering.cancel()
                running.discard(answering)
                if not running:
                    self._running.pop((caller.name, request.request_id), None)

    async def abort(self, context: grpc.aio.ServicerContext) -> vllm_pb2.AbortResponse:
        async with errors_to_status(context):
            request, caller = await self._state.request(vllm_pb2.AbortRequest, context)
            for request_id in request.request_ids:
                running = self._running.get((caller.name, request_id), set())
                while running:
                    running.pop().cancel()
            return vllm_pb2.AbortResponse()

    async def health_check(self, context: grpc.aio.ServicerContext) -> vllm_pb2.HealthCheckResponse:
        async with errors_to_status(context):
            state = self._state
            # A gateway takes a first answer as a sign that it can ask for the model.
            state.require_model()
            is_healthy = state.dispatcher.is_ready and not state.admission.is_draining
            reason = "" if is_healthy else "no requests are taken now"
            return vllm_pb2.HealthCheckResponse(healthy=is_healthy, message=reason)

    async def get_model_info(self, context: grpc.aio.ServicerContext) -> vllm_pb2.GetModelInfoResponse:
        async with errors_to_status(context):
            await self._state.request(vllm_pb2.GetModelInfoRequest, context)
            model = self._state.require_model()
            facts, settings = model.facts, self._state.settings
            longest = facts.context_length
            if settings.max_prompt_tokens is not None:
                longest = min(longest, settings.max_prompt_tokens)
            return vllm_pb2.GetModelInfoResponse(
                model_path=facts.name,
                served_model_name=facts.name,
                is_generation=True,
                max_context_length=facts.context_length,
                max_req_input_len=longest,
                vocab_size=facts.vocab_size,
                architectures=[facts.architecture],
                eos_token_ids=sorted(facts.eos_token_ids),
            )

    async def get_server_info(self, context: grpc.aio.ServicerContext) -> vllm_pb2.GetServerInfoResponse:
        async with errors_to_status(context):
            await self._state.request(vllm_pb2.GetServerInfoRequest, context)
            load = self._state.dispatcher.load()
            return vllm_pb2.GetServerInfoResponse(
                active_requests=load.num_running,
                uptime_seconds=time.monotonic() - self._started,
                server_type="vllm-grpc",
                data_parallel_size=1,
                max_num_seqs=load.num_slots,
                constrained_decoding_start="first_token",
            )

    async def get_loads(self, context: grpc.aio.ServicerContext) -> vllm_pb2.GetLoadsResponse:
        async with errors_to_status(context):
            await self._state.request(vllm_pb2.GetLoadsRequest, context)
            load = self._state.dispatcher.load()
            share = load.num_reserved_tokens / load.num_cache_tokens if load.num_cache_tokens else 0.0
            entry = vllm_pb2.SchedulerLoad(
                num_running_reqs=load.num_running,
                num_waiting_reqs=load.num_waiting,
                num_total_reqs=load.num_running + load.num_waiting,
                num_used_tokens=load.num_reserved_tokens,
                max_total_num_tokens=load.num_cache_tokens,
                token_usage=share,
                gen_throughput=(load.decode_tokens_per_second or 0.0) * load.num_running,
                max_running_requests=load.num_slots,
            )
            now = datetime.now(UTC).isoformat()
            return vllm_pb2.GetLoadsResponse(timestamp=now, dp_rank_count=1, loads=[entry])

    async def get_tokenizer(self, context: grpc.aio.ServicerContext) -> None:
        async with errors_to_status(context):
            self._state.caller(context)
            archive = await asyncio.to_thread(_tokenizer_archive, self._state.require_model().folder)
            digest = hashlib.sha256(archive).hexdigest()
            for start in range(0, len(archive), _CHUNK_BYTES):
                end = start + _CHUNK_BYTES
                sha256 = digest if end >= len(archive) else ""
                await context.write(smg_pb2.GetTokenizerChunk(data=archive[start:end], sha256=sha256))


def add_vllm_engine(state: ServiceState, server: grpc.aio.Server) -> None:
    """Registers the service on `server`. Its other methods stay unimplemented."""
    handlers = rpc_handlers(_SERVICE, VllmEngineServicer(state), is_whole=False)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(VLLM_ENGINE_SERVICE, handlers),))


def _has_constraint(message: vllm_pb2.GenerateRequest) -> bool:
    return message.sampling_params.WhichOneof("constraint") is not None


async def _answer(
    generation: Generation, index: int, is_streamed: bool, context: grpc.aio.ServicerContext, writing: asyncio.Lock
) -> None:
    """Writes one answer: in pieces, or whole at its end."""
    started = await generation.start()
    rest = generation_pb2.GenerationDelta()
    while (delta := await generation.next_delta()) is not None:
        if is_streamed:
            await _write(context, writing, chunk(delta, started, index))
        else:
            rest.MergeFrom(delta)
    await _write(context, writing, complete(rest, generation.finish(), index))


async def _write(context: grpc.aio.ServicerContext, writing: asyncio.Lock, response: vllm_pb2.GenerateResponse) -> None:
    """Writes a response to its end, even if its answer is aborted meanwhile: a write beside another one fails, and gRPC
    then leaves the call open for ever."""

    async def write() -> None:
        async with writing:
            await context.write(response)

    await asyncio.shield(write())


def _tokenizer_archive(folder: Path) -> bytes:
    """Returns the files that a gateway needs to make prompts and texts, as a zip."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
        for name in _TOKENIZER_FILES:
            if (folder / name).is_file():
                files.write(folder / name, name)
    return archive.getvalue()
