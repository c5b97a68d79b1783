"""A first start as processes: it answers before it has compiled. A tiny model, and a compiler that never ends."""

import os
import time
from pathlib import Path

import psutil

from tests.e2e.service import Service
from tests.runtime.native_code import NATIVE_SIZES
from tests.tiny_models import save_tiny_model

COMPILER = ["sleep", "600"]


def compilers_of(service: Service) -> list[psutil.Process]:
    """Returns the processes that compile for a worker."""
    processes = psutil.Process(service.process.pid).children(recursive=True)
    return [process for process in processes if process.cmdline() == COMPILER]


def test_a_first_start_answers_while_a_second_worker_compiles_and_a_drain_ends_both(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama", **NATIVE_SIZES)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "g++").write_text(f"#!/bin/sh\nexec {' '.join(COMPILER)}\n")
    (programs / "g++").chmod(0o755)
    service = Service(
        tmp_path,
        model,
        DASH_CACHE_FOLDER=str(tmp_path / "cache"),
        DASH_NUM_THREADS="1",
        PATH=f"{programs}{os.pathsep}{os.environ['PATH']}",
    )
    try:
        assert service.client.model_info().is_compiling
        deadline = time.monotonic() + 120
        while not compilers_of(service):
            assert time.monotonic() < deadline, service.log.read_text()
            time.sleep(0.05)
        answer = service.client.generate("at once", max_new_tokens=9, ignore_eos=True, compute_budget=0.01)
        assert len(answer.token_ids) == 9
        assert len(service.workers()) == 2
        assert service.client.model_info().is_compiling
        processes = psutil.Process(service.process.pid).children(recursive=True)
    finally:
        assert service.stop() == 0, service.log.read_text()
    psutil.wait_procs(processes, timeout=10)
    assert not any(process.is_running() for process in processes)
