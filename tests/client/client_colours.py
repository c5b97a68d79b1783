"""Both clients behind one set of functions, to test a property of both."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from dash_client import AsyncDashClient, DashClient, Generation

COLOURS = ("sync", "async")


def with_client(
    colour: str,
    target: str,
    sync_use: Callable[[DashClient], Any],
    async_use: Callable[[AsyncDashClient], Coroutine[Any, Any, Any]],
    **options: Any,
) -> Any:
    """Runs a function with a client of this colour; returns its result."""
    if colour == "sync":
        with DashClient(target, **options) as client:
            return sync_use(client)

    async def run() -> Any:
        async with AsyncDashClient(target, **options) as client:
            return await async_use(client)

    return asyncio.run(run())


def generate(colour: str, target: str, prompt: str = "x", timeout: float | None = None, **options: Any) -> Generation:
    """Makes one unary call with a new client."""
    return with_client(
        colour,
        target,
        lambda client: client.generate(prompt, timeout=timeout),
        lambda client: client.generate(prompt, timeout=timeout),
        **options,
    )


def drain(colour: str, target: str, timeout: float | None = None, **options: Any) -> Generation:
    """Reads one stream of a new client to its end."""
    return with_client(
        colour,
        target,
        lambda client: client.stream("x", timeout=timeout).final(),
        lambda client: client.stream("x", timeout=timeout).final(),
        **options,
    )
