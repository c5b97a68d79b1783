"""`make demo`: starts a server with the embedded model, and streams one answer in several modes.

Exits 0 only if text came in all of them and the server stopped cleanly.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dash_client import Action, DashClient, DashError, Generation, HealthStatus, Mode, UnavailableError

START_SECONDS = 600.0
STOP_SECONDS = 45.0
LOG_TAIL_LINES = 20
_WORKER = "worker: "
_CLEAR_LINE = "\x1b[K"


class DemoError(Exception):
    """Ends the demo early; the message is for the terminal."""


@dataclass(frozen=True)
class Server:
    """A running server process, with the files of its port and its log."""

    process: subprocess.Popen[bytes]
    port_file: Path
    log_file: Path

    def require_running(self) -> None:
        """Raises DemoError with the last lines of the log if the server has exited."""
        code = self.process.poll()
        if code is None:
            return
        lines = self.log_file.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        raise DemoError("\n".join([f"the server exited with {code}; its last lines:", *lines]))

    def doing(self) -> str:
        """Returns what the worker said last, in its log."""
        lines = self.log_file.read_text(errors="replace").splitlines()
        said = (line.removeprefix(_WORKER) for line in reversed(lines) if line.startswith(_WORKER))
        return next(said, "opening the model")

    def stop(self) -> int | None:
        """Asks the server to stop, and returns its exit code; None if it does not stop in time."""
        self.process.terminate()
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return None


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """Runs a server process on a free port. Nothing of it outlives the block."""
    folder = Path(tempfile.mkdtemp(prefix="dash-demo-"))
    port_file, log_file = folder / "port", folder / "server.log"
    environment = os.environ | {"DASH_HOST": "127.0.0.1", "DASH_PORT": "0", "DASH_PORT_FILE": str(port_file)}
    environment.pop("DASH_TARGET", None)
    print(f"The server's log is {log_file}")
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dash_server.main"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches only the demo, which then stops the server in order.
            start_new_session=True,
        )
    server = Server(process, port_file, log_file)
    try:
        yield server
    finally:
        try:
            if process.poll() is None:
                server.stop()
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_port(server: Server, progress: "Progress") -> int:
    """Waits for the server to bind a port, and returns it."""
    while True:
        server.require_running()
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int(server.port_file.read_text())
        progress.tick(server.doing())


def wait_until_serving(server: Server, client: DashClient, progress: "Progress") -> None:
    """Waits until health says SERVING."""
    while True:
        server.require_running()
        with contextlib.suppress(UnavailableError):
            if client.health() is HealthStatus.SERVING:
                return
        progress.tick(server.doing())


class Progress:
    """Prints how long the start has taken and what it is doing: in place on a terminal, else when that changes."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._doing = ""

    def tick(self, doing: str) -> None:
        """Prints the time and waits a moment. Raises DemoError if the start has taken too long."""
        seconds = time.monotonic() - self._begin
        if seconds > START_SECONDS:
            raise DemoError(f"the server is not serving after {START_SECONDS:g} s")
        text = f"Starting the server: {seconds:.0f} s, {doing}"
        if sys.stdout.isatty():
            print(f"\r{_CLEAR_LINE}{text}", end="", flush=True)
        elif doing != self._doing:
            print(text, flush=True)
            self._doing = doing
        time.sleep(0.2)

    def finish(self) -> None:
        """Prints that the server is serving."""
        start = f"\r{_CLEAR_LINE}" if sys.stdout.isatty() else ""
        print(f"{start}The server is serving after {time.monotonic() - self._begin:.1f} s", flush=True)


def plans(client: DashClient) -> list[tuple[Mode, str | None]]:
    """Returns ADAPTIVE with each learned policy (else with the default one), then EXACT and full depth."""
    names = client.model_info().policy_names
    learned = [name for name in names if client.policy_info(name).learned]
    return [*((Mode.ADAPTIVE, name) for name in learned or names[:1]), (Mode.EXACT, None), (Mode.FULL_DEPTH, None)]


def stream_answer(client: DashClient, arguments: argparse.Namespace, mode: Mode, policy_name: str | None) -> Generation:
    """Streams the answer to the terminal, and returns it."""
    chat = [{"role": "user", "content": arguments.prompt}]
    budget = arguments.budget if mode is Mode.ADAPTIVE else None
    with client.stream(
        chat,
        mode=mode,
        policy_name=policy_name,
        compute_budget=budget,
        max_new_tokens=arguments.max_new_tokens,
    ) as stream:
        started = stream.started
        print(f"\n--- {mode.name} (policy {started.policy}) ---")
        if started.policy_note:
            print(f"Note from the server: {started.policy_note}")
        for delta in stream:
            print(delta.text, end="", flush=True)
    print(flush=True)
    answer = stream.final()
    if not answer.text:
        raise DemoError(f"mode {mode.name} gave no text")
    return answer


def print_table(answers: list[Generation]) -> None:
    """Prints the answers side by side."""
    rows = [["", *(answer.started.mode.name for answer in answers)]]
    rows.append(["policy", *(answer.started.policy for answer in answers)])
    rows.append(["output tokens", *(str(answer.usage.output_token_count) for answer in answers)])
    rows.append(["decode tokens/s", *(_number(a.usage.decode_tokens_per_second, 1) for a in answers)])
    rows.append(["first token after s", *(_number(answer.usage.prefill_seconds, 3) for answer in answers)])
    for action in Action:
        layers = [answer.depth.mean_layers.get(action, 0.0) for answer in answers]
        rows.append([f"layers per token, {action.name}", *(_number(mean, 1) for mean in layers)])
    rows.append(["more, drafts and wrong guesses", *(f"{a.depth.mean_speculative_layers:.1f}" for a in answers)])
    rows.append(["cost, share of full depth", *(_number(answer.depth.mean_cost, 3) for answer in answers)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for name, *cells in rows:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join([name.ljust(widths[0]), *padded]))
    print("\nEach speed is one run on this machine as it was just now, not a benchmark: see `make bench`.")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def run(arguments: argparse.Namespace) -> None:
    """Runs the demo. Raises DemoError or DashError if anything is not as it should be."""
    with running_server() as server:
        progress = Progress()
        target = f"127.0.0.1:{wait_for_port(server, progress)}"
        with DashClient(target, timeout=arguments.timeout) as client:
            wait_until_serving(server, client, progress)
            progress.finish()
            info = client.model_info()
            print(f"Model {info.name}: {info.layer_count} layers, on {info.device}")
            print(f"Prompt: {arguments.prompt}")
            try:
                answers = [stream_answer(client, arguments, *plan) for plan in plans(client)]
            except DashError:
                server.require_running()
                raise
        print_table(answers)
        code = server.stop()
        if code != 0:
            raise DemoError(
                f"the server did not stop cleanly ({'killed' if code is None else f'exit {code}'}); "
                f"see {server.log_file}"
            )
        print("The server stopped cleanly.")


def main() -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default="Why is the sky blue?")
    parser.add_argument("--budget", type=float, help="compute budget in (0, 1]; default: the server's")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for each answer")
    arguments = parser.parse_args()
    # A terminated demo stops its server too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(arguments)
    except (DemoError, DashError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the server is stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
