"""Fixtures of the server's tests."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.server_harness import write_model_folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model: a byte tokenizer and a chat template."""
    return write_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def root_logger_as_it_was() -> Iterator[None]:
    """Takes back what a test does with `configure_logging`."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
