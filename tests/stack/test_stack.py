"""The stack as people start it: `docker compose up`, one answer, its trace, its metrics, a crash, an upgrade.

`make test-stack` runs it, with a container engine. Nothing else may use the stack's ports meanwhile.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dash_client import DashClient

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = ROOT / "build" / "stand-ins.env"
"""Names of images that .ci/make-stack-images made where no registry can be reached."""
SERVER = "dash-test-server-1"
TARGET = "127.0.0.1:50051"
JAEGER = "http://127.0.0.1:16686"
PROMETHEUS = "http://127.0.0.1:9090"
FIRST_HEALTHY_SECONDS = 60
SLOW_BUILD_SECONDS = 1800
ROUNDS = 16
POLICY = "smollm2-135m-four-actions"
"""Named, since `adaptive` alone may find that a fixed plan is better."""
CRASH = """
import os
for pid in filter(str.isdigit, os.listdir("/proc")):
    with open(f"/proc/{pid}/cmdline") as words:
        if "bin/dash-server" in words.read():
            os.kill(int(pid), 9)
"""

pytestmark = [
    pytest.mark.stack,
    pytest.mark.skipif("DASH_TEST_STACK" not in os.environ, reason="builds and runs containers: make test-stack"),
]


def compose(*arguments: str, seconds: float = 300) -> str:
    """Runs compose in a project of its own; returns stdout, and shows stderr if it fails."""
    own = ["--env-file", str(STAND_INS)] if STAND_INS.exists() else []
    command = ["docker", "compose", *own, "--project-name", "dash-test", "--profile", "metrics", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def inside(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the server's container."""
    executed = ["docker", "exec", SERVER, *command]
    return subprocess.run(executed, capture_output=True, text=True, timeout=60)


def state() -> dict[str, Any]:
    output = subprocess.run(["docker", "inspect", SERVER], capture_output=True, text=True, check=True)
    return dict(json.loads(output.stdout)[0])


def wait_until_healthy(seconds: float) -> float:
    """Returns the seconds until the server's container says that it is healthy."""
    started = time.monotonic()
    while state()["State"]["Health"]["Status"] != "healthy":
        assert time.monotonic() - started < seconds, compose("logs", "server")[-3000:]
        time.sleep(0.2)
    return time.monotonic() - started


def ask(address: str, **query: str) -> Any:
    with urllib.request.urlopen(f"{address}?{urllib.parse.urlencode(query)}", timeout=10) as response:
        return json.load(response)


@pytest.fixture(scope="module")
def first_start() -> Iterator[float]:
    """The stack; the seconds of its first start, from an empty volume."""
    compose("down", "--volumes", "--remove-orphans")
    compose("build", "server", seconds=SLOW_BUILD_SECONDS)
    compose("up", "--detach", "server", "jaeger", "prometheus")
    yield wait_until_healthy(SLOW_BUILD_SECONDS)
    compose("down", "--volumes")


def test_the_first_start_is_quick_because_the_image_brings_its_native_code(first_start: float) -> None:
    print(f"healthy after {first_start:.0f} s")
    log = compose("logs", "server")
    assert "compiling native code" not in log
    assert "layers run eagerly" not in log
    assert "traces on http://localhost:16686" in log
    assert first_start <= FIRST_HEALTHY_SECONDS


@pytest.mark.usefixtures("first_start")
def test_the_server_has_no_rights_that_it_does_not_need() -> None:
    assert inside("id", "-u").stdout.strip() == "10001"
    assert inside("touch", "/opt/x").returncode != 0
    status = inside("cat", "/proc/1/status").stdout
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)


