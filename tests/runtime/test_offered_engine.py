"""An engine without FULL, and one that serves before anything was measured."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from dash_runtime.actions import Action
from dash_runtime.config import EngineConfig, GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.engine.engine import Engine
from dash_runtime.errors import InvalidRequest
from dash_runtime.events import EngineEvent
from dash_runtime.startup.build import BuildOptions, build_engine
from tests.runtime.native_model import NUM_THREADS, SmallModel
from tests.runtime.support import finished, run_alone, tokens

PROMPT = [5, 9, 2, 77, 31, 8]


def engine_of(model: SmallModel, cache: Path, actions: Sequence[Action] | None, **options: bool) -> Engine:
    (cache / "native").parent.mkdir(parents=True, exist_ok=True)
    if not (cache / "native").exists():
        (cache / "native").symlink_to(model.cache_folder / "native")
    own = BuildOptions(["cpu"], num_threads=NUM_THREADS, actions=actions, checks_kept_costs=False, **options)
    return build_engine(model.folder, cache, own, EngineConfig(num_slots=2, cache_tokens=512), lambda said: None)


@pytest.fixture(scope="module")
def without_full(small_model: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine_of(small_model, tmp_path_factory.mktemp("without"), [Action.INT8, Action.INT4, Action.SKIP])


def run(engine: Engine, skip: SkipOptions) -> list[EngineEvent]:
    return run_alone(engine, request(skip))[0]


def request(skip: SkipOptions, count: int = 12) -> GenerationRequest:
    return GenerationRequest("own", PROMPT, StoppingParameters(count, ignore_eos=True), skip=skip)


def test_without_full_the_highest_action_makes_prompts_first_tokens_and_verification(without_full: Engine) -> None:
    assert without_full.facts.actions == (Action.SKIP, Action.INT4, Action.INT8)
    int8 = run(without_full, SkipOptions(Mode.FIXED, fixed_action=Action.INT8))
    assert tokens(int8) == tokens(run(without_full, SkipOptions(Mode.EXACT)))
    assert _ran(int8) == {Action.INT8}
    for skip in (
        SkipOptions(Mode.ADAPTIVE),
        *(SkipOptions(Mode.FIXED, fixed_action=own) for own in (Action.SKIP, Action.INT4)),
    ):
        events = run(without_full, skip)
        assert tokens(events)[0] == tokens(int8)[0]
        assert Action.FULL not in _ran(events)


def test_full_depth_without_full_is_refused_by_name(without_full: Engine) -> None:
    with pytest.raises(InvalidRequest, match="needs FULL, which is not offered here") as refused:
        without_full.submit(request(SkipOptions(Mode.FULL_DEPTH)))
    assert refused.value.field == "skip.mode"
    with pytest.raises(InvalidRequest, match="FULL, which is not offered here; offered: SKIP, INT4, INT8"):
        without_full.submit(request(SkipOptions(Mode.FIXED, fixed_action=Action.FULL)))


def test_costs_without_full_are_shares_of_a_token_in_the_highest_action(without_full: Engine) -> None:
    events = run(without_full, SkipOptions(Mode.FIXED, fixed_action=Action.INT8))
    assert finished(events).depth.total_cost == pytest.approx(11, abs=0.1)


def test_an_engine_serves_before_it_has_measured_and_measures_what_later_starts_read(
    small_model: SmallModel, tmp_path: Path
) -> None:
    engine = engine_of(small_model, tmp_path, None, serves_first=True)
    assert not engine.later.is_done
    before = tokens(run(engine, SkipOptions(Mode.FULL_DEPTH)))
    served = list[int]()

    def serve() -> None:
        if not served and not engine.has_work:
            served.append(len(tokens(run(engine, SkipOptions(Mode.ADAPTIVE)))))

    engine.later.serve_others = serve
    engine.later.finish()
    assert served == [12]
    assert tokens(run(engine, SkipOptions(Mode.FULL_DEPTH))) == before
    again = engine_of(small_model, tmp_path, None, serves_first=True)
    assert again.later.is_done
    assert again.facts.policies == engine.facts.policies


def _ran(events: list[EngineEvent]) -> set[Action]:
    return {action for action, count in finished(events).depth.action_counts.items() if count}
