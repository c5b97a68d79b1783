"""Breaks what a server stands on, one thing after another, while callers go on: worker, disk, certificates, collector.

Each fault is a function that returns its findings. The disk's need user namespaces, to mount a disk of their own.
"""

import asyncio
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.soak.callers import Sessions, callers, callers_of, whole_answer
from benchmarks.soak.mixed_requests import mixed_request
from benchmarks.soak.report import Finding, finding
from benchmarks.soak.service import Outcomes, ServerEnded, Service, model_variables, running_service
from tests.server.authority import Authority
from tests.server.server_harness import open_channel

_CALLERS = 12

Fault = Callable[[Path, Path | None, float], Coroutine[Any, Any, list[Finding]]]


async def run(tiny_model: Path | None = None, only: Sequence[str] = (), pace: float = 1.0) -> list[Finding]:
    """Runs all faults, or those that are named, with the embedded model or a tiny one; `pace` times as long."""
    findings: list[Finding] = []
    for name, fault in FAULTS.items():
        if not only or name in only:
            with tempfile.TemporaryDirectory() as folder:
                findings += await fault(Path(folder), tiny_model, pace)
    return findings


@asynccontextmanager
async def _callers(service: Service, tiny_model: Path | None, outcomes: Outcomes) -> AsyncIterator[None]:
    async def request(rng: random.Random, source: Service | Sessions) -> None:
        await whole_answer(source.stream(mixed_request(rng, is_tiny=tiny_model is not None)))

    async with callers_of(service, _CALLERS, "chaos", request, outcomes):
        yield


def _ends(what: str, outcomes: Outcomes, allowed: set[str], code: int, log: str) -> list[Finding]:
    ends = set(outcomes.codes)
    must = "each ends in a result" + "".join(f" or {own}" for own in sorted(allowed))
    return [
        finding(f"{what}: {sum(outcomes.codes.values())} requests", must, outcomes,
                "OK" in ends and ends <= {"OK", *allowed}),
        finding(f"{what}: exit code, tracebacks in the log", "0 and 0", f"{code} and {log.count('Traceback')}",
                code == 0 and "Traceback" not in log),
    ]  # fmt: skip


async def _serve(what: str, folder: Path, tiny_model: Path | None, seconds: float, **options: Any) -> list[Finding]:
    """Serves callers for some seconds with these options, and returns how they and the server ended."""
    outcomes = Outcomes.begin()
    try:
        async with running_service(folder, **options) as service:
            async with _callers(service, tiny_model, outcomes):
                await asyncio.sleep(seconds)
            code, log = await asyncio.to_thread(service.server.end, signal.SIGTERM)
    finally:
        (folder / "port").unlink(missing_ok=True)
    return _ends(what, outcomes, set(), code, log)


async def _stopped_worker(folder: Path, tiny_model: Path | None, pace: float) -> list[Finding]:
    """SIGSTOP in the middle of streams, with the default limit of silence."""
    outcomes = Outcomes.begin()
    async with running_service(folder, **model_variables(tiny_model, str(folder))) as service:
        async with _callers(service, tiny_model, outcomes):
            await asyncio.sleep(2 * pace)
            (worker,) = service.server.workers()
            stopped = time.monotonic()
            worker.suspend()
            await service.wait_until_serving(False)
            noticed = time.monotonic() - stopped
            await service.wait_until_serving()
            restored = time.monotonic() - stopped
            await asyncio.sleep(1)
        code, log = await asyncio.to_thread(service.server.end, signal.SIGTERM)
    return [
        finding("a worker stopped in mid-stream: noticed, served again", "< 10 s, at all",
                f"{noticed:.1f} s, {restored:.1f} s", noticed < 10),
        *_ends("a worker stopped in mid-stream", outcomes, {"UNAVAILABLE"}, code, log),
    ]  # fmt: skip


async def _killed_while_draining(folder: Path, tiny_model: Path | None, pace: float) -> list[Finding]:
    """The only worker dies while its server waits for the last answers."""
    outcomes = Outcomes.begin()
    variables = model_variables(tiny_model, str(folder)) | {"shutdown_grace_seconds": 60}
    async with running_service(folder, **variables) as service, _callers(service, tiny_model, outcomes):
        await asyncio.sleep(2 * pace)
        (worker,) = service.server.workers()
        service.server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.05)
        os.kill(worker.pid, signal.SIGKILL)
        killed = time.monotonic()
        code, log = await asyncio.to_thread(service.server.outcome, 60.0)
        took = time.monotonic() - killed
    return [
        finding("a worker killed while draining: the server ends", "< 10 s, not after its grace of 60 s",
                f"after {took:.1f} s", took < 10),
        *_ends("a worker killed while draining", outcomes, {"UNAVAILABLE", "CANCELLED"}, code, log),
    ]  # fmt: skip


