"""Fixtures of the client's tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client_colours import COLOURS, open_client
from command_runs import Command, Written
from fake_dash_server import FakeDashServer

from dash_client.cli import main


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDashServer]:
    """A server that says Hello. Clients and commands find it by DASH_TARGET."""
    with FakeDashServer() as server:
        monkeypatch.setenv("DASH_TARGET", server.target)
        yield server


@pytest.fixture(params=COLOURS)
def client(request: pytest.FixtureRequest, server: FakeDashServer) -> Iterator[Any]:
    """Each of both clients of the server, with the methods of the sync one."""
    with open_client(request.param, server.target) as client:
        yield client


@pytest.fixture
def in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process, with the words of a line and more words; returns its `out` and `err`."""

    def run(line: str, *words: str, code: int = 0) -> Written:
        assert main([*line.split(), *words]) == code
        return Written(*capsys.readouterr())

    return run


@pytest.fixture
def gone(server: FakeDashServer) -> FakeDashServer:
    """A server that has ended; nobody listens at its target."""
    server.stop()
    return server
