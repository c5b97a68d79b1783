"""Runs gRPC clients in other languages against a real `dash-server` process with the fake worker.

`python -m benchmarks.soak --only other-clients` runs node/client.mjs (@grpc/grpc-js) and node/buf_curl.mjs
(`buf curl`), each once with the .proto files and once with the server's reflection, and prints which checks passed.
It needs node and npm. It keeps npm's packages in ~/.cache/dash-llm/soak-node; delete that folder to get newer ones.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.soak.report import Finding, finding
from dash_runtime.checkpoints import default_cache_folder
from tests.server.server_harness import fake_model, server_process, write_model_folder

SOURCES = Path(__file__).parent / "node"
PROTO_FOLDER = Path(__file__).parents[2] / "proto"
PROGRAMS = ("client.mjs", "buf_curl.mjs")
PACKAGES = ("@grpc/grpc-js", "@grpc/proto-loader", "grpc-js-reflection-client", "google-proto-files", "@bufbuild/buf")
# So slow that only a cancellation frees a long request's slot in time.
TOKEN_SECONDS = 0.02

INSTALL_SECONDS = 300.0
PROGRAM_SECONDS = 150.0
# Time for a program to end its own children.
END_SECONDS = 5.0


class SoakError(Exception):
    """The checks could not be completed."""


@dataclass(frozen=True)
class Check:
    """One task for one client. `detail` says how it went."""

    client: str
    name: str
    is_ok: bool
    detail: str

    def __str__(self) -> str:
        return " | ".join(("ok" if self.is_ok else "FAILED", self.client, self.name, self.detail))


async def run(cache_folder: Path | None = None) -> list[Finding]:
    """Runs every check, and prints those of a program when it has ended.

    Raises:
        SoakError: the packages cannot be installed, or the server neither starts nor ends.
    """
    missing = [program for program in ("node", "npm") if shutil.which(program) is None]
    if missing:
        return [finding("clients of other languages", "every check", f"not run: {' and '.join(missing)} missing", True)]
    folder = cache_folder or default_cache_folder(os.environ) / "soak-node"
    await install(folder)
    versions = await package_versions(folder)
    checks: list[Check] = []
    with tempfile.TemporaryDirectory() as temporary:
        model = fake_model(write_model_folder(Path(temporary) / "model"), token_seconds=TOKEN_SECONDS)
        # With one slot, the next call notices a cancelled stream that keeps it.
        with server_process(Path(temporary), model=model, slots=1) as server:
            try:
                target = f"127.0.0.1:{await asyncio.to_thread(server.wait_for_port)}"
            except AssertionError as error:
                raise SoakError(f"the server does not start: {error}") from error
            for program in PROGRAMS:
                checks += await run_program(folder, program, target)
            try:
                code, log = await asyncio.to_thread(server.end, signal.SIGTERM)
            except subprocess.TimeoutExpired as error:
                raise SoakError("the server does not end") from error
    return [*_findings(checks, versions), finding("the server's end", "exit code 0, no traceback",
            f"exit code {code}", code == 0 and "Traceback" not in log)]  # fmt: skip


def _findings(checks: Sequence[Check], versions: dict[str, str]) -> list[Finding]:
    """Returns one finding per client, with its tasks."""
    findings = []
    for client in dict.fromkeys(check.client for check in checks):
        own = [check for check in checks if check.client == client]
        names = ", ".join(check.name if check.is_ok else f"{check.name} FAILED: {check.detail}" for check in own)
        findings.append(finding(client, "every check", names, all(check.is_ok for check in own)))
    seen = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [*findings, finding("versions", "any", seen, True)]


async def install(folder: Path) -> None:
    """Copies the programs into the folder and installs their packages, unless they are already there."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCES.glob("*.mjs"):
        shutil.copy(source, folder)
    wanted, installed = (SOURCES / "package.json").read_text(), folder / "installed.json"
    if installed.exists() and installed.read_text() == wanted:
        return
    (folder / "package.json").write_text(wanted)
    # No package needs its install script; buf's would download a program that npm left out.
    flags = ("--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error")
    code, output = await outcome(("npm", "install", *flags), folder, INSTALL_SECONDS)
    if code != 0:
        raise SoakError(f"npm install failed: {output}")
    installed.write_text(wanted)


async def package_versions(folder: Path) -> dict[str, str]:
    """Returns the versions of node and of the packages in use."""
    _, node = await outcome(("node", "--version"), folder, INSTALL_SECONDS)
    packages = {name: folder / "node_modules" / name / "package.json" for name in PACKAGES}
    return {"node": node.strip()} | {name: json.loads(path.read_text())["version"] for name, path in packages.items()}


async def run_program(folder: Path, program: str, target: str) -> list[Check]:
    """Runs one program and returns its checks, up to the first that failed."""
    code, output = await outcome(("node", program, target, str(PROTO_FOLDER)), folder, PROGRAM_SECONDS)
    checks = []
    for line in output.splitlines():
        verdict, *parts = line.split(" | ", 3)
        if verdict in ("ok", "FAILED") and len(parts) == 3:
            checks.append(Check(parts[0], parts[1], verdict == "ok", parts[2]))
    if not checks or (code != 0 and checks[-1].is_ok):
        checks.append(Check(program, "runs", False, f"exit code {code}: {output}"))
    print(*checks, sep="\n", flush=True)
    return checks


async def outcome(arguments: Sequence[str], folder: Path, seconds: float) -> tuple[int, str]:
    """Runs a command; returns its exit code and all its output. Ends it after `seconds`, as a failure."""
    environment = os.environ | {"BUF_CACHE_DIR": str(folder / "buf-cache")}
    # No proxy may stand between a client and a server on this machine.
    environment |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"} if arguments[0] == "node" else {}
    process = await asyncio.create_subprocess_exec(
        *arguments,
        cwd=folder,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    output = asyncio.create_task(process.communicate())
    try:
        await asyncio.wait([output], timeout=seconds)
        is_in_time = output.done()
    finally:
        await end_group(process)
    stdout, _ = await output
    assert process.returncode is not None
    late = "" if is_in_time else f"\nnot done within {seconds:.0f} s"
    return process.returncode, stdout.decode(errors="replace") + late


async def end_group(process: asyncio.subprocess.Process) -> None:
    """Ends what still runs of a command: with SIGTERM first, because buf_curl.mjs must end its own children."""
    with contextlib.suppress(ProcessLookupError):
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), END_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
