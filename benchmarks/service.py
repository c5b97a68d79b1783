"""The service as a whole: how soon a warm start serves, and what it holds in memory with a full cache."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from benchmarks.figures import Figure
from dash_client import DashClient

CACHE_TOKENS = 8192
_NUM_REQUESTS = 4
_NEW_TOKENS = 8
_DEADLINE_SECONDS = 300


def measure_service(starts: int) -> tuple[list[Figure], list[str]]:
    """Starts the server `starts` times; the model is converted and calibrated before."""
    _run_once()
    seconds, gigabytes = zip(*(_run_once() for _ in range(starts)), strict=True)
    figures = [
        Figure.of("warm_start_seconds", seconds, "≤ 15"),
        Figure.of("rss_gb", gigabytes, "≤ 1.5"),
    ]
    note = (
        f"service: from exec to health SERVING, {starts} starts; RSS of server and worker with a cache of "
        f"{CACHE_TOKENS} tokens that {_NUM_REQUESTS} requests have filled"
    )
    return figures, [note]


def _run_once() -> tuple[float, float]:
    """Seconds to SERVING, and gigabytes of server and worker while the cache is full."""
    with tempfile.TemporaryDirectory() as folder:
        port_file = Path(folder) / "port"
        environment = os.environ | {
            "DASH_PORT": "0",
            "DASH_PORT_FILE": str(port_file),
            "DASH_CACHE_TOKENS": str(CACHE_TOKENS),
            "DASH_LOG_LEVEL": "ERROR",
        }
        started = time.perf_counter()
        server = subprocess.Popen(
            [sys.executable, "-m", "dash_server.main"], env=environment, stderr=subprocess.DEVNULL
        )
        try:
            while not port_file.exists():
                if server.poll() is not None or time.perf_counter() - started > _DEADLINE_SECONDS:
                    raise RuntimeError("the server did not start; run `make serve` to see why")
                time.sleep(0.05)
            with DashClient(f"localhost:{port_file.read_text().strip()}") as client:
                client.wait_until_ready(timeout=_DEADLINE_SECONDS)
                seconds = time.perf_counter() - started
                return seconds, _rss_gb_while_full(client, server)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)


def _rss_gb_while_full(client: DashClient, server: "subprocess.Popen[bytes]") -> float:
    prompt = [1000] * (CACHE_TOKENS // _NUM_REQUESTS - _NEW_TOKENS)
    process = psutil.Process(server.pid)
    largest = 0.0
    with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
        running = [
            pool.submit(client.generate, prompt, max_new_tokens=_NEW_TOKENS, ignore_eos=True, timeout=_DEADLINE_SECONDS)
            for _ in range(_NUM_REQUESTS)
        ]
        while not all(request.done() for request in running):
            resident = sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
            largest = max(largest, resident / 1e9)
            time.sleep(0.1)
        for request in running:
            request.result()
    return largest
