"""The benchmark's peers are processes that answer in lines or over HTTP, and stand still between their turns."""

import http.server
import json
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from benchmarks.figures import Report
from benchmarks.peers.child import ChildContender
from benchmarks.peers.http_stream import HttpContender
from benchmarks.peers.install import find_peer
from benchmarks.peers.peer_process import PeerProcess
from benchmarks.prompts import Prompts
from benchmarks.server_process import RunningServer
from dash_client import DashClient
from tests.tiny_models import save_byte_tokenizer

READY = """print('{"ready": "peer 1.0"}', flush=True)"""
# Says that each stream's first token came after a second, and a token a second from then on.
STEADY = (
    f"""
import json, sys
{READY}
"""
    + """
for line in sys.stdin:
    asked = json.loads(line)
    arrivals = [[11 + number, 1] for number in range(asked["num_tokens"])]
    print(json.dumps({"started": 10, "streams": [arrivals for _ in asked["prompts"]]}), flush=True)
"""
)
SHORT = STEADY.replace('range(asked["num_tokens"])', "range(1)")
LISTENING = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "while True: pass"])
{READY}
sys.stdin.read()
"""


@contextmanager
def running(tmp_path: Path, program: str, **variables: str) -> Iterator[PeerProcess]:
    script = tmp_path / "peer.py"
    script.write_text(textwrap.dedent(program), encoding="utf-8")
    with PeerProcess("the peer", [sys.executable, str(script)], variables) as peer:
        yield peer


def processes(peer: PeerProcess) -> list[psutil.Process]:
    own = psutil.Process(peer.process.pid)
    return [own, *own.children(recursive=True)]


def wait_for(statuses: set[str], those: list[psutil.Process]) -> None:
    """Waits until each process has one of the statuses: a signal needs a moment."""
    ends_at = time.monotonic() + 10
    while not {process.status() for process in those} <= statuses:
        assert time.monotonic() < ends_at, [process.status() for process in those]
        time.sleep(0.01)


def test_a_childs_answer_becomes_a_run(tmp_path: Path) -> None:
    with running(tmp_path, STEADY) as peer:
        contender = ChildContender(peer)
        run = contender.run([[1, 2], [3, 4]], 5)
    assert contender.description == "peer 1.0"
    assert (run.seconds_to_first, run.seconds, run.num_tokens) == (1, 4, 8)


def test_a_child_answers_again_and_again(tmp_path: Path) -> None:
    with running(tmp_path, STEADY) as peer:
        contender = ChildContender(peer)
        assert [contender.run([[1]], count).num_tokens for count in (3, 5)] == [2, 4]


def test_a_peer_gets_its_variables(tmp_path: Path) -> None:
    program = STEADY.replace('asked["num_tokens"])', 'int(os.environ["NUM"]))').replace(
        "import json", "import os, json"
    )
    with running(tmp_path, program, NUM="7") as peer:
        assert ChildContender(peer).run([[1]], 7).num_tokens == 6


DIES = 'print("loading\\nno such kernel\\n", file=sys.stderr); sys.exit(3)'
DIED = "the peer did not answer, and ended with status 3: no such kernel"


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        (SHORT, "the peer made [1] tokens instead of 3"),
        (f"import sys; {DIES}", DIED),
        (f"import sys; {READY}; sys.stdin.readline(); {DIES}", DIED),
        ("import sys; sys.stdin.read()", "the peer did not answer: no message"),
    ],
    ids=["makes too few tokens", "dies at its start", "dies when it is asked", "says nothing"],
)
def test_a_child_that_fails_is_reported_with_its_last_line_of_stderr(
    tmp_path: Path, program: str, complaint: str
) -> None:
    deadline = {"deadline_seconds": 0.05} if complaint.endswith("no message") else {}
    with running(tmp_path, program) as peer, pytest.raises(RuntimeError) as raised:
        ChildContender(peer, **deadline).run([[1]], 3)
    assert str(raised.value) == complaint


def test_a_child_that_died_between_its_turns_is_reported(tmp_path: Path) -> None:
    with running(tmp_path, STEADY) as peer:
        contender = ChildContender(peer)
        peer.process.kill()
        peer.process.wait()
        with pytest.raises(RuntimeError, match="the peer takes no prompts, and ended with status -9: no message"):
            contender.run([[1]], 3)


def test_a_peer_and_its_children_stand_still_between_their_turns(tmp_path: Path) -> None:
    with running(tmp_path, LISTENING) as peer:
        ChildContender(peer)
        those = processes(peer)
        assert len(those) == 2
        wait_for({psutil.STATUS_STOPPED}, those)
        with peer.awake():
            wait_for({psutil.STATUS_RUNNING, psutil.STATUS_SLEEPING}, those)
        wait_for({psutil.STATUS_STOPPED}, those)


def test_a_stopped_server_and_its_worker_stand_still(tmp_path: Path) -> None:
    with running(tmp_path, LISTENING) as peer, DashClient("localhost:9") as client:
        ChildContender(peer)
        with peer.awake():
            those = processes(peer)
            with RunningServer(client, 0.0, peer.process.pid).stopped():
                wait_for({psutil.STATUS_STOPPED}, those)
            wait_for({psutil.STATUS_RUNNING, psutil.STATUS_SLEEPING}, those)


def test_nothing_of_a_peer_is_left_behind(tmp_path: Path) -> None:
    with running(tmp_path, LISTENING) as peer:
        ChildContender(peer)
        those = processes(peer)
    assert psutil.wait_procs(those, timeout=10)[1] == []


def test_a_missing_peer_is_left_out_with_the_command_that_installs_it(tmp_path: Path) -> None:
    report = Report()
    assert find_peer(report, "vllm", tmp_path) is None
    assert report.notes == [
        f"vllm: left out, it is not in {tmp_path}; `python -m benchmarks.peers {tmp_path} --only vllm` installs it"
    ]


def test_an_installed_peer_is_its_own_python(tmp_path: Path) -> None:
    python = tmp_path / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    # As in an environment: the link is what makes Python see the packages beside it.
    python.symlink_to(sys.executable)
    report = Report()
    assert find_peer(report, "vllm", tmp_path) == python
    assert report.notes == []


class _Completions(http.server.BaseHTTPRequestHandler):
    """Answers as vLLM does: the tokens of a message are listed, the last message has none."""

    asked: list[dict[str, object]] = []  # noqa: RUF012
    messages = ([7, 8], [9], [])

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()
        for token_ids in self.messages:
            choice = {"text": "x", "token_ids": token_ids or None}
            self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def completions_port() -> Iterator[int]:
    _Completions.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Completions) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_port
        server.shutdown()


def test_tokens_that_come_in_one_message_are_all_counted(tmp_path: Path, completions_port: int) -> None:
    with running(tmp_path, LISTENING) as peer:
        run = HttpContender(peer, completions_port, "model").run([[1]], 3)
        assert run.num_tokens == 1  # the first message had the others
        with pytest.raises(RuntimeError, match="the peer made 3 tokens instead of 4"):
            HttpContender(peer, completions_port, "model").run([[1]], 4)


def test_a_stream_over_http_is_greedy_and_goes_past_the_end(tmp_path: Path, completions_port: int) -> None:
    with running(tmp_path, LISTENING) as peer:
        HttpContender(peer, completions_port, "model").run([[1, 2]], 3)
    (asked,) = _Completions.asked
    expected = {"model": "model", "prompt": [1, 2], "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    assert {name: asked[name] for name in expected} == expected


def test_a_server_that_ends_before_it_is_healthy_is_reported(tmp_path: Path) -> None:
    with (
        running(tmp_path, "import sys; sys.exit('no memory')") as peer,
        pytest.raises(RuntimeError, match="the peer did not start, and ended with status 1: no memory"),
    ):
        HttpContender(peer, 9, "model")


def test_sixty_four_streams_have_different_prompts_of_one_length(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    prompts = Prompts(tmp_path / "tokenizer.json")
    streams = prompts.streams(64)
    assert len({tuple(prompt) for prompt in streams}) == 64
    assert len(set(map(len, streams))) == 1
    assert prompts.streams(16) == streams[:16]
    with pytest.raises(ValueError, match="there are 64 prompts, not 65"):
        prompts.streams(65)
