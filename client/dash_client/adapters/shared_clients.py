"""Keeps clients that the copies of one model object share. Knows no framework.

Frameworks copy and pickle their model objects, and call them from many threads and event loops. A connection can be
neither copied nor pickled, and an async one belongs to its loop.
"""

import asyncio
import os
from collections import OrderedDict
from threading import Lock
from typing import Any

from dash_client.aio import AsyncDashClient
from dash_client.client import DashClient

_MOST_CLIENTS = 32
"""The least recently used client is dropped first; running calls keep theirs alive."""

_lock = Lock()
_clients: OrderedDict[Any, DashClient] = OrderedDict()
_async_clients: OrderedDict[Any, AsyncDashClient] = OrderedDict()


def shared_client(**arguments: Any) -> DashClient:
    """Returns the client with these constructor arguments; makes it at the first call.

    Raises:
        InvalidArgumentError: an argument is wrong.
    """
    key = _key(arguments)
    with _lock:
        client = _clients.pop(key, None) or DashClient(**arguments)
        _keep(_clients, key, client)
    return client


def shared_async_client(**arguments: Any) -> AsyncDashClient:
    """Returns the same for the running event loop, as an async client."""
    loop = asyncio.get_running_loop()
    key = (loop, _key(arguments))
    with _lock:
        # The clients of a closed loop can no longer be used.
        for other in [other for other in _async_clients if other[0].is_closed()]:
            del _async_clients[other]
        client = _async_clients.pop(key, None) or AsyncDashClient(**arguments)
        _keep(_async_clients, key, client)
    return client


def _key(arguments: dict[str, Any]) -> tuple[Any, ...]:
    # The client reads these variables when it is made.
    environment = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("DASH_")))
    return tuple(sorted(arguments.items())), environment


def _keep(clients: OrderedDict[Any, Any], key: Any, client: Any) -> None:
    clients[key] = client
    if len(clients) > _MOST_CLIENTS:
        clients.popitem(last=False)
