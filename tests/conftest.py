"""Fixtures of all tests: a tiny model, randomly initialised, with a byte-level tokenizer; and the embedded model.

And the order in which files begin.
"""

import os
import signal
from pathlib import Path

import pytest

from dash_runtime.checkpoints import default_cache_folder, resolve_checkpoint
from dash_runtime.devices.triton import leave_triton_out
from tests.runtime.native_code import lay_library_for_processes
from tests.tiny_models import save_tiny_model

# A background run starts with SIGINT ignored, and processes that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
leave_triton_out()


LONG_FILES = (
    "test_draws.py",
    "test_code_blocks.py",
    "test_cuda_backend.py",
    "test_policy_command.py",
    "test_soak.py",
    "test_split_model.py",
    "test_fake_cuda.py",
    "test_small_machines.py",
    "test_gpu_once.py",
    "test_native_checks.py",
    "test_service.py",
    "test_native_rows.py",
)
"""The longest files, of `make test` and of `make test-long`. Each process of xdist takes two to begin with: one of the
first four, and one of the next four."""


def pytest_configure(config: pytest.Config) -> None:
    """Runs everything at the level of processors that `DASH_TEST_LEVEL` names (`make test-levels`). The cache folder is
    the level's own: nobody's server is to find what is laid there."""
    if (level := os.environ.get("DASH_TEST_LEVEL")) and not hasattr(config, "workerinput"):
        os.environ["XDG_CACHE_HOME"] = str(config.rootpath / ".venv" / "levels" / level)
        lay_library_for_processes()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets the long files begin first: begun last, they would keep one process busy while the others are done."""
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of six layers in Hugging Face layout, whose matrices suit every kernel."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def embedded_cache() -> Path:
    """The user's own cache folder, so that the embedded model is converted once, not in every run."""
    return default_cache_folder(os.environ)


@pytest.fixture(scope="session")
def embedded_folder(embedded_cache: Path) -> Path:
    """The embedded model, converted."""
    return resolve_checkpoint("embedded", None, embedded_cache)
