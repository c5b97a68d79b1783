"""The worker's loop: what it does while no request is running."""

import socket
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dash_runtime.actions import Action
from dash_runtime.config import ModelFacts
from dash_runtime.engine.later import LaterWork
from dash_runtime.errors import ConfigError
from dash_runtime.events import CostStatus
from dash_server.settings import Settings
from dash_server.worker import messages
from dash_server.worker.engine_loop import EngineLoop


class IdleWork:
    """A watch that measures three steps, the second of which shows something new, and has the server end the worker."""

    def __init__(self, server: socket.socket) -> None:
        self.num_steps = 0
        self.status = CostStatus()
        self._server = server

    def seconds_until_idle_work(self) -> float:
        return 0.0

    def work_idly(self) -> None:
        self.num_steps += 1
        if self.num_steps == 2:
            self.status = CostStatus(1, 0.0)
        if self.num_steps == 3:
            self._server.sendall(messages.encode_frame(messages.Shutdown()))


FACTS = ModelFacts("toy", "ToyForCausalLM", 1, 8, 16, 16, 1, frozenset(), (Action.FULL,), (), "cpu")


def fake_engine(**parts: Any) -> Any:
    later = parts.pop("later", LaterWork())
    return SimpleNamespace(
        close=lambda: None, facts=FACTS, bursts=SimpleNamespace(wake_file=None), later=later, **parts
    )


def test_an_idle_worker_measures_until_a_message_comes_and_says_what_is_new() -> None:
    server, worker = socket.socketpair()
    with server, worker:
        watch = IdleWork(server)
        loop = EngineLoop(worker)
        engine = fake_engine(has_work=False, cost_watch=watch, step=list)
        loop._start = lambda: (engine, [])  # type: ignore[method-assign]
        assert loop.run() == 0
        bodies = messages.FrameReader().feed(server.recv(1 << 16))
    assert watch.num_steps == 3
    assert [messages.decode_from_worker(body) for body in bodies] == [messages.CostsJudged(CostStatus(1, 0.0), FACTS)]


def test_requests_go_first_while_an_idle_worker_does_what_was_left_for_later() -> None:
    server, worker = socket.socketpair()
    with server, worker:
        later, did = LaterWork(), list[str]()

        def measure() -> None:
            did.append("measure")
            server.sendall(messages.encode_frame(messages.Ping()))
            later.pause()
            did.append("go on")
            engine.facts = replace(FACTS, name="measured")

        def fail() -> None:
            server.sendall(messages.encode_frame(messages.Shutdown()))
            raise ConfigError("costs", "a measurement that fails ends no worker")

        later.add(measure)
        later.add(fail)
        engine = fake_engine(has_work=False, cost_watch=None, step=lambda: did.append("step") or [], later=later)
        loop = EngineLoop(worker)
        loop._start = lambda: (engine, [])  # type: ignore[method-assign]
        assert loop.run() == 0
        said = [messages.decode_from_worker(body) for body in messages.FrameReader().feed(server.recv(1 << 16))]
    assert did[did.index("measure") : did.index("go on") + 1] == ["measure", "step", "go on"]
    assert said == [messages.Pong(), messages.CostsJudged(CostStatus(), replace(FACTS, name="measured"))]


def test_a_worker_gives_signs_of_life_in_the_middle_of_a_long_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dash_server.worker.engine_loop._SECONDS_BETWEEN_SIGNS", 0.05)
    server, worker = socket.socketpair()
    with server, worker:
        loop = EngineLoop(worker)

        def step() -> list[Any]:
            for _ in range(20):
                time.sleep(0.01)
                engine.on_progress()
            server.sendall(messages.encode_frame(messages.Shutdown()))
            return []

        engine = fake_engine(has_work=True, cost_watch=None, step=step)
        loop._start = lambda: (engine, [])  # type: ignore[method-assign]
        assert loop.run() == 0
        bodies = messages.FrameReader().feed(server.recv(1 << 16))
    signs = [messages.decode_from_worker(body) for body in bodies]
    assert 3 <= len(signs) <= 5
    assert set(map(type, signs)) == {messages.Pong}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "/no/such/folder"}, "/no/such/folder"),
        ({"model": "{folder}/corrupt.gguf"}, "corrupt.gguf"),
        ({"policy_file": "{folder}/foreign.safetensors"}, "foreign.safetensors"),
        ({"device": "warp"}, "warp"),
    ],
)
def test_a_model_policy_or_device_that_cannot_be_used_is_named_and_the_worker_ends(
    tiny_folder: Path, tmp_path: Path, settings: dict[str, str], words: str
) -> None:
    (tmp_path / "foreign.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    (tmp_path / "corrupt.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 64)
    given = {"model": str(tiny_folder), **{name: value.format(folder=tmp_path) for name, value in settings.items()}}
    config = Settings(cache_folder=tmp_path, native="off", **given).worker_config()
    server, worker = socket.socketpair()
    with server, worker:
        server.settimeout(30)
        server.sendall(messages.encode_frame(config))
        assert EngineLoop(worker).run() == 2
        *_, told = map(messages.decode_from_worker, messages.FrameReader().feed(server.recv(1 << 16)))
    assert isinstance(told, messages.StartupFailed)
    assert words in told.description
