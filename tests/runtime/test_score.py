"""A given output gets the log probabilities that a generation in the same mode has, at once or token by token."""

from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.config import GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.engine import Engine
from dash_runtime.errors import InvalidRequest
from dash_runtime.events import EndReason, EngineEvent, TokenProduced
from tests.runtime.planned_engine import ACTIONS, make_engine
from tests.runtime.support import finished, load_decoder, run, tokens
from tests.tiny_models import VOCAB_SIZE

MODES = {
    "full": SkipOptions(Mode.FULL_DEPTH),
    "adaptive": SkipOptions(Mode.ADAPTIVE, compute_budget=0.9),
    "fixed": SkipOptions(Mode.FIXED, fixed_action=Action.SKIP),
}
PROMPT = list(range(10, 90))
EOS = 7


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> Decoder:
    return load_decoder(tiny_folder, torch.float32, ACTIONS)


def planned_engine(decoder: Decoder, **options: int) -> Engine:
    return make_engine(decoder, eos=frozenset({EOS}), **options)


def score(scored: list[int], mode: str = "full", prompt: list[int] = PROMPT, name: str = "s") -> GenerationRequest:
    stopping = StoppingParameters(len(scored), ignore_eos=True)
    return GenerationRequest(name, prompt, stopping, skip=MODES[mode], logprobs=2, scored_token_ids=scored)


def generation(mode: str, prompt: list[int] = PROMPT) -> GenerationRequest:
    return GenerationRequest("g", prompt, StoppingParameters(12, ignore_eos=True), skip=MODES[mode], logprobs=2)


def log_probabilities(events: list[EngineEvent]) -> list[float]:
    found = [event.logprobs for event in events if isinstance(event, TokenProduced)]
    return [own.chosen for own in found if own is not None]


@pytest.mark.parametrize("mode", MODES)
def test_an_output_scores_what_it_had_when_it_was_generated(decoder: Decoder, mode: str) -> None:
    generated = run(planned_engine(decoder), generation(mode))["g"]
    scored = run(planned_engine(decoder), score(tokens(generated), mode))["s"]
    assert tokens(scored) == tokens(generated)
    assert log_probabilities(scored) == pytest.approx(log_probabilities(generated), abs=1e-4)
    assert finished(scored).reason is EndReason.LENGTH
    assert finished(scored).depth.num_decode_tokens == 11
    assert finished(scored).depth.mean_cost == pytest.approx(finished(generated).depth.mean_cost)


def test_any_output_can_be_given_the_end_of_sequence_among_it(decoder: Decoder) -> None:
    scored = [3, EOS, 250, EOS, 9]
    events = run(planned_engine(decoder), score(scored), score(scored, "fixed", name="f"))
    for name in ("s", "f"):
        assert tokens(events[name]) == scored
        assert len(log_probabilities(events[name])) == 5
        assert all(value < 0 for value in log_probabilities(events[name]))


@pytest.mark.parametrize("num_scored", [1, 2, 150])
@pytest.mark.parametrize("chunk", [16, 64, 256])
def test_neither_chunks_nor_kept_prompts_nor_neighbours_change_a_score(
    decoder: Decoder, num_scored: int, chunk: int
) -> None:
    scored = [(place * 37 + 11) % VOCAB_SIZE for place in range(num_scored)]
    expected = log_probabilities(run(planned_engine(decoder), score(scored))["s"])
    assert len(expected) == num_scored
    engine = planned_engine(decoder, prefill_chunk_tokens=chunk)
    beside = run(engine, generation("adaptive"), score(scored))
    assert log_probabilities(beside["s"]) == pytest.approx(expected, abs=1e-4)
    again = run(engine, score(scored))
    assert finished(again["s"]).num_cached_prompt_tokens == 64
    assert log_probabilities(again["s"]) == pytest.approx(expected, abs=1e-4)
    assert engine.num_reserved_cache_tokens == 0


def test_what_cannot_be_scored_is_refused_by_name(decoder: Decoder) -> None:
    engine = planned_engine(decoder)
    with pytest.raises(InvalidRequest, match=r"continuation\[1\]: 9999"):
        engine.submit(score([1, 9999]))
    with pytest.raises(InvalidRequest, match="continuation: must not be empty"):
        GenerationRequest("r", PROMPT, StoppingParameters(1), scored_token_ids=[])
    assert not engine.has_work
