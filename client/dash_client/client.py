"""The synchronous client: sends calls and waits for them. `calls` describes a call, `stream_state` its outcome."""

import queue
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Self, TypeVar, Unpack, overload

import grpc

from dash_client.calls import Call, Calls, StreamCall, closed_error
from dash_client.connection import ConnectionOptions, connection
from dash_client.decision_trace import RecordedDecisions
from dash_client.errors import DashError, DeadlineExceededError, UnavailableError
from dash_client.options import GenerationOptions, Messages, Prompt
from dash_client.prompt_map import PromptMap
from dash_client.readiness import Readiness
from dash_client.score import Score, ScoreOptions
from dash_client.server_facts import Audit, ModelInfo, PolicyInfo, ServerLoad
from dash_client.session import Session
from dash_client.stream_state import StreamState
from dash_client.streams import GenerationStream
from dash_client.tools import AnyTool
from dash_client.types import Generation, HealthStatus

Answer = TypeVar("Answer")


class DashClient:
    """A connection to a dash server. Thread-safe; use it as a context manager or call `close`.

    Example:
        with DashClient() as client:
            print(client.generate("The capital of France is", max_new_tokens=8).text)

    Args:
        target: `host:port`, or any gRPC target. Unset: DASH_TARGET, else localhost:50051.
        timeout: deadline of each call in seconds. Unset: none for generation, 10 s for the rest.
        options: token, TLS and retries; see `ConnectionOptions`.

    Every method raises a `DashError`, never gRPC's own exceptions.
    """

    def __init__(
        self, target: str | None = None, *, timeout: float | None = None, **options: Unpack[ConnectionOptions]
    ) -> None:
        self._connection = connection(target, **options)
        self.target: str = self._connection.target.name
        self._calls = Calls(self._connection, timeout)
        self._is_closed = False
        self._channel = self._connection.open(grpc)
        self._methods: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"DashClient({self.target!r}, tls={self._connection.is_encrypted})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection, and cancels the running calls."""
        self._is_closed = True
        self._channel.close()

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> Generation:
        """Generates text, and returns the complete answer.

        Args:
            prompt: text, token ids, or a list of `{"role": …, "content": …}` messages.
            timeout: deadline in seconds, instead of the client's; infinity for none.
            options: see `GenerationOptions`.
        """
        return self._run(self._calls.generate(prompt, timeout, options))

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> GenerationStream:
        """Starts to generate, and returns a stream of the output. Arguments as for `generate`."""
        return self._start(self._calls.stream(prompt, timeout, options))

    def chat(
        self, messages: Messages, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> Generation:
        """Generates the next message of a conversation.

        Args:
            messages: a list of `{"role": …, "content": …}`, oldest first, or a string as one user message.
            timeout: deadline in seconds, instead of the client's; infinity for none.
            options: see `GenerationOptions`.
        """
        return self._run(self._calls.chat(messages, timeout, options))

    def chat_stream(
        self, messages: Messages, *, timeout: float | None = None, **options: Unpack[GenerationOptions]
    ) -> GenerationStream:
        """Starts to generate the next message of a conversation. Arguments as for `chat`."""
        return self._start(self._calls.chat_stream(messages, timeout, options))

    @overload
    def map(
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
    def map(
        self,
        prompts: Iterable[Prompt],
        *,
        raise_errors: Literal[False] = False,
        max_concurrency: int = 8,
        progress: bool = False,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Generation | DashError]: ...
    def map(
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
        running: dict[int, tuple[Call[Generation], Any]] = {}
        over: queue.SimpleQueue[int] = queue.SimpleQueue()
        try:
            while True:
                while len(running) < prompt_map.max_concurrency and (job := prompt_map.next()) is not None:
                    place, call = job
                    future = self._send(self._method(call).future, call)
                    running[place] = call, future
                    future.add_done_callback(lambda _, place=place: over.put(place))
                if not running:
                    return prompt_map.results()
                place = over.get()
                call, future = running.pop(place)
                try:
                    result: Generation | DashError = self._answer(call, future.result)
                except DashError as error:
                    result = error
                prompt_map.done(place, result)
        finally:
            for _, future in running.values():
                future.cancel()
            prompt_map.close()

    def session(self) -> Session:
        """Returns a session, which carries many requests on one stream. It opens with its first request."""
        return Session(self._calls, self._connection.retries, self._open_session)

    def score(
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
        return self._run(self._calls.score(prompt, continuation, timeout, options))

    def tokenize(
        self, prompt: Prompt, *, tools: Sequence[AnyTool] | None = None, timeout: float | None = None
    ) -> tuple[int, ...]:
        """Returns the token ids of text or of a conversation with its tools, exactly as a generation would see them."""
        return self._run(self._calls.tokenize(prompt, tools, timeout))

    def model_info(self, *, timeout: float | None = None) -> ModelInfo:
        """Returns the facts and limits of the served model."""
        return self._run(self._calls.model_info(timeout))

    def policy_info(self, name: str | None = None, *, timeout: float | None = None) -> PolicyInfo:
        """Returns the facts of a policy, by default the server's default one."""
        return self._run(self._calls.policy_info(name, timeout))

    def load(self, *, timeout: float | None = None) -> ServerLoad:
        """Returns what the server holds at this moment: requests, slots, tokens and recent speed."""
        return self._run(self._calls.load(timeout))

    def audit(self, request_id: str, *, timeout: float | None = None) -> Audit:
        """Returns how one of this caller's latest answers in mode "adaptive" compares with full depth.

        The server compares them when nothing else is to do: a share by itself (`DASH_AUDIT_RATE`), others when they are
        asked for.

        Args:
            request_id: the id in `GenerationStarted`.
            timeout: deadline in seconds, instead of the client's; infinity for none.

        Raises:
            NotFoundError: it was in another mode, of one token, or too long ago; or it is another caller's.
        """
        return self._run(self._calls.audit(request_id, timeout))

    def decisions(self, request_id: str, *, timeout: float | None = None) -> RecordedDecisions:
        """Returns the recorded decisions of one of this caller's latest requests, once it is over.

        Args:
            request_id: the id in `GenerationStarted`.
            timeout: deadline in seconds, instead of the client's; infinity for none.

        Raises:
            NotFoundError: the server does not hold it, or it is another caller's.
        """
        return self._run(self._calls.decisions(request_id, timeout))

    def health(self, *, timeout: float | None = None) -> HealthStatus:
        """Returns the server's present state. This call is never retried.

        Raises:
            UnavailableError: there is no server.
        """
        return self._run(self._calls.health(timeout))

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Waits until the server is serving; the server may be started after this call.

        Raises:
            UnavailableError: it is not serving after `timeout` seconds; the message names its last state.
        """
        wait = Readiness(self.target, timeout)
        while True:
            seconds = wait.next_timeout()
            try:
                if wait.saw(self.health(timeout=seconds)):
                    return
            except (UnavailableError, DeadlineExceededError) as error:
                wait.failed(error)
            time.sleep(wait.pause())

    def _opened(self) -> Any:
        """Returns the channel."""
        if self._is_closed:
            raise closed_error()
        return self._channel

    def _method(self, call: Call[Any]) -> Any:
        """Returns gRPC's method for a call. It takes and returns bytes; the call interprets them."""
        channel = self._opened()
        if call.path not in self._methods:
            self._methods[call.path] = channel.unary_unary(call.path)
        return self._methods[call.path]

    def _send(self, method: Any, call: Call[Any]) -> Any:
        try:
            return method(call.request, timeout=call.timeout, metadata=call.metadata)
        except ValueError:
            # gRPC raises ValueError if another thread closed the channel since the check.
            if self._is_closed:
                raise closed_error() from None
            raise

    def _run(self, call: Call[Answer]) -> Answer:
        method = self._method(call)
        return self._answer(call, lambda: self._send(method, call))

    def _answer(self, call: Call[Answer], wait: Any) -> Answer:
        try:
            return call.read(wait())
        except grpc.RpcError as error:
            raise call.failed(error) from None
        except grpc.FutureCancelledError:
            raise call.cancelled() from None

    def _open_session(self, requests: Iterator[bytes]) -> Any:
        call = self._calls.session(requests)
        return self._send(self._opened().stream_stream(call.path), call)

    def _start(self, call: StreamCall) -> GenerationStream:
        return GenerationStream(self._send(self._opened().unary_stream(call.path), call), StreamState(call))
