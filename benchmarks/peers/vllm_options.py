"""The options with which vLLM runs here. Knows its names for them; starts nothing."""

import itertools
import os
import socket
from collections.abc import Mapping
from pathlib import Path


def vllm_variables(python: Path, num_threads: int) -> Mapping[str, str]:
    """Returns the environment in which vLLM is fastest: each thread on a processor of its own, and Intel's OpenMP."""
    home = python.parents[1]
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[:num_threads])),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "LD_PRELOAD": str(home / "lib" / "libiomp5.so"),
        # The engine's core would be a process of its own. `vllm serve` makes it one nevertheless.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # vllm-cpu 0.32 writes whole compiled models and cannot read them: each start would compile anew.
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_CACHE_ROOT": str(home / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(home / "cache" / "inductor"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def serve_arguments(model: str, port: int, max_sequences: int, max_length: int) -> list[str]:
    """Returns the arguments of Python for what `vllm serve` runs; what that logs of each request is turned off.

    The command itself looks for a package called vllm and does not find vllm-cpu.
    """
    options = {
        "--model": model,
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": "bfloat16",
        "--max-num-seqs": str(max_sequences),
        "--max-model-len": str(max_length),
    }
    quiet = ("--disable-log-stats", "--disable-uvicorn-access-log")
    return ["-m", "vllm.entrypoints.openai.api_server", *itertools.chain(*options.items()), *quiet]


def free_port() -> int:
    """Returns a port that nobody listens on now."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port: int = chosen.getsockname()[1]
        return port
