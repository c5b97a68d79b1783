"""Both clients with the methods of the sync one, to test a property of both."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from dash_client import AsyncDashClient, AsyncGenerationStream, AsyncSession, DashClient, Generation

COLOURS = ("sync", "async")


class Blocking:
    """An async client, session or stream with the methods of the sync one: each waits for a loop in another thread."""

    def __init__(self, inner: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._inner = inner
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value
        return lambda *arguments, **options: self._run(value, *arguments, **options)

    def __repr__(self) -> str:
        return repr(self._inner)

    @property
    def started(self) -> Any:
        return self._run(self._inner.started)

    def __enter__(self) -> Self:
        self._run(self._inner.__aenter__)
        return self

    def __exit__(self, *error: object) -> None:
        self._run(self._inner.__aexit__, *error)

    def __iter__(self) -> Self:
        self._run(self._inner.__aiter__)
        return self

    def __next__(self) -> Any:
        if (item := self._run(anext, self._inner, None)) is None:
            raise StopIteration
        return item

    def _run(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        async def call() -> Any:
            result = method(*arguments, **options)
            return await result if inspect.isawaitable(result) else result

        result = asyncio.run_coroutine_threadsafe(call(), self._loop).result()
        is_ours = isinstance(result, AsyncGenerationStream | AsyncSession) and result is not self._inner
        return Blocking(result, self._loop) if is_ours else result


@contextmanager
def open_client(colour: str, target: str | None = None, **options: Any) -> Iterator[Any]:
    """Yields a client of this colour."""
    if colour == "sync":
        with DashClient(target, **options) as client:
            yield client
        return
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        with Blocking(AsyncDashClient(target, **options), loop) as client:
            yield client
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def generate(client: DashClient, timeout: float | None = None) -> Generation:
    """Makes one unary call."""
    return client.generate("x", timeout=timeout)


def drain(client: DashClient, timeout: float | None = None) -> Generation:
    """Reads one stream to its end."""
    return client.stream("x", timeout=timeout).final()


def in_session(client: DashClient, timeout: float | None = None) -> Generation:
    """Reads one stream of a session to its end."""
    with client.session() as session:
        return session.stream("x", timeout=timeout).final()


CALLS = (generate, drain, in_session)
