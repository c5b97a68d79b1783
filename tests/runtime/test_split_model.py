"""A model whose layers lie on two devices computes what it computes on one, bit for bit."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.config import (
    EngineConfig,
    GenerationRequest,
    Mode,
    SamplingParameters,
    SkipOptions,
    StoppingParameters,
)
from dash_runtime.decoder.backends.split import SplitBackend
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.engine import Engine
from dash_runtime.events import EngineEvent
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Compensation, Dense, Identity, Scale
from dash_runtime.layers.split_compensation import compensation_over
from dash_runtime.passes import PassPlan
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.startup.build import BuildOptions, build_engine
from dash_runtime.startup.measured_engine import assemble_engine
from tests.marks import long
from tests.runtime.support import (
    ALL_ACTIONS,
    drain,
    finished,
    full_plan,
    load_decoder,
    new_cache,
    produced,
    run_rows,
    some_affine,
    some_costs,
    some_low_rank,
    some_plans,
    some_policy,
    tokens,
)
from tests.runtime.twin_devices import TWINS, TwinOperations, twin_devices
from tests.tiny_models import save_tiny_model

PLACES = [TWINS[0]] * 2 + [TWINS[1]] * 4
NEARLY_FREE = {1: 0.1, 3: 0.1, 7: 0.1}
PROMPT = [number % 250 for number in range(7, 140)]


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwinOperations]:
    with twin_devices(monkeypatch) as operations:
        yield operations


def policy_over(decoder: Decoder) -> LearnedPolicy:
    """Returns a policy that sees layers of both devices, and skips with a low-rank map."""
    pinned = {0: Action.FULL, 5: Action.FULL}
    spec = PlanSpec(ALL_ACTIONS, pinned=pinned, lookahead=1, block_size=1, head=Action.INT8, costs=some_costs())
    compensation = compensation_over(some_low_rank(decoder), decoder.devices)
    points = (0.5, 1.0, 0.1), (1.0, 0.0, 0.01)
    policy = some_policy(spec, decoder.config.hidden_size, *points, compensation=compensation)
    return replace(policy, network=policy.network.to(decoder.device))


def make_engine(decoder: Decoder) -> Engine:
    config = EngineConfig(num_slots=4, cache_tokens=2048, prefix_cache_tokens=256, record_steps=16)
    catalog = PolicyCatalog(
        some_costs(),
        ALL_ACTIONS,
        compensation_over(some_affine(decoder), decoder.devices),
        (policy_over(decoder),),
        0.8,
        NEARLY_FREE,
        least_drafting_gain=0,
        plans=some_plans(),
    )
    return assemble_engine(decoder, catalog, config, 512, frozenset())


SKIPS = {
    "full": SkipOptions(Mode.FULL_DEPTH),
    "int4": SkipOptions(Mode.FIXED, fixed_action=Action.INT4),
    "skip": SkipOptions(Mode.FIXED, fixed_action=Action.SKIP),
    "adaptive": SkipOptions(Mode.ADAPTIVE, policy_name="mine", compute_budget=0.6),
    "exact": SkipOptions(Mode.EXACT, policy_name="mine", compute_budget=0.6),
}


def answers(engine: Engine) -> dict[str, list[EngineEvent]]:
    """Runs a request in each mode by itself, then all together; all but the first reuse its prompt."""
    events: dict[str, list[EngineEvent]] = {}
    for together in ([], [*SKIPS]):
        for name in together or SKIPS:
            sampling = SamplingParameters(repetition_penalty=1.2) if together else SamplingParameters()
            engine.submit(
                GenerationRequest(
                    f"{name}{' with others' * bool(together)}",
                    PROMPT,
                    StoppingParameters(8),
                    sampling,
                    SKIPS[name],
                    logprobs=3,
                    return_decisions=True,
                )
            )
            if not together:
                events |= drain(engine)
    return events | drain(engine)


def scores(events: list[EngineEvent]) -> list[bytes]:
    trace = finished(events).trace
    assert trace is not None
    return [step.scores for step in trace.steps]


def test_every_mode_gives_the_same_on_two_devices_as_on_one(tiny_folder: Path, twins: TwinOperations) -> None:
    expected, split = (
        answers(make_engine(load_decoder(tiny_folder))),
        answers(make_engine(load_decoder(tiny_folder, device=PLACES))),
    )
    assert twins.num_moved > 0
    for name, events in expected.items():
        assert produced(split[name]) == produced(events), name
        assert scores(split[name]) == scores(events), name
        assert finished(split[name]).num_cached_prompt_tokens == (0 if name == "full" else 128)
    speculation = finished(split["exact"]).speculation
    assert speculation is not None
    assert speculation.num_drafted > 0
    plans = b"".join(event.plan for event in produced(split["adaptive"]))
    assert set(plans) >= {Action.SKIP, Action.FULL}


@pytest.mark.parametrize("family", ["gemma3", *long(["llama-untied-biased", "qwen2-sliding-window", "olmo3-yarn"])])
def test_models_of_other_families_give_the_same(tmp_path: Path, twins: TwinOperations, family: str) -> None:
    folder = save_tiny_model(tmp_path / "model", family)

    def logits(decoder: Decoder) -> Tensor:
        compensation = compensation_over(some_affine(decoder), decoder.devices)
        caches = decoder.caches([64, 64])
        steps = [
            run_rows(decoder, [cache], [range(1, 20 + row)], [full_plan(decoder)]) for row, cache in enumerate(caches)
        ]
        for step in range(4):
            plans = [[ALL_ACTIONS[(row + layer + step) % 4] for layer in range(decoder.num_layers)] for row in range(2)]
            steps.append(run_rows(decoder, caches, [[3 + step], [5 + step]], plans, compensation, Action.INT4))
        return torch.cat([step.cpu() for step in steps])

    assert torch.equal(logits(load_decoder(folder, device=PLACES)), logits(load_decoder(folder)))


def test_the_hidden_state_moves_once_a_pass_and_not_at_all_on_one_device(
    tiny_folder: Path, twins: TwinOperations
) -> None:
    for places, expected in ((PLACES, 1), (TWINS[:1] * 6, 0)):
        decoder = load_decoder(tiny_folder, device=places)
        (cache,) = decoder.caches([32])
        batch = decoder.batch(PassKind.PREFILL, [cache], [4], [Identity()])
        before = twins.num_moved
        hidden = decoder.run_pass(PassPlan.of(full_plan(decoder)), [1, 2, 3, 4], batch).states
        assert hidden is not None
        assert hidden.device == places[-1]
        assert twins.num_moved - before == expected


def test_one_device_has_nothing_around_its_backends(tiny_folder: Path) -> None:
    decoder = load_decoder(tiny_folder)
    assert not any(isinstance(own, SplitBackend) for backends in decoder.backends.values() for own in backends)
    affine = some_affine(decoder)
    assert compensation_over(affine, decoder.devices) is affine


def some_dense(decoder: Decoder) -> Dense:
    shape = (decoder.num_layers, decoder.config.hidden_size)
    generator = torch.Generator().manual_seed(4)
    return Dense(torch.randn(*shape, shape[1], generator=generator), torch.randn(shape, generator=generator))


@pytest.mark.parametrize("make", [lambda decoder: Scale(torch.rand(6)), some_affine, some_low_rank, some_dense])
def test_compensation_follows_its_layers(tiny_folder: Path, twins: TwinOperations, make: object) -> None:
    whole: Compensation = make(load_decoder(tiny_folder))  # type: ignore[operator]
    split = compensation_over(whole, PLACES)
    assert split.kind is whole.kind
    hidden = torch.randn(3, 96, generator=torch.Generator().manual_seed(6))
    for layer, device in enumerate(PLACES):
        own = split(layer, hidden.to(device))
        assert own.device == device
        assert torch.equal(own.cpu(), whole(layer, hidden))


def test_the_fake_refuses_operands_of_two_devices(twins: TwinOperations) -> None:
    first, second = (torch.ones(2).to(device) for device in TWINS)
    for mixed in (lambda: first + second, lambda: first + torch.ones(2), lambda: torch.cat([second, first])):
        with pytest.raises(RuntimeError, match="operands on"):
            mixed()
    assert (first.to(TWINS[1]) + second).tolist() == [2.0, 2.0]


@pytest.mark.usefixtures("short_measurements")
@pytest.mark.long
def test_a_start_calibrates_and_serves_on_two_devices(tmp_path: Path, twins: TwinOperations) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama", num_hidden_layers=4, max_position_embeddings=64)
    said: list[str] = []
    options = BuildOptions([str(device) for device in TWINS], precision="float32", checks_kept_costs=False)
    engine = build_engine(folder, tmp_path, options, EngineConfig(num_slots=2), said.append)
    places = [line.split(" need")[0] for line in said if " need " in line]
    assert places == ["cpu:1: layers 0 to 1", "cpu:2: layers 2 to 3"]
    engine.submit(GenerationRequest("a", [1, 2, 3], StoppingParameters(8)))
    assert tokens(drain(engine)["a"]) == most_probable(load_decoder(folder), [1, 2, 3], 8)


def most_probable(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    cache, token_ids = new_cache(decoder, 64), prompt
    chosen: list[int] = []
    while len(chosen) < count:
        token_ids = [int(run_rows(decoder, [cache], [token_ids], [full_plan(decoder)])[-1].argmax())]
        chosen += token_ids
    return chosen