@pytest.mark.usefixtures("first_start")
def test_an_answers_trace_is_found_in_jaeger_and_its_tokens_in_prometheus() -> None:
    with DashClient(TARGET) as client:
        answer = client.generate("The capital of France is", policy_name=POLICY, trace=True, max_new_tokens=32)
    tags = json.dumps({"dash.request_id": answer.started.request_id})
    deadline = time.monotonic() + 60
    spans: list[Any] = []
    while not spans and time.monotonic() < deadline:
        spans = [
            span
            for found in ask(f"{JAEGER}/api/traces", service="dash-llm", tags=tags)["data"]
            for span in found["spans"]
        ]
        time.sleep(0.5)
    names = {span["operationName"] for span in spans}
    assert any(re.fullmatch(r"(skip|int4|int8|full) layer \d+", name) for name in names), names
    tokens: list[Any] = []
    while not tokens and time.monotonic() < deadline:
        tokens = ask(f"{PROMETHEUS}/api/v1/query", query='dash_tokens_total{dash_token_type="output"} > 0')["data"][
            "result"
        ]
        time.sleep(0.5)
    assert tokens


@pytest.mark.usefixtures("first_start")
def test_the_demo_answers_and_says_where_its_trace_is() -> None:
    said = compose("--profile", "demo", "run", "--rm", "demo")
    assert "Paris" in said


@pytest.mark.usefixtures("first_start")
def test_a_container_is_nearly_as_fast_as_make_serve(tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    environment = os.environ | {"DASH_PORT": "0", "DASH_PORT_FILE": str(port_file), "DASH_NUM_THREADS": "2"}
    with (tmp_path / "log").open("w") as log:
        outside = subprocess.Popen([sys.executable, "-m", "dash_server.main"], env=environment, stderr=log)
    with outside:
        while not port_file.exists():
            assert outside.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        with DashClient(TARGET) as inner, DashClient(f"localhost:{port_file.read_text().strip()}") as outer:
            outer.wait_until_ready(timeout=900)
            ratios = []
            for _ in range(ROUNDS):
                # Each has the processors for itself: one that is idle uses the time to measure costs.
                subprocess.run(["docker", "pause", SERVER], check=True, capture_output=True)
                outer_seconds = seconds(outer)
                everything = [psutil.Process(outside.pid), *psutil.Process(outside.pid).children(recursive=True)]
                for process in everything:
                    process.suspend()
                subprocess.run(["docker", "unpause", SERVER], check=True, capture_output=True)
                ratios.append(outer_seconds / seconds(inner))
                for process in everything:
                    process.resume()
            del ratios[0]
        outside.terminate()
    ratios.sort()
    median = statistics.median(ratios)
    print(f"ADAPTIVE in a container / outside, tokens/s: {median:.2f} ({ratios[0]:.2f} … {ratios[-1]:.2f})")
    assert median >= 0.9


def seconds(client: DashClient) -> float:
    """Returns the time of one ADAPTIVE answer."""
    started = time.perf_counter()
    client.generate("Once upon a time", policy_name=POLICY, max_new_tokens=128, ignore_eos=True)
    return time.perf_counter() - started


@pytest.mark.usefixtures("first_start")
def test_a_server_that_crashed_is_started_again_and_finds_what_it_made() -> None:
    inside("python", "-c", CRASH)
    deadline = time.monotonic() + 30
    while state()["RestartCount"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    print(f"healthy {wait_until_healthy(120):.0f} s after a crash")
    log = compose("logs", "server").rpartition("settings: model=")[2]
    assert "converting" not in log


@pytest.mark.usefixtures("first_start")
def test_an_upgrade_keeps_the_volume_and_lets_a_running_answer_finish() -> None:
    with DashClient(TARGET) as client:
        stream = client.stream("Write a long story.", mode="full_depth", max_new_tokens=200, ignore_eos=True)
        next(iter(stream))
        upgrade = subprocess.Popen(
            ["docker", "compose", "--project-name", "dash-test", "up", "--detach", "--force-recreate", "server"],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        assert stream.final().usage.output_token_count == 200
        assert upgrade.wait(60) == 0
    print(f"healthy {wait_until_healthy(120):.0f} s after an upgrade")
    assert "converting" not in compose("logs", "server")


@pytest.mark.usefixtures("first_start")
def test_a_stop_is_a_drain() -> None:
    compose("stop", "server")
    assert state()["State"]["ExitCode"] == 0
