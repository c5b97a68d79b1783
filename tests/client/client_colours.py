"""Both clients behind one set of functions, so that a property is shown of each."""

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
    """What the use of this colour returns."""
    if colour == "sync":
        with DashClient(target, **options) as client:
            return sync_use(client)

    async def run() -> Any:
        async with AsyncDashClient(target, **options) as client:
            return await async_use(client)

    return asyncio.run(run())


def generate(colour: str, target: str, prompt: str = "x", timeout: float | None = None, **options: Any) -> Generation:
    """One unary call of a new client."""
    return with_client(
        colour,
        target,
        lambda client: client.generate(prompt, timeout=timeout),
        lambda client: client.generate(prompt, timeout=timeout),
        **options,
    )


def drain(colour: str, target: str, timeout: float | None = None, **options: Any) -> Generation:
    """One stream of a new client, read to its end."""
    return with_client(
        colour,
        target,
        lambda client: client.stream("x", timeout=timeout).final(),
        lambda client: client.stream("x", timeout=timeout).final(),
        **options,
    )
