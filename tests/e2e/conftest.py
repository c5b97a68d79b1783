"""Fixtures of the tests with real processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dash_client import DashClient
from tests.e2e.service import REPEATABLE, TOKEN, Service
from tests.server.server_harness import write_model_folder, write_tokens


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """What a server with the fake worker reads of a model."""
    return write_model_folder(tmp_path / "model")


@pytest.fixture(scope="session")
def token_service(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Service]:
    """A server with one slot and one thread, and one caller who may call: the one for all adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    tokens = str(write_tokens(folder, ann=TOKEN))
    running = Service(folder, tiny_folder, DASH_TOKEN_FILE=tokens, DASH_SLOTS="1", **REPEATABLE)
    yield running
    assert running.stop() == 0, running.log.read_text()


@pytest.fixture
def client(token_service: Service) -> Iterator[DashClient]:
    """The caller's client."""
    with DashClient(token_service.client.target, token=TOKEN) as client:
        yield client
