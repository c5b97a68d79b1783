"""Fixtures of the runtime's tests."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_once.live_report import LiveReport
from benchmarks.gpu_once.model import Model, build_model
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.constraints import ConstraintCompiler
from dash_runtime.native.levels import best_level, levels_here
from dash_runtime.native.library import NativeLibrary
from dash_runtime.native.recipe import Level
from dash_runtime.startup.measure_costs import measure_costs
from dash_runtime.training.calibrate import CALIBRATION_PRICES
from tests.marks import long
from tests.runtime.native_code import at_level
from tests.runtime.native_code import native_library as load_native_library
from tests.runtime.native_model import SmallModel, save_small_model
from tests.runtime.planned_engine import EOS
from tests.runtime.support import CPU, AtOnce, load_decoder
from tests.tiny_models import VOCAB_SIZE, save_byte_tokenizer

_MEASURING = ("startup.measured_engine", "training.loaded_model")


@pytest.fixture(scope="session")
def rows_folder(embedded_cache: Path) -> Path:
    """Returns the native code's folder: in the user's own cache, so that it is compiled once, not in every run."""
    return embedded_cache / "native"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a C++ compiler."""
    monkeypatch.setenv("PATH", "")


@pytest.fixture(scope="session")
def native_library() -> NativeLibrary:
    """The native code."""
    return load_native_library()


_levels = levels_here() or [best_level()]


@pytest.fixture(
    scope="module",
    params=[*_levels[:1], *long(_levels[1:-1]), *_levels[1:][-1:]],
    ids=lambda level: level.name,
)
def each_level(request: pytest.FixtureRequest) -> Iterator[Level]:
    """Runs the tests of a module with native code of every level that this machine has; of those between the best and
    the lowest, which have little of their own, in `make test-long`."""
    with at_level(request.param):
        yield request.param


@pytest.fixture(scope="session")
def small_model(
    tmp_path_factory: pytest.TempPathFactory, rows_folder: Path, native_library: NativeLibrary
) -> SmallModel:
    """A small model whose native code is compiled, once for all tests that want it."""
    model = save_small_model(tmp_path_factory.mktemp("compiled-model"))
    model.cache_folder.mkdir()
    (model.cache_folder / "native").symlink_to(rows_folder)
    return model


@pytest.fixture(scope="session")
def byte_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a tokenizer whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return folder / "tokenizer.json"


@pytest.fixture(scope="session")
def compiler(byte_tokenizer_file: Path) -> ConstraintCompiler:
    """Compiles constraints for it."""
    return ConstraintCompiler(byte_tokenizer_file, VOCAB_SIZE, {EOS}, executor=AtOnce())


@pytest.fixture(scope="session")
def decoder(tiny_folder: Path) -> Decoder:
    """The tiny Llama in bfloat16, with every action."""
    return load_decoder(tiny_folder, torch.bfloat16)


@pytest.fixture
def report(tmp_path: Path) -> LiveReport:
    """A report of the run for a GPU."""
    return LiveReport(tmp_path, 1000)


@pytest.fixture
def model(report: LiveReport) -> Model:
    """The tiny model of that run."""
    built = build_model(report, "tiny", CPU, 4096)
    assert built is not None
    return built


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to train, calibrate and evaluate on: 18 sequences for a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Line {number} says something of its own.\n" for number in range(60)))
    return path


@pytest.fixture(scope="module")
def short_measurements() -> Iterator[None]:
    """Lets starts and `dash-policy` measure costs in two rounds, and calibrate at a quarter of the prices on a quarter
    of the text: whole measurements would take most of the time of the tests that start engines or train."""
    with pytest.MonkeyPatch.context() as patch:
        for module in _MEASURING:
            patch.setattr(f"dash_runtime.{module}.measure_costs", partial(measure_costs, rounds=2))
        for module in ("measure", "measure_latency"):
            patch.setattr(f"dash_runtime.startup.{module}.SECONDS", 0.2)
        patch.setattr("dash_runtime.training.ladder.measure_costs", partial(measure_costs, rounds=1))
        patch.setattr("dash_runtime.evaluation.serving._ROUNDS", 1)
        for name in ("train.CALIBRATION", "quantize.HELD_OUT"):
            patch.setattr(f"dash_runtime.commands.{name}_SEQUENCES", 6)
        patch.setattr("dash_runtime.training.calibrate.CALIBRATION_PRICES", CALIBRATION_PRICES[::4])
        yield
