"""Guards the services that are not ours, such as health, reflection and channelz: only known callers may use them, and
their messages are received as ours are.

Our own services do both by themselves (`service.py`). Knows gRPC; knows no requests.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Set
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from dash_runtime.errors import InvalidRequest
from dash_server.admission import Admission
from dash_server.auth import Authenticator, Caller, address_of
from dash_server.handlers import stream_handler
from dash_server.receiving import Receiver
from dash_server.service_state import errors_to_status

_MOST_STREAMS = 64
"""Open streams of requests, as reflection takes them: each may hold an unfinished message."""


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a token, where one is required, before any of their messages is kept."""

    def __init__(
        self, authenticator: Authenticator, receiver: Receiver, own_services: Set[str], open_services: Set[str]
    ) -> None:
        """Leaves alone `own_services`; `open_services` need no token, as health, which load balancers ask for."""
        self._authenticator = authenticator
        self._receiver = receiver
        self._own_services = own_services
        self._open_services = open_services
        self._streams = Admission(_MOST_STREAMS)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        service = handler_call_details.method.rpartition("/")[0].lstrip("/")
        if handler is None or service in self._own_services:
            return handler
        return self._guarded(handler, is_open=service in self._open_services)

    def _guarded(self, handler: Any, *, is_open: bool) -> grpc.RpcMethodHandler:
        """Returns a handler of the same method that first looks who calls, and then receives the message itself."""

        async def answer(requests: Any, context: grpc.aio.ServicerContext) -> Any:
            async with errors_to_status(context):
                if not is_open:
                    self._authenticator.identify(context.invocation_metadata() or (), "")
                if handler.request_streaming:
                    return await self._answer_stream(handler, context)
                async with self._receiver.message(context, address_of(context.peer())) as data:
                    request = _parsed(handler, data)
                method = handler.unary_stream if handler.response_streaming else handler.unary_unary
                return await method(request, context)

        return stream_handler(answer, handler.response_streaming, handler.response_serializer)

    async def _answer_stream(self, handler: Any, context: grpc.aio.ServicerContext) -> None:
        async def messages() -> AsyncIterator[Any]:
            while (data := await context.read()) is not grpc.aio.EOF:
                yield _parsed(handler, data)

        with self._streams.admit(Caller(address_of(context.peer()))):
            async for response in handler.stream_stream(messages(), context):
                await context.write(response)


def _parsed(handler: Any, data: bytes) -> Any:
    try:
        return handler.request_deserializer(data)
    except DecodeError:
        raise InvalidRequest("request", "the bytes are not a message of this method") from None