async def _rotated_certificates(folder: Path, tiny_model: Path | None, pace: float) -> list[Finding]:
    """New certificates, in two writes as any tool makes them, while callers make connection after connection."""
    authority = Authority(folder)
    credentials = authority.credentials()
    variables = authority.settings() | model_variables(tiny_model, str(folder))
    rotations = round(12 * pace)
    outcomes, connecting = Outcomes.begin(), Outcomes.begin()
    async with running_service(folder, credentials, **variables) as service:

        async def connect(rng: random.Random) -> None:
            async with open_channel(service.port, credentials) as channel:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)

        async with _callers(service, tiny_model, outcomes), callers(4, "tls", connect, connecting):
            for _ in range(rotations):
                await asyncio.sleep(1.2)
                authority.renew()
        code, log = await asyncio.to_thread(service.server.end, signal.SIGTERM)
    return [
        finding(f"certificates renewed {rotations} times: {sum(connecting.codes.values())} new connections",
                "all are made", connecting, set(connecting.codes) == {"OK"}),
        *_ends("certificates renewed", outcomes, set(), code, log),
    ]  # fmt: skip


async def _silent_collector(folder: Path, tiny_model: Path | None, pace: float) -> list[Finding]:
    """A collector that accepts connections, and never says a word."""
    outcomes = Outcomes.begin()
    with socket.create_server(("127.0.0.1", 0)) as collector:
        endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.getsockname()[1]}"}
        variables = {"trace_ratio": 1, **model_variables(tiny_model, str(folder))}
        async with running_service(folder, environment=endpoint, **variables) as service:
            async with _callers(service, tiny_model, outcomes):
                await asyncio.sleep(8 * pace)
            ended = time.monotonic()
            code, log = await asyncio.to_thread(service.server.end, signal.SIGTERM)
            took = time.monotonic() - ended
    return [
        finding("a collector that never answers: the server ends", "< 10 s", f"after {took:.1f} s", took < 10),
        *_ends("a collector that never answers", outcomes, set(), code, log),
    ]  # fmt: skip


def can_mount() -> bool:
    """True if disks can be mounted here for one process alone."""
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(["unshare", "-rm", "true"], stderr=subprocess.DEVNULL).returncode
    )


def _on_a_disk(*mounts: str) -> Fault:
    """Returns the fault of a cache folder on a disk of its own, mounted in each of these ways: a start that has to
    convert a model there is refused in a line, and everything else goes on without a cache."""

    async def fault(folder: Path, tiny_model: Path | None, pace: float) -> list[Finding]:
        if not can_mount():
            return [finding("a disk for the cache", "user namespaces, to mount one", "none here", False)]
        findings = []
        disk = folder / "cache"
        disk.mkdir()
        variables = model_variables(tiny_model, str(folder)) | {"cache_folder": disk}
        for mount in mounts:
            mounting = f'mount -t tmpfs -o {mount} none "$0" && exec "$@"'
            prefix = ("unshare", "-rm", "sh", "-c", mounting, str(disk))
            what = f"a cache on a disk with {mount}"
            try:
                findings += await _serve(what, folder, tiny_model, 4 * pace, prefix=prefix, **variables)
            except ServerEnded as ended:
                lines = ended.log.strip().splitlines()
                is_told = "cannot be converted" in lines[-1] and "Traceback" not in ended.log
                findings.append(finding(f"{what}, for a model that has to be converted",
                                        "refused in a line, exit code 2", f"exit code {ended.code}: {lines[-1]}",
                                        ended.code == 2 and is_told))  # fmt: skip
        return findings

    return fault


async def _damaged_native_code(folder: Path, tiny_model: Path | None, pace: float) -> list[Finding]:
    """Native code that was cut off or changed while no server ran. A tiny model has none."""
    cache = folder / "cache"
    variables = model_variables(tiny_model, str(folder)) | {"cache_folder": cache}
    findings = await _serve("native code made by the first start", folder, tiny_model, pace, **variables)
    (library,) = (cache / "native").glob("*.zip")
    whole = library.read_bytes()
    changed = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    for damage, left in {"empty": b"", "cut in half": whole[: len(whole) // 2], "changed in a byte": changed}.items():
        library.write_bytes(left)
        findings += await _serve(f"native code that is {damage}", folder, tiny_model, pace, **variables)
        is_whole = zipfile.ZipFile(library).testzip() is None
        findings.append(finding(f"native code that is {damage}", "made anew", "whole again" if is_whole else "damaged",
                                is_whole))  # fmt: skip
    return findings


FAULTS: dict[str, Fault] = {
    "stopped-worker": _stopped_worker,
    "killed-while-draining": _killed_while_draining,
    "rotated-certificates": _rotated_certificates,
    "silent-collector": _silent_collector,
    "read-only-disk": _on_a_disk("ro"),
    "full-disk": _on_a_disk("size=64k"),
    "small-disk": _on_a_disk("size=1m", "size=100m", "size=400m"),
    "damaged-native-code": _damaged_native_code,
}
