"""Fixtures of the runtime's tests."""

import shutil
from collections.abc import Iterator
from functools import partial

import pytest

from dash_runtime.startup.measure_costs import measure_costs
from tests.runtime.compiled_model import CompiledModel, compile_model


@pytest.fixture(scope="session")
def compiled_model(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    """A small model whose programs are compiled, once for all tests that want them."""
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    return compile_model(tmp_path_factory.mktemp("compiled-model"))


@pytest.fixture(scope="module")
def short_measurements() -> Iterator[None]:
    """Lets `dash-policy` measure costs in two rounds: all of them would take half the time of the tests that train."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("commands.search", "commands.task_quality", "commands.train", "training.ladder"):
            patch.setattr(f"dash_runtime.{module}.measure_costs", partial(measure_costs, rounds=2))
        yield
