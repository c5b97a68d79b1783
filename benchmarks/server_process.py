"""Runs a server as a process of its own. Knows how to start and stop it; knows no figures."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from dash_client import DashClient
from dash_server.main import WORKER_COMMAND

CACHE_TOKENS = 8192
DEADLINE_SECONDS = 600


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A serving server. `start_seconds` is the time from exec to health SERVING."""

    client: DashClient
    start_seconds: float
    pid: int

    def resident_gb(self) -> float:
        """Returns the resident memory of the server and its worker."""
        return sum(own.memory_info().rss for own in self._processes()) / 1e9

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stops the server and its worker inside the block, except while `awake`: an idle worker measures its costs."""
        self._stop()
        try:
            yield
        finally:
            self._go_on()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Lets a stopped server run inside the block."""
        self._go_on()
        try:
            # Its connection may have timed out.
            self.client.wait_until_ready(timeout=DEADLINE_SECONDS)
            yield
        finally:
            self._stop()

    def _stop(self) -> None:
        for own in self._processes():
            own.suspend()

    def _go_on(self) -> None:
        for own in reversed(self._processes()):
            own.resume()

    def _processes(self) -> list[psutil.Process]:
        process = psutil.Process(self.pid)
        return [process, *process.children(recursive=True)]


@contextmanager
def running_server(worker_command: Sequence[str] = WORKER_COMMAND, **variables: str) -> Iterator[RunningServer]:
    """Starts a server with torch's number of threads here and these variables, and stops it afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        port_file = Path(folder) / "port"
        environment = os.environ | {
            "DASH_PORT": "0",
            "DASH_PORT_FILE": str(port_file),
            "DASH_CACHE_TOKENS": str(CACHE_TOKENS),
            "DASH_DEVICE": "cpu",
            "DASH_PROMPT_LOOKUP": "false",
            "DASH_PREFIX_CACHE_TOKENS": "0",
            "DASH_NUM_THREADS": str(torch.get_num_threads()),
            "DASH_LOG_LEVEL": "ERROR",
            "DASH_MEASURE_FIRST": "true",
            **variables,
        }
        started = time.perf_counter()
        program = f"import sys; from dash_server.main import main; sys.exit(main({tuple(worker_command)}))"
        command = [sys.executable, "-c", program]
        server = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        try:
            while not port_file.exists():
                if server.poll() is not None or time.perf_counter() - started > DEADLINE_SECONDS:
                    raise RuntimeError("the server did not start; run `make serve` to see why")
                time.sleep(0.05)
            with DashClient(f"localhost:{port_file.read_text().strip()}") as client:
                client.wait_until_ready(timeout=DEADLINE_SECONDS)
                yield RunningServer(client, time.perf_counter() - started, server.pid)
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(timeout=60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
