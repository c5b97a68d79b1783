"""`make abuse`: attacks a server, each in its own way, beside a caller who must not feel it; see docs/reliability.md.

`python -m benchmarks.abuse --only flood-of-pings` runs one attack. The worker is a fake, since no attack reaches one.
Exits with 1 if anything did not hold.
"""

import argparse
import asyncio
import json
import secrets
import sys
import tempfile
from functools import partial
from pathlib import Path

import psutil

from benchmarks.abuse.attacks import ATTACKS
from benchmarks.abuse.bystander import Bystander
from benchmarks.soak.report import Finding, finding, run_parts
from benchmarks.soak.service import Service, running_service
from tests.server.authority import Authority
from tests.server.server_harness import FAKE_WORKER, fake_model, write_model_folder, write_tokens

SECONDS = 20.0
_QUIET_SECONDS = 3.0
_MOST_GAP_RATIO = 3.0
_LEAST_GAP = 0.05
"""Seconds; a shorter gap is nothing that anybody feels, whatever the quiet one was."""
_MOST_CALL_SECONDS = 1.0
_MOST_MEMORY = 200 << 20
_MOST_LINES_A_SECOND = 150
_NUM_ATTACKERS = 5


async def run(name: str, seconds: float = SECONDS, slack: float = 1.0) -> list[Finding]:
    """Attacks a server of its own for some seconds. With slack, times may be so many times as long: machines differ."""
    names = ["bystander", *(f"attacker{number}" for number in range(_NUM_ATTACKERS))]
    tokens = {caller: secrets.token_hex(16) for caller in names}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = fake_model(write_model_folder(folder / "model"), token_seconds=0.005)
        token_file = write_tokens(folder, **tokens)
        authority = Authority(folder) if "tls" in name else None
        credentials = authority.credentials() if authority else None
        settings: dict[str, object] = {"context_length": 65_536, "cache_tokens": 1 << 20, "max_queue_tokens": 1 << 22}
        if authority is not None:
            settings |= authority.settings()
        async with running_service(
            folder, credentials, worker_command=FAKE_WORKER, model=model, token_file=token_file, **settings
        ) as service:
            own = tokens.pop("bystander")
            async with Bystander(service.port, own, credentials).at_work() as bystander:
                await bystander.watch(1)
                quiet = await bystander.watch(_QUIET_SECONDS)
                before = _memory(service)
                attacker = await _attacker(name, service.port, list(tokens.values()))
                try:
                    watching = asyncio.create_task(bystander.watch(seconds))
                    most = before
                    while not watching.done():
                        await asyncio.sleep(0.2)
                        most = max(most, _memory(service))
                    seen = await watching
                    assert attacker.returncode is None, "the attacker ended"
                finally:
                    attacker.kill()
                    await attacker.wait()
                after = await bystander.watch(1)
            log = service.server.log.read_text()
    num_tracebacks, num_lines = log.count("Traceback"), log.count("\n")
    most_lines = round(_MOST_LINES_A_SECOND * (seconds + _QUIET_SECONDS + 2))
    limit, most_seconds = slack * max(_MOST_GAP_RATIO * quiet.gap, _LEAST_GAP), slack * _MOST_CALL_SECONDS
    return [
        finding("gap between messages of the bystander's stream, 99th percentile", f"≤ {limit * 1e3:.0f} ms",
                f"{seen.gap * 1e3:.1f} ms, quiet {quiet.gap * 1e3:.1f}", seen.gap <= limit),
        finding("the longest of its calls", f"≤ {most_seconds:g} s",
                f"{seen.longest_call:.3f} s of {len(seen.calls)} calls", seen.longest_call <= most_seconds),
        finding("its failures, and those afterwards", "none", [*seen.failures[:3], *after.failures[:3]] or "none",
                not seen.failures and not after.failures),
        finding("memory of the server", f"≤ {_MOST_MEMORY >> 20} MB more", f"{(most - before) / 1e6:+.0f} MB",
                most - before <= _MOST_MEMORY),
        finding("tracebacks and lines in the log", f"0, ≤ {most_lines}", f"{num_tracebacks}, {num_lines}",
                num_tracebacks == 0 and num_lines <= most_lines),
    ]  # fmt: skip


def _memory(service: Service) -> int:
    return psutil.Process(service.server.process.pid).memory_info().rss


async def _attacker(name: str, port: int, tokens: list[str]) -> asyncio.subprocess.Process:
    """Starts an attack, and returns its process once it is under way."""
    command = (sys.executable, "-m", "benchmarks.abuse.attacks", name, str(port))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(tokens).encode() + b"\n")
    await process.stdin.drain()
    assert await process.stdout.readline() == b"attacking\n"
    return process


def main() -> int:
    """Runs the chosen attacks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="these attacks")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each attack")
    options = parser.parse_args()
    attacks = {name: (ATTACKS[name].__doc__ or "").strip() for name in options.only}
    return run_parts(
        {name: (f"{name}: {title}", partial(run, name, options.seconds)) for name, title in attacks.items()}
    )


if __name__ == "__main__":
    sys.exit(main())
