"""Fixtures of the client's tests."""

from collections.abc import Iterator
from typing import Any

import pytest
from client_colours import COLOURS, open_client
from fake_dash_server import FakeDashServer


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
def gone(server: FakeDashServer) -> FakeDashServer:
    """A server that has ended; nobody listens at its target."""
    server.stop()
    return server
