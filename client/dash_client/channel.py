"""Resolves a server's address, and makes the gRPC options of a channel to it. Shared by both clients.

Knows no secrets, no calls and no messages.
"""

import ipaddress
import json
import os
import re
import socket
from dataclasses import dataclass
from typing import Any

import grpc

from dash_client.errors import invalid_argument

DEFAULT_TARGET = "localhost:50051"
DEFAULT_RETRIES = 3
MAX_RETRIES = 4
"""gRPC makes at most five attempts."""

# gRPC's servers cancel a call that comes at the moment in which they close their connections. What the caller cancels
# is never tried again.
RETRIED_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
# Used if the server does not say when to retry.
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, PAUSE_FACTOR = 0.2, 2, 2

_OPTIONS: tuple[tuple[str, int], ...] = (
    # Returned decisions and log probabilities grow with the answer; the server limits both.
    ("grpc.max_receive_message_length", -1),
    # Detect a dead peer while a request waits in a queue and nothing else is sent. Our server allows a ping every 10 s;
    # many others close a connection that pings without a call.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    # Connect within a second of the server's start.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # gRPC asks DNS again when a connection ends, at most this often. By its own default of 30 s, all servers of a name
    # may be gone before it asks.
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),
    # By default all channels of a process to one address share a connection, also while it waits to be tried again: a
    # new client of a server that has just started would fail with the error of an older client.
    ("grpc.use_local_subchannel_pool", 1),
)

# Not the health service: a health check asks for the present state.
_RETRIED_SERVICES = ("dash_api.v1.GenerationService", "dash_api.v1.ModelService")

_SCHEME = re.compile(r"(dns|unix|unix-abstract|ipv4|ipv6|vsock|xds|passthrough):")
_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.%\w]+\]|[^\s/:@\[\]]+):(\d{1,5})")


@dataclass(frozen=True, slots=True)
class Target:
    """A server's address."""

    name: str
    """The target as the user wrote it, for messages."""
    address: str
    """The target in gRPC's form."""
    is_on_this_machine: bool
    """True if data on the way there cannot be read by others."""

    def is_listening(self) -> bool:
        """Returns True if something on this machine listens there. Always False for other machines: a probe may hang.

        `localhost` has two addresses, and gRPC reports the error of only one, often of the one nothing listens on.
        """
        match = _HOST_AND_PORT.fullmatch(self.name)
        if match is None or not self.is_on_this_machine:
            return False
        try:
            host = match[1].removeprefix("[").removesuffix("]")
            socket.create_connection((host, int(match[2])), timeout=0.2).close()
        except OSError:
            return False
        return True


def resolve_target(target: str | None) -> Target:
    """Returns the target to use: the argument, else DASH_TARGET, else localhost:50051.

    Raises:
        InvalidArgumentError: it is neither `host:port` nor another gRPC target.
    """
    if target is not None and not isinstance(target, str):
        raise invalid_argument("target", f"must be text such as {DEFAULT_TARGET}, not {target!r}")
    name = (target or os.environ.get("DASH_TARGET") or DEFAULT_TARGET).strip()
    if name.startswith(("http://", "https://")):
        raise invalid_argument("target", f"{name!r} is a web address; give host:port")
    if _SCHEME.match(name):
        return Target(name, name, _is_local_uri(name))
    match = _HOST_AND_PORT.fullmatch(name)
    if match is None or not 0 < int(match[2]) < 65_536:
        raise invalid_argument("target", f"{name!r} is not host:port, such as {DEFAULT_TARGET}")
    # A name may resolve to several servers; calls go to them in turn.
    address = name if _ip_address(match[1]) is not None else f"dns:///{name}"
    return Target(name, address, _is_local_host(match[1]))


def resolve_retries(retries: Any) -> int:
    """Returns the number of retries of a call.

    Raises:
        InvalidArgumentError: it is neither True, False nor a number that gRPC takes.
    """
    if isinstance(retries, bool):
        return DEFAULT_RETRIES if retries else 0
    if not isinstance(retries, int) or not 0 <= retries <= MAX_RETRIES:
        raise invalid_argument("retries", f"must be True, False or an integer in [0, {MAX_RETRIES}], not {retries!r}")
    return retries


def channel_options(target: Target, retries: int, server_name: str | None = None) -> list[tuple[str, int | str]]:
    """Returns the gRPC channel options for this target."""
    options: list[tuple[str, int | str]] = [*_OPTIONS, ("grpc.service_config", _service_config(retries))]
    if target.is_on_this_machine:
        # gRPC would send even local calls through http_proxy.
        options.append(("grpc.enable_http_proxy", 0))
    if server_name is not None:
        options.append(("grpc.ssl_target_name_override", server_name))
    return options


def _service_config(retries: int) -> str:
    """Returns the configuration of load balancing and retries, both done by gRPC itself.

    gRPC retries until the server's first headers. They come with the request's slot, so nothing was generated yet.
    """
    config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if retries:
        policy = {
            "maxAttempts": retries + 1,
            "initialBackoff": f"{FIRST_PAUSE_SECONDS}s",
            "maxBackoff": f"{LONGEST_PAUSE_SECONDS}s",
            "backoffMultiplier": PAUSE_FACTOR,
            "retryableStatusCodes": [code.name for code in RETRIED_CODES],
        }
        names = [{"service": service} for service in _RETRIED_SERVICES]
        # A session tries each of its generations again by itself.
        session = {"name": [{"service": _RETRIED_SERVICES[0], "method": "Session"}]}
        config["methodConfig"] = [{"name": names, "retryPolicy": policy}, session]
    return json.dumps(config)


def _is_local_uri(uri: str) -> bool:
    scheme, _, rest = uri.partition(":")
    if scheme.startswith("unix"):
        return True
    if scheme not in ("dns", "ipv4", "ipv6"):
        return False
    hosts = rest.rpartition("/")[2].split(",")
    return all(_is_local_host(host.rpartition(":")[0] or host) for host in hosts)


def _is_local_host(host: str) -> bool:
    address = _ip_address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
