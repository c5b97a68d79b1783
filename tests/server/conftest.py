"""Fixtures of the server's tests."""

from pathlib import Path

import pytest

from tests.server.server_harness import write_model_folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model: a byte tokenizer and a chat template."""
    return write_model_folder(tmp_path_factory.mktemp("model"))
