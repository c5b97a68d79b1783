"""Measures the whole service: the time of a warm start, and its memory with a full cache."""

import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks.figures import Report
from benchmarks.rounds import Effort, progress
from benchmarks.server_process import CACHE_TOKENS, DEADLINE_SECONDS, RunningServer, running_server
from dash_runtime.config import EngineConfig

_NUM_REQUESTS = 4
_NEW_TOKENS = 8


def measure_service(report: Report, effort: Effort) -> None:
    """Starts the server several times, after a first start has converted, compiled and calibrated the model."""
    progress("service: first start")
    with running_server():
        pass
    seconds, gigabytes = [], []
    for number in range(effort.starts):
        progress(f"service: start {number + 1} of {effort.starts}")
        with running_server(DASH_PREFIX_CACHE_TOKENS=str(EngineConfig().prefix_cache_tokens)) as server:
            seconds.append(server.start_seconds)
            gigabytes.append(_gb_while_full(server))
    report.add("warm_start_seconds", seconds, "≤ 5")
    report.add("rss_gb", gigabytes, "≤ 0.9")
    report.note(
        f"service: from exec to health SERVING, {effort.starts} starts; RSS of server and worker with a cache of "
        f"{CACHE_TOKENS} tokens that {_NUM_REQUESTS} requests have filled"
    )


def _gb_while_full(server: RunningServer) -> float:
    prompt = [1000] * (CACHE_TOKENS // _NUM_REQUESTS - _NEW_TOKENS)
    largest = 0.0
    with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
        running = [
            pool.submit(
                server.client.generate, prompt, max_new_tokens=_NEW_TOKENS, ignore_eos=True, timeout=DEADLINE_SECONDS
            )
            for _ in range(_NUM_REQUESTS)
        ]
        while not all(request.done() for request in running):
            largest = max(largest, server.resident_gb())
            time.sleep(0.1)
        for request in running:
            request.result()
    return largest
