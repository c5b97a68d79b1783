"""A real server process for tests, and a client for it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from dash_client import DashClient, UnavailableError
from tests.server.server_harness import workers_of

TOKEN = "the-adapters-token-long-enough"
SERVER = (sys.executable, "-m", "dash_server.main")


def cache_of_run(folder: Path) -> Path:
    """Returns the cache folder that all servers of a test run share, so that only the first of them calibrates.

    `folder` is a temporary folder of pytest's. They lie side by side; those of each of xdist's processes in one more.
    """
    of_process = folder.parent
    return (of_process.parent if "PYTEST_XDIST_WORKER" in os.environ else of_process) / "cache"


def server_environment(folder: Path, model: Path, **variables: str) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("DASH_")},
        "DASH_MODEL": str(model),
        "DASH_CACHE_FOLDER": str(cache_of_run(folder)),
        "DASH_PORT": "0",
        "DASH_PORT_FILE": str(folder / "port"),
        # A worker would measure whenever it is idle, and take the time of the tests beside it.
        "DASH_CHECK_COSTS": "false",
        "DASH_MEASURE_FIRST": "true",
        **variables,
    }


REPEATABLE = {
    "DASH_NUM_THREADS": "1",
    "DASH_NATIVE": "off",
    "DASH_PRECISION": "float32",
    "DASH_PROMPT_LOOKUP": "false",
}
"""For servers whose answers and decisions are compared: compiled, and in bfloat16, what else is in a step may round
otherwise, and a random model's tokens change with the last bit. A pass that looks ahead in the text asks no policy, and
does so where that is faster by what the machine measured."""


class Service:
    """A running server and a client for it. `prefix` is a command that starts it."""

    ready_seconds = 240.0

    def __init__(self, folder: Path, model: Path, prefix: Sequence[str] = (), **variables: str) -> None:
        self.log = folder / "log"
        with self.log.open("w") as log:
            environment = server_environment(folder, model, **variables)
            self.process = subprocess.Popen([*prefix, *SERVER], env=environment, stderr=log)
        port_file = folder / "port"
        deadline = time.monotonic() + 60
        while not port_file.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        self.client = DashClient(f"localhost:{port_file.read_text().strip()}")
        try:
            self.client.wait_until_ready(timeout=self.ready_seconds)
        except UnavailableError:
            self.stop()
            raise

    def workers(self) -> list[psutil.Process]:
        return workers_of(self.process.pid)

    def stop(self) -> int:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)
