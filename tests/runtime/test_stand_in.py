"""An engine that stands in while native code is compiled: made in a hurry, with every mode, and nothing of it kept."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from dash_runtime.actions import Action
from dash_runtime.config import EngineConfig, GenerationRequest, Mode, SkipOptions, Start, StoppingParameters
from dash_runtime.constraint import Constraint, ConstraintKind
from dash_runtime.engine.engine import Engine
from dash_runtime.events import EndReason
from dash_runtime.startup.build import BuildOptions, build_engine
from dash_runtime.startup.placement import CACHE, ModelBytes, Room
from dash_runtime.startup.stand_in import has_room_for_two
from tests.runtime.native_code import NATIVE_SIZES
from tests.runtime.support import drain, finished
from tests.tiny_models import save_tiny_model

STOPPING = StoppingParameters(12, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that native code can decode."""
    return save_tiny_model(tmp_path_factory.mktemp("compilable") / "model", "llama", **NATIVE_SIZES)


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def stand_in(model: Path, cache_folder: Path, compiler: None) -> Engine:
    said: list[str] = []
    options = BuildOptions(["cpu"], num_threads=1, start=Start.EARLY)
    engine = build_engine(model, cache_folder, options, EngineConfig(num_slots=4, cache_tokens=2048), said.append)
    assert "layers run uncompiled until their programs are compiled" in said
    assert not any("measuring" in sentence or "searching" in sentence for sentence in said)
    return engine


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Something that is called as a compiler is; nothing here compiles."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "g++").write_text("#!/bin/sh\nexit 1\n")
    (folder / "g++").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder))
        yield


def test_a_stand_in_says_what_it_is_and_keeps_only_what_holds_for_every_engine(
    stand_in: Engine, cache_folder: Path
) -> None:
    assert stand_in.facts.is_stand_in
    assert not stand_in.facts.is_compiled
    assert stand_in.facts.actions == tuple(Action)
    kept = Counter(path.name.partition("-")[0] for path in (cache_folder / "calibration").iterdir())
    assert kept == {"compensation": 1}


def test_its_costs_are_corrected_by_served_steps_and_never_measured_idly(stand_in: Engine) -> None:
    assert stand_in.cost_watch is not None
    assert stand_in.cost_watch.seconds_until_idle_work() == float("inf")


@pytest.mark.parametrize(
    "skip",
    [
        SkipOptions(Mode.FULL_DEPTH),
        SkipOptions(Mode.ADAPTIVE),
        SkipOptions(Mode.ADAPTIVE, compute_budget=0.01),
        SkipOptions(Mode.EXACT),
        SkipOptions(Mode.EXACT, draft_length=3),
        *(SkipOptions(Mode.FIXED, fixed_action=action) for action in Action),
    ],
    ids=str,
)
def test_a_stand_in_serves_every_mode_and_any_budget(stand_in: Engine, skip: SkipOptions) -> None:
    stand_in.submit(GenerationRequest("alone", [1, 2, 3], STOPPING, skip=skip))
    for constraint in (None, Constraint(ConstraintKind.CHOICES, '["yes", "no"]')):
        stand_in.submit(GenerationRequest(f"by {constraint}", [4, 5], STOPPING, skip=skip, constraint=constraint))
    alone, beside, constrained = (finished(events) for events in drain(stand_in).values())
    assert alone.num_output_tokens == beside.num_output_tokens == STOPPING.max_new_tokens
    assert constrained.reason is EndReason.END_OF_SEQUENCE


def test_two_engines_need_room_for_both_and_for_the_compilers() -> None:
    gigabyte = 1 << 30
    needs = ModelBytes(
        [Counter({CACHE: gigabyte // 4, Action.FULL.name: gigabyte})] * 2, Counter(), Counter(), True, Counter()
    )
    # Weights 2, cache 0.5, a worker's own 1; the stand-in has the weights twice.
    assert not has_room_for_two(needs, Room("cpu", 9 * gigabyte - 1, fills_lazily=True), 2)
    assert has_room_for_two(needs, Room("cpu", 9 * gigabyte, fills_lazily=True), 2)
    assert not has_room_for_two(needs, Room("cpu", 9 * gigabyte, fills_lazily=True), 8)
    assert has_room_for_two(needs, Room("cpu", None, fills_lazily=True), 8)
