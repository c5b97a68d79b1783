"""A Ray cluster of one machine: a head without CPUs, and nodes that workers are placed on."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

STORE_BYTES = 80 * 1024 * 1024
CONTROL_STORE_SECONDS = 6
"""How long Ray's nodes wait for a control store that is gone."""


@contextmanager
def ray_cluster(cpus_of_node: int, num_nodes: int = 2) -> Iterator[Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = str(CONTROL_STORE_SECONDS)  # noqa: SIM112 - Ray's name
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the nodes' Python
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(num_nodes):
        add_node(cluster, cpus_of_node)
    try:
        yield cluster
    finally:
        cluster.shutdown()
        stop = [sys.executable, "-m", "ray.scripts.scripts", "stop", "--force"]
        subprocess.run(stop, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)


def add_node(cluster: Any, num_cpus: int) -> Any:
    return cluster.add_node(num_cpus=num_cpus, object_store_memory=STORE_BYTES)


def worker_processes() -> list[psutil.Process]:
    """Returns the processes of workers that connect by TCP."""
    return [process for process in psutil.process_iter() if "--connect" in command_of(process)]


def command_of(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def actor_of(worker: psutil.Process) -> psutil.Process:
    """Returns the process of the Ray actor that started the worker."""
    actor = worker.parent()
    assert actor is not None
    assert "WorkerActor" in " ".join(command_of(actor))
    return actor
