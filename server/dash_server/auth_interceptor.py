"""Guards the services that are not ours, such as reflection and channelz: only known callers may use them.

Our own services authenticate their callers themselves (`service.py`). Knows gRPC; knows no requests.
"""

from collections.abc import Awaitable, Callable, Set
from typing import Any

import grpc

from dash_server.auth import Authenticator
from dash_server.handlers import HANDLER_MAKERS
from dash_server.statuses import Unauthenticated, failure_of


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a token, where one is required."""

    def __init__(self, authenticator: Authenticator, open_services: Set[str]) -> None:
        """Leaves out `open_services`: those that authenticate by themselves, and health, which load balancers call."""
        self._authenticator = authenticator
        self._open_services = open_services

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        service = handler_call_details.method.rpartition("/")[0].lstrip("/")
        if handler is None or service in self._open_services:
            return handler
        try:
            self._authenticator.identify(handler_call_details.invocation_metadata or (), "")
        except Unauthenticated as error:
            return _refusing(handler, error)
        return handler


def _refusing(handler: grpc.RpcMethodHandler, error: Unauthenticated) -> grpc.RpcMethodHandler:
    """Returns a handler of the same kind that refuses every call."""
    failure = failure_of(error, "")

    async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(failure.code, failure.message, failure.trailing_metadata)

    return HANDLER_MAKERS[handler.request_streaming, handler.response_streaming](refuse)
