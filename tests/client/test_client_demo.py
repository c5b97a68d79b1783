"""examples/demo.py, with a server process that has no model."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo.py"

SERVER = """
    import os, signal, sys
    from pathlib import Path

    from fake_dash_server import HELLO, FakeDashServer

    behaviour = os.environ["FAKE_BEHAVIOUR"]
    if behaviour == "fails":
        sys.exit("cannot load: the model file is truncated")
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with FakeDashServer() as server:
        if behaviour == "hangs":
            server.script = [*HELLO[:2], server.wait]
        if behaviour == "silent":
            server.script = [HELLO[0], HELLO[-1]]
        port = server.target.rpartition(":")[2]
        port_file = Path(os.environ["DASH_PORT_FILE"])
        port_file.with_suffix(".new").write_text(port + "\\n")
        port_file.with_suffix(".new").replace(port_file)
        print("pid", os.getpid(), flush=True)
        signal.sigwait(signals)
    sys.exit(3 if behaviour == "untidy" else 0)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    package = tmp_path / "dash_server"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "main.py").write_text(textwrap.dedent(SERVER))
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])
    return os.environ | {"PYTHONPATH": path, "TMPDIR": str(tmp_path), "DASH_TARGET": "nowhere:1"}


def run_demo(environment: dict[str, str], behaviour: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEMO), "--budget", "0.7"],
        env=environment | {"FAKE_BEHAVIOUR": behaviour},
        capture_output=True,
        text=True,
        timeout=30,
    )


def server_pid(tmp_path: Path) -> int:
    (log,) = tmp_path.glob("dash-demo-*/server.log")
    found = re.search(r"pid (\d+)", log.read_text())
    assert found is not None
    return int(found[1])


def test_the_demo_shows_its_modes_and_stops_the_server(environment: dict[str, str], tmp_path: Path) -> None:
    result = run_demo(environment, "works")
    assert result.returncode == 0, result.stderr
    for expected in (
        "ADAPTIVE",
        "EXACT",
        "FULL_DEPTH",
        "a random plan",
        "Hello",
        "not a benchmark",
        "stopped cleanly",
    ):
        assert expected in result.stdout
    assert "pid" not in result.stdout
    with pytest.raises(ProcessLookupError):
        os.kill(server_pid(tmp_path), 0)


def test_a_server_that_cannot_start_is_quoted(environment: dict[str, str]) -> None:
    result = run_demo(environment, "fails")
    assert result.returncode == 1
    assert "the server exited with 1" in result.stderr
    assert "the model file is truncated" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("behaviour", "message"), [("silent", "gave no text"), ("untidy", "did not stop cleanly (exit 3)")]
)
def test_the_demo_fails_where_something_is_wrong(environment: dict[str, str], behaviour: str, message: str) -> None:
    result = run_demo(environment, behaviour)
    assert result.returncode == 1
    assert message in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_server(
    environment: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    with subprocess.Popen(
        [sys.executable, str(DEMO)],
        env=environment | {"FAKE_BEHAVIOUR": "hangs", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as demo:
        try:
            assert demo.stdout is not None
            end = time.monotonic() + 15
            while "Hel" not in demo.stdout.readline(3) and time.monotonic() < end:
                pass
            demo.send_signal(number)
            _, err = demo.communicate(timeout=15)
        finally:
            demo.kill()
    assert demo.returncode == 130
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.kill(server_pid(tmp_path), 0)
