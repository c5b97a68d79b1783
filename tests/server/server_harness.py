"""A real server on a real socket with the fake worker, inside the test or as a process of its own."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlencode

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenizers import Tokenizer

from dash_api.v1 import common_pb2, generation_pb2, generation_pb2_grpc, model_pb2_grpc
from dash_server.server import DashServer
from dash_server.settings import Settings
from dash_server.worker.process import LocalStarter
from dash_server.worker.starter import WorkerStarter
from tests.server import fake_worker
from tests.tiny_models import byte_tokenizer

FAKE_WORKER = (sys.executable, fake_worker.__file__)
CHAT_TEMPLATE = """
{%- set form_of_calls = '<tool_call>' %}
{%- for tool in tools or () %}{{- (tool | tojson) + '\\n' }}{%- endfor %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def toy_tokenizer() -> Tokenizer:
    """A byte tokenizer with the special tokens of the toy model."""
    return byte_tokenizer("<|im_start|>", "<|im_end|>", "<|probe|>")


def write_model_folder(folder: Path) -> Path:
    """Writes a folder with all that the server reads of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    toy_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return folder


def fake_model(folder: Path, **options: object) -> str:
    """Returns the model setting for a fake worker with these options."""
    return "fake?" + urlencode({"folder": str(folder), **options})


def write_tokens(folder: Path, **callers: str) -> Path:
    """Writes a token file with callers and their tokens."""
    path = folder / "tokens.toml"
    path.write_text("".join(f'[{name}]\ntoken = "{token}"\n' for name, token in callers.items()))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class RunningServer:
    """A server and stubs for it."""

    server: DashServer
    worker: asyncio.Task[None]
    port: int
    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.model = model_pb2_grpc.ModelServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    async def is_serving(self, service: str = "") -> bool:
        response = await self.health.Check(health_pb2.HealthCheckRequest(service=service))
        return response.status == health_pb2.HealthCheckResponse.SERVING

    async def wait_until_serving(self, is_serving: bool = True) -> None:
        async with asyncio.timeout(30):
            while await self.is_serving() != is_serving:
                await asyncio.sleep(0.01)

    async def generate(
        self, timeout: float | None = None, token: str | None = None, **parameters: Any
    ) -> generation_pb2.GenerateResponse:
        request = generation_request(**parameters)
        return await self.generation.Generate(request, timeout=timeout, metadata=bearer(token))

    def stream(
        self, timeout: float | None = None, token: str | None = None, **parameters: Any
    ) -> grpc.aio.UnaryStreamCall:
        request = generation_pb2.StreamGenerateRequest(parameters=generation_request(**parameters).parameters)
        return self.generation.StreamGenerate(request, timeout=timeout, metadata=bearer(token))

    async def probe(self) -> "WorkerState":
        """Returns the counts of the fake worker, this request not included."""
        response = await self.generate(token_ids=common_pb2.TokenIds(ids=[fake_worker.PROBE_TOKEN_ID]))
        return WorkerState(*response.output.token_ids)

    async def wait_until_inside(self, num_running: int, num_waiting: int) -> None:
        """Waits until this many requests are at the worker and in the queue, by the server's own count."""
        async with asyncio.timeout(30):
            while self.counts != (num_running, num_waiting):
                await asyncio.sleep(0.005)

    @property
    def counts(self) -> tuple[int, int]:
        """Requests running and waiting."""
        return self.server.dispatcher.num_running, self.server.dispatcher.num_waiting

    async def wait_for_live_requests(self, number: int) -> "WorkerState":
        async with asyncio.timeout(30):
            while (state := await self.probe()).num_live != number:
                await asyncio.sleep(0.01)
        return state


@dataclass(frozen=True)
class WorkerState:
    """The worker's running requests, and counts of the messages that it got."""

    num_live: int
    num_submits: int
    num_cancels: int
    num_stops: int


def bearer(token: str | None) -> tuple[tuple[str, str], ...] | None:
    """Returns metadata with a token."""
    return None if token is None else (("authorization", f"Bearer {token}"),)


def generation_request(
    max_new_tokens: int | None = None, stop_strings: tuple[str, ...] = (), **parameters: Any
) -> generation_pb2.GenerateRequest:
    request = generation_pb2.GenerateRequest(parameters=generation_pb2.GenerationParameters(**parameters))
    if max_new_tokens is not None:
        request.parameters.stopping.max_new_tokens = max_new_tokens
    request.parameters.stopping.stop_strings.extend(stop_strings)
    return request


def open_channel(port: int, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
    """A channel with a connection of its own."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    if credentials is None:
        return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)
    return grpc.aio.secure_channel(f"localhost:{port}", credentials, options=options)


@asynccontextmanager
async def running_server(
    model: str,
    *,
    wait: bool = True,
    credentials: grpc.ChannelCredentials | None = None,
    worker_command: Sequence[str] = FAKE_WORKER,
    starter: WorkerStarter | None = None,
    clock: Callable[[], float] = time.monotonic,
    **settings: Any,
) -> AsyncIterator[RunningServer]:
    """Runs a server in this process, on a free port. Waits until it serves, unless `wait` is off."""
    chosen = Settings(model=model, **{"port": 0, "shutdown_grace_seconds": 5, "measure_first": True, **settings})
    server = DashServer(chosen, starter or LocalStarter(worker_command), clock)
    port = await server.start()
    worker = asyncio.create_task(server.run_workers())
    channel = open_channel(port, credentials)
    running = RunningServer(server, worker, port, channel)
    try:
        if wait:
            await running.wait_until_serving()
        yield running
    finally:
        await channel.close()
        await server.close()
        worker.cancel()
        await asyncio.wait([worker])


@dataclass
class ServerProcess:
    """A `dash-server` process."""

    process: subprocess.Popen[bytes]
    port_file: Path
    log: Path
    """The file with its stderr. A pipe that nobody reads would stop the process."""

    def wait_for_port(self) -> int:
        deadline = time.monotonic() + 30
        while not self.port_file.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return int(self.port_file.read_text())

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Sends the signal, and returns the exit code and stderr."""
        self.process.send_signal(number)
        return self.outcome()

    def outcome(self, seconds: float = 20) -> tuple[int, str]:
        """Waits for the end, and returns the exit code and stderr."""
        return self.process.wait(seconds), self.log.read_text()

    def workers(self) -> list[psutil.Process]:
        """Returns its worker processes."""
        return workers_of(self.process.pid)


def workers_of(server: int) -> list[psutil.Process]:
    """Returns the worker processes of a server process: its children that do not check grammars."""
    return [own for own in psutil.Process(server).children() if not _checks_grammars(own)]


def _checks_grammars(process: psutil.Process) -> bool:
    try:
        return "dash_server.grammar_check" in process.cmdline()
    except psutil.Error:  # it has ended
        return False


@contextmanager
def server_process(
    tmp_path: Path,
    *,
    worker_command: Sequence[str] = FAKE_WORKER,
    before_exit: str = "pass",
    arguments: Sequence[str] = (),
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
    **variables: object,
) -> Iterator[ServerProcess]:
    """Starts `dash-server` with the fake worker and these variables. `before_exit` is Python to run at its end,
    `prefix` a command that runs the one after it in its place, `environment` variables that are not ours."""
    command = tuple(worker_command)
    program = f"import sys; from dash_server.main import main; code = main({command}); {before_exit}; sys.exit(code)"
    port_file = tmp_path / "port"
    others = {name: value for name, value in os.environ.items() if not name.startswith("DASH_")} | dict(environment)
    given = {"port": 0, "port_file": port_file, **variables}
    own = {f"DASH_{name.upper()}": str(value) for name, value in given.items()}
    log = tmp_path / "stderr"
    with log.open("wb") as stderr:
        words = [*prefix, sys.executable, "-c", program, *arguments]
        process = subprocess.Popen(words, env=others | own, stderr=stderr)
    with process:
        try:
            yield ServerProcess(process, port_file, log)
        finally:
            process.kill()
