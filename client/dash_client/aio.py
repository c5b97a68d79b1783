"""The asynchronous client: sends calls and awaits them. `calls` describes a call, `stream_state` its outcome.

Has the same methods as `client`, on the same parts; only the waiting differs.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Literal, Self, TypeVar, Unpack, overload

import grpc

from dash_client.aio_session import AsyncSession
from dash_client.calls import Call, Calls, StreamCall, closed_error
from dash_client.connection import ConnectionOptions, connection
from dash_client.decision_trace import RecordedDecisions
from dash_client.errors import DashError, DeadlineExceededError, UnavailableError
from dash_client.options import GenerationOptions, Messages, Prompt
from dash_client.prompt_map import PromptMap
from dash_client.readiness import Readiness
from dash_client.score import Score, ScoreOptions
from dash_client.server_facts import Audit, ModelInfo, PolicyInfo, ServerLoad
from dash_client.stream_state import StreamState
from dash_client.streams import AsyncGenerationStream, is_task_cancelled
from dash_client.tools import AnyTool
from dash_client.types import Generation, HealthStatus

Answer = TypeVar("Answer")


class AsyncDashClient:
    """A connection to a dash server for one event loop; use it as an async context manager or await `close`.

    Example:
        async with AsyncDashClient() as client:
            print((await client.generate("The capital of France is", max_new_tokens=8)).text)

    Args:
        target: `host:port`, or any gRPC target. Unset: DASH_TARGET, else localhost:50051.
        timeout: deadline of each call in seconds. Unset: none for generation, 10 s for the rest.
        options: token, TLS and retries; see `ConnectionOptions`.

    Every method raises a `DashError`, never gRPC's own exceptions. Cancelling a task cancels its request on the
    server, and raises asyncio's CancelledError as usual.
    """

    def __init__(
        self, target: str | None = None, *, timeout: float | None = None, **options: Unpack[ConnectionOptions]
    ) -> None:
        self._connection = connection(target, **options)
        self.target: str = self._connection.target.name
        self._calls = Calls(self._connection, timeout)
        self._is_closed = False
        # A channel belongs to a running event loop, so it is opened by the first call.
        self._channel: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._methods: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"AsyncDashClient({self.target!r}, tls={self._connection.is_encrypted})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection, and cancels the running calls."""
        self._is_closed = True
        if self._channel is not None:
            await self._channel.close()

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> Generation:
        """Generates text, and returns the complete answer.

        Args:
            prompt: text, token ids, or a list of `{"role": …, "content": …}` messages.
            timeout: deadline in seconds, instead of the client's; infinity for none.
            options: see `GenerationOptions`.
        """
        return await self._run(self._calls.generate(prompt, timeout, options))

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> AsyncGenerationStream:
        """Starts to generate, and returns a stream of the output; not awaited. Arguments as for `generate`."""
        return self._start(self._calls.stream(prompt, timeout, options))

    async def chat(
        self, messages: Messages, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> Generation:
        """Generates the next message of a conversation.

        Args:
            messages: a list of `{"role": …, "content": …}`, oldest first, or a string as one user message.
            timeout: deadline in seconds, instead of the client's; infinity for none.
            options: see `GenerationOptions`.
        """
        return await self._run(self._calls.chat(messages, timeout, options))

    def chat_stream(
        self, messages: Messages, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> AsyncGenerationStream:
        """Starts to generate the next message of a conversation; not awaited. Arguments as for `chat`."""
        return self._start(self._calls.chat_stream(messages, timeout, options))

    @overload
    async def map(
        self,
        prompts: Iterable[Prompt],
        *,
        raise_errors: Literal[True],
        max_concurrency: int = 8,
        progress: bool = False,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Generation]: ...
    @overload
    async def map(
        self,
        prompts: Iterable[Prompt],
        *,
        raise_errors: Literal[False] = False,
        max_concurrency: int = 8,
        progress: bool = False,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Generation | DashError]: ...
    async def map(
        self,
        prompts: Iterable[Prompt],
        *,
        raise_errors: bool = False,
        max_concurrency: int = 8,
        progress: bool = False,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Any:
        """Generates for each prompt, several at a time; returns the results in the order of the prompts.

        The result of a prompt that fails is its `DashError`, and the others go on. Wrong options raise at once.

        Args:
            prompts: as for `generate`; each is taken only when it can be sent.
            raise_errors: raise the first error, and cancel the other requests.
            max_concurrency: the maximum number of requests at a time.
            progress: show a progress bar (needs tqdm: `pip install 'dash-llm[cli]'`).
            timeout: deadline of each request in seconds, instead of the client's; infinity for none.
            options: see `GenerationOptions`; the same for all.
        """
        generate = self._calls.generate_each(timeout, options)
        prompt_map = PromptMap(
            prompts, generate, max_concurrency=max_concurrency, progress=progress, raise_errors=raise_errors
        )
        running: dict[asyncio.Task[Generation], int] = {}
        try:
            while True:
                while len(running) < prompt_map.max_concurrency and (job := prompt_map.next()) is not None:
                    place, call = job
                    running[asyncio.create_task(self._run(call))] = place
                if not running:
                    return prompt_map.results()
                over, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in over:
                    place = running.pop(task)
                    try:
                        result: Generation | DashError = task.result()
                    except DashError as error:
                        result = error
                    prompt_map.done(place, result)
        finally:
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)
            prompt_map.close()

    def session(self) -> AsyncSession:
        """Returns a session, which carries many requests on one stream. It opens with its first request."""
        return AsyncSession(self._calls, self._connection.retries, self._open_session)

    async def score(
        self,
        prompt: Prompt,
        continuation: str | Sequence[int] | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Score:
        """Returns the log probability of an output that is given, by the path that a generation in the same mode takes.

        Args:
            prompt: as for `generate`.
            continuation: the output, as text or token ids; None scores the prompt's own tokens, from the second on.
            timeout: deadline in seconds, instead of the client's; infinity for none.
            options: see `ScoreOptions`.
        """
        return await self._run(self._calls.score(prompt, continuation, timeout, options))

    async def tokenize(
        self, prompt: Prompt, *, tools: Sequence[AnyTool] | None = None, timeout: float | None = None
    ) -> tuple[int, ...]:
        """Returns the token ids of text or of a conversation with its tools, exactly as a generation would see them."""
        return await self._run(self._calls.tokenize(prompt, tools, timeout))

    async def model_info(self, *, timeout: float | None = None) -> ModelInfo:
        """Returns the facts and limits of the served model."""
        return await self._run(self._calls.model_info(timeout))

    async def policy_info(self, name: str | None = None, *, timeout: float | None = None) -> PolicyInfo:
        """Returns the facts of a policy, by default the server's default one."""
        return await self._run(self._calls.policy_info(name, timeout))

    async def load(self, *, timeout: float | None = None) -> ServerLoad:
        """Returns what the server holds at this moment: requests, slots, tokens and recent speed."""
        return await self._run(self._calls.load(timeout))

    async def audit(self, request_id: str, *, timeout: float | None = None) -> Audit:
        """Returns how one of this caller's latest answers in mode "adaptive" compares with full depth.

        The server compares them when nothing else is to do: a share by itself (`DASH_AUDIT_RATE`), others when they are
        asked for.

        Args:
            request_id: the id in `GenerationStarted`.
            timeout: deadline in seconds, instead of the client's; infinity for none.

        Raises:
            NotFoundError: it was in another mode, of one token, or too long ago; or it is another caller's.
        """
        return await self._run(self._calls.audit(request_id, timeout))

    async def decisions(self, request_id: str, *, timeout: float | None = None) -> RecordedDecisions:
        """Returns the recorded decisions of one of this caller's latest requests, once it is over.

        Args:
            request_id: the id in `GenerationStarted`.
            timeout: deadline in seconds, instead of the client's; infinity for none.

        Raises:
            NotFoundError: the server does not hold it, or it is another caller's.
        """
        return await self._run(self._calls.decisions(request_id, timeout))

    async def health(self, *, timeout: float | None = None) -> HealthStatus:
        """Returns the server's present state. This call is never retried.

        Raises:
            UnavailableError: there is no server.
        """
        return await self._run(self._calls.health(timeout))

    async def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Waits until the server is serving; the server may be started after this call.

        Raises:
            UnavailableError: it is not serving after `timeout` seconds; the message names its last state.
        """
        wait = Readiness(self.target, timeout)
        while True:
            seconds = wait.next_timeout()
            try:
                if wait.saw(await self.health(timeout=seconds)):
                    return
            except (UnavailableError, DeadlineExceededError) as error:
                wait.failed(error)
            await asyncio.sleep(wait.pause())

    def _opened(self) -> Any:
        """Returns the channel of the running event loop."""
        if self._is_closed:
            raise closed_error()
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None and not self._loop.is_closed():
                raise RuntimeError("this client is in use by another event loop; make one for each")
            self._loop, self._channel = loop, self._connection.open(grpc.aio)
            self._methods.clear()
        return self._channel

    async def _run(self, call: Call[Answer]) -> Answer:
        channel = self._opened()
        if call.path not in self._methods:
            self._methods[call.path] = channel.unary_unary(call.path)
        method = self._methods[call.path]
        try:
            return call.read(await method(call.request, timeout=call.timeout, metadata=call.metadata))
        except grpc.RpcError as error:
            raise call.failed(error) from None
        except asyncio.CancelledError:
            if is_task_cancelled():
                raise
            # Somebody closed the client, which does not cancel this task.
            raise call.cancelled() from None

    def _open_session(self, requests: AsyncIterator[bytes]) -> Any:
        call = self._calls.session(requests)
        return self._opened().stream_stream(call.path)(call.request, metadata=call.metadata)

    def _start(self, call: StreamCall) -> AsyncGenerationStream:
        method = self._opened().unary_stream(call.path)
        running = method(call.request, timeout=call.timeout, metadata=call.metadata)
        return AsyncGenerationStream(running, StreamState(call))
