"""Where the server is, and how to connect to it. Shared by the sync and the async client."""

import math
import os

from dash_client.errors import invalid_argument

DEFAULT_TARGET = "localhost:50051"

_OPTIONS: tuple[tuple[str, int], ...] = (
    # Returned decisions and log probabilities grow with the answer; the server bounds both.
    ("grpc.max_receive_message_length", -1),
    # Find a dead peer while a request waits in a queue and nothing else is sent.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    # A server that is being started is found within a second of being there.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")


def resolve_target(target: str | None) -> str:
    """The target in use: the argument, else DASH_TARGET, else localhost:50051.

    Raises:
        InvalidArgumentError: it is a web address.
    """
    resolved = (target or os.environ.get("DASH_TARGET") or DEFAULT_TARGET).strip()
    if resolved.startswith(("http://", "https://")):
        raise invalid_argument("target", f"{resolved!r} is a web address; give host:port")
    return resolved


def channel_options(target: str) -> list[tuple[str, int]]:
    """gRPC channel options for this target."""
    options = list(_OPTIONS)
    host = target.removeprefix("dns:///").rpartition(":")[0]
    if host in _LOOPBACK_HOSTS:
        # gRPC would send even these through http_proxy.
        options.append(("grpc.enable_http_proxy", 0))
    return options


def resolve_timeout(timeout: float | None, default: float | None) -> float | None:
    """Seconds for one call, or None for no deadline; infinity overrides a default with none.

    Raises:
        InvalidArgumentError: it is not a positive number.
    """
    chosen = default if timeout is None else timeout
    if chosen is None or chosen == math.inf:
        return None
    if not chosen > 0:
        raise invalid_argument("timeout", f"must be more than 0 seconds, got {chosen:g}")
    return chosen
