"""Fixtures of the runtime's tests."""

import shutil

import pytest

from tests.runtime.compiled_model import CompiledModel, compile_model


@pytest.fixture(scope="session")
def compiled_model(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    """A small model whose programs are compiled, once for all tests that want them."""
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    return compile_model(tmp_path_factory.mktemp("compiled-model"))
