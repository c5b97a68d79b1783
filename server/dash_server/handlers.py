"""Makes gRPC's handlers of a servicer's methods. Knows descriptors; knows no service."""

import re
from collections.abc import Callable

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor


def stream_handler(
    behaviour: Callable, response_streaming: bool, response_serializer: Callable | None = None
) -> grpc.RpcMethodHandler:
    """Returns the handler of a method that receives its requests by itself, also where there is only one: gRPC would
    have read that before it calls anything of ours."""
    make = grpc.stream_stream_rpc_method_handler if response_streaming else grpc.stream_unary_rpc_method_handler
    return make(behaviour, response_serializer=response_serializer)


def rpc_handlers(
    service: ServiceDescriptor, servicer: object, *, is_whole: bool = True
) -> dict[str, grpc.RpcMethodHandler]:
    """Returns the handler of each method of `service`, without deserialisers: see `wire` and `receiving`.

    Args:
        is_whole: whether the servicer has to have all methods.

    Raises:
        TypeError: `servicer` lacks a method of the service, or has a public one that is none of the service's.
    """
    methods = {_snake_case(method.name): method for method in service.methods}
    public = {name for name in dir(servicer) if not name.startswith("_")}
    lacking = methods.keys() - public
    for problem, names in (("lacks", lacking if is_whole else ()), ("has no use for", public - methods.keys())):
        if names:
            raise TypeError(f"{service.full_name} {problem} {type(servicer).__name__}.{min(names)}")
    return {
        methods[name].name: _rpc_handler(methods[name], getattr(servicer, name)) for name in methods.keys() & public
    }


def _rpc_handler(method: MethodDescriptor, handler: Callable) -> grpc.RpcMethodHandler:
    async def behaviour(_: object, context: grpc.aio.ServicerContext) -> object:
        return await handler(context)

    return stream_handler(behaviour, method.server_streaming, lambda response: response.SerializeToString())


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
