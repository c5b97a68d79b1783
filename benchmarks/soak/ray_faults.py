"""Three workers on two nodes of a Ray cluster; every while a fault: an actor killed, a worker stopped, a node lost and
another added, a connection cut.

The workers are fakes that echo their prompts, so each answer's tokens are known. Needs the extra `ray`, and root to cut
connections.
"""

import asyncio
import itertools
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from benchmarks.soak.callers import Sessions, callers_of, whole_answer
from benchmarks.soak.report import Finding, finding
from benchmarks.soak.service import Outcomes, Service, running_service
from dash_api.v1 import model_pb2, model_pb2_grpc
from tests.ray_cluster import actor_of, add_node, ray_cluster, worker_processes
from tests.server.server_harness import FAKE_WORKER, fake_model, generation_request, write_model_folder

_WORKERS = 3
_CPUS_OF_WORKER, _CPUS_OF_NODE = 2, 6
_WORDS = ("tide", "harbour", "lantern", "orchard", "saddle", "thimble")
# Few texts: a tokenizer remembers 10,000 words, which for this one are whole texts, and would seem to leak until then.
_TEXTS = [" ".join(words) for words in itertools.islice(itertools.permutations(_WORDS), 200)]


async def run(seconds: float = 600, seconds_between: float = 20, num_streams: int = 48) -> list[Finding]:
    """Runs the load and the faults."""
    if find_spec("ray") is None:
        return [finding("Ray", "installed: pip install 'dash-llm[ray]'", "not installed", False)]
    outcomes, num_wrong = Outcomes.begin(), 0
    faults: list[str] = []
    sizes: list[int] = []
    with ray_cluster(_CPUS_OF_NODE) as cluster, tempfile.TemporaryDirectory() as folder:
        variables = {
            "model": fake_model(write_model_folder(Path(folder) / "model"), token_seconds=0.02),
            "ray_address": cluster.address,
            "worker_host": "127.0.0.1",
            "num_threads": _CPUS_OF_WORKER,
            "workers": _WORKERS,
            "slots": 16,
            "worker_timeout_seconds": 5,
        }
        async with running_service(Path(folder), worker_command=FAKE_WORKER, **variables) as service:
            await _wait_for_workers(service)

            async def request(rng: random.Random, source: Service | Sessions) -> None:
                nonlocal num_wrong
                text, number = rng.choice(_TEXTS), rng.randint(4, 200)
                parameters = generation_request(text=text, max_new_tokens=number).parameters
                answer = "".join(message.delta.text for message in await whole_answer(source.stream(parameters)))
                num_wrong += answer != "".join(itertools.islice(itertools.cycle(text), number))

            until, names = time.monotonic() + seconds, _faults(cluster)
            async with callers_of(service, num_streams, "ray", request, outcomes):
                while time.monotonic() < until:
                    await asyncio.sleep(seconds_between)
                    sizes.append(psutil.Process(service.server.process.pid).memory_info().rss)
                    faults.append(next(names)())  # here, since Ray adds nodes in the main thread only
                await asyncio.sleep(2)  # until the last fault is noticed
                restored = await _wait_for_workers(service)
            code, log = await asyncio.to_thread(service.server.end, signal.SIGTERM)
        num_left = len(worker_processes())
    growth = sizes[-1] / sizes[len(sizes) // 3] - 1
    return [
        finding(f"{sum(outcomes.codes.values())} requests in {seconds:g} s, with {len(faults)} faults "
                f"({_counted(faults)})", "each ends in a result or UNAVAILABLE", outcomes,
                set(outcomes.codes) <= {"OK", "UNAVAILABLE"}),
        finding("results whose tokens are not the model's", "0", num_wrong, num_wrong == 0),
        finding("all workers again after the last fault", f"< {_RESTORED_SECONDS:g} s", f"{restored:.0f} s",
                restored < _RESTORED_SECONDS),
        finding("memory of the server, growth over the last two thirds", "< 5 %",
                f"{growth:+.1%}; before each fault, in MB: " + ", ".join(f"{size / 1e6:.0f}" for size in sizes),
                growth < 0.05),
        finding("exit code, tracebacks in the log, workers left", "0, 0 and 0",
                f"{code}, {log.count('Traceback')} and {num_left}",
                code == 0 and "Traceback" not in log and num_left == 0),
    ]  # fmt: skip


_RESTORED_SECONDS = 60.0


def _faults(cluster: Any) -> Iterator[Callable[[], str]]:
    """Yields faults, in turn. Each returns its name."""
    rng = random.Random(1)

    def victim() -> psutil.Process:
        return rng.choice(worker_processes())

    def kill_an_actor() -> str:
        actor_of(victim()).kill()
        return "actor killed"

    def stop_a_worker() -> str:
        victim().send_signal(signal.SIGSTOP)
        return "worker stopped"

    def lose_a_node() -> str:
        cluster.remove_node(rng.choice(sorted(cluster.worker_nodes, key=id)), allow_graceful=False)
        add_node(cluster, _CPUS_OF_NODE)
        return "node lost"

    def cut_a_connection() -> str:
        (connection,) = (one for one in victim().net_connections("tcp") if one.status == psutil.CONN_ESTABLISHED)
        ends = ["src", connection.laddr.ip, "sport", "=", str(connection.laddr.port)]
        subprocess.run(["ss", "--kill", "--tcp", *ends], capture_output=True, check=True)
        return "connection cut"

    may_cut = shutil.which("ss") is not None and os.geteuid() == 0
    yield from itertools.cycle([kill_an_actor, stop_a_worker, lose_a_node, *([cut_a_connection] if may_cut else [])])


async def _wait_for_workers(service: Service) -> float:
    """Returns the seconds until all workers are there."""
    stub, started = model_pb2_grpc.ModelServiceStub(service.channel), time.monotonic()
    while (await stub.GetLoad(model_pb2.GetLoadRequest())).worker_count < _WORKERS:
        if time.monotonic() - started > 2 * _RESTORED_SECONDS:
            break
        await asyncio.sleep(0.2)
    return time.monotonic() - started


def _counted(names: list[str]) -> str:
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
