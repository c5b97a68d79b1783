"""Traces and decisions of the real worker, as a real collector and the real client receive them."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dash_client import Action, Generation, StepKind
from tests.e2e.service import REPEATABLE, Service
from tests.runtime.random_policy import NAME, save_random_policy
from tests.server.otlp_receiver import OtlpReceiver, Trace, attributes_of, otlp_receiver

LAYERS, UNPINNED = 6, [1, 2, 3, 4]


@pytest.fixture(scope="module")
def collector() -> Iterator[OtlpReceiver]:
    with otlp_receiver() as receiver:
        yield receiver


@contextmanager
def traced_service(folder: Path, model: Path, endpoint: str, **variables: str) -> Iterator[Service]:
    """Runs a server whose policy is a random one and whose spans go to `endpoint`."""
    service = Service(
        folder,
        model,
        DASH_POLICY_FILE=str(save_random_policy(folder / "policy.safetensors", model)),
        OTEL_EXPORTER_OTLP_ENDPOINT=endpoint,
        **REPEATABLE,
        **variables,
    )
    yield service
    assert service.stop() == 0, service.log.read_text()
    assert "Traceback" not in service.log.read_text()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, collector: OtlpReceiver) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("traced")
    with traced_service(folder, tiny_folder, collector.endpoint, DASH_TRACE_LAYERS="true") as service:
        yield service


def traced(service: Service, collector: OtlpReceiver, **options: object) -> tuple[Generation, Trace]:
    collector.spans.clear()
    answer = service.client.generate(
        "trace this", trace=True, return_decisions=True, ignore_eos=True, max_new_tokens=12, **options
    )
    return answer, asyncio.run(collector.trace())


def test_one_adaptive_request_is_one_tree_with_every_decision(service: Service, collector: OtlpReceiver) -> None:
    answer, trace = traced(service, collector, mode="adaptive", compute_budget=1.0, policy_name=NAME)
    trace.check()
    assert trace.children(trace.root) == [trace.generation]
    tokens = trace.children(trace.generation)
    assert [span.name for span in tokens] == ["token"] * 12
    assert answer.decisions is not None
    assert not trace.children(tokens[0]), "the prefill's"
    for token, plan in zip(tokens[1:], answer.decisions[1:], strict=True):
        layers = [span for span in trace.children(token) if span.name.startswith("layer ")]
        decisions = [attributes_of(span.attributes) for span in trace.children(token) if span not in layers]
        assert [decision["dash.layer"] for decision in decisions] == UNPINNED
        assert [decision["dash.action"] for decision in decisions] == [plan[layer].name.lower() for layer in UNPINNED]
        assert [attributes_of(span.attributes)["dash.layer"] for span in layers] == list(range(LAYERS))
        ends = [span.end_time_unix_nano for span in layers]
        assert all(end <= span.start_time_unix_nano for end, span in zip(ends, layers[1:], strict=False))
    assert len(trace.spans) == 2 + 12 + 11 * (len(UNPINNED) + LAYERS)


def test_full_depth_has_layers_and_no_decisions(service: Service, collector: OtlpReceiver) -> None:
    _, trace = traced(service, collector, mode="full_depth")
    trace.check()
    assert {span.name for span in trace.spans} == {
        *(trace.root.name, trace.generation.name, "token"),
        *(f"layer {layer}" for layer in range(LAYERS)),
    }


def test_in_exact_every_output_token_has_a_span_and_rejected_drafts_are_below_their_draft(
    service: Service, collector: OtlpReceiver
) -> None:
    answer, trace = traced(service, collector, mode="exact", policy_name=NAME, compute_budget=1.0)
    trace.check()
    assert len(trace.children(trace.generation, "token")) == 12
    usage = answer.usage.speculation
    assert usage is not None
    drafts = trace.children(trace.generation, "draft")
    assert sum(attributes_of(draft.attributes)["dash.draft.drafted"] for draft in drafts) == usage.drafted_token_count
    assert len(trace.named("verification")) == usage.verification_count == len(drafts)
    rejected = [span for draft in drafts for span in trace.children(draft, "rejected token")]
    assert rejected == trace.named("rejected token")


def test_the_client_gets_the_same_decisions(service: Service) -> None:
    answer = service.client.generate(
        "and this",
        mode="adaptive",
        compute_budget=1.0,
        policy_name=NAME,
        return_decisions=True,
        ignore_eos=True,
        max_new_tokens=9,
    )
    recorded = service.client.decisions(answer.started.request_id)
    assert [step.kind for step in recorded.steps] == [StepKind.DECODE] * 8
    assert [step.token_ids[0] for step in recorded.steps] == list(answer.token_ids[1:])
    assert answer.decisions is not None
    for step, plan in zip(recorded.steps, answer.decisions[1:], strict=True):
        assert tuple(layer.action for layer in step.layers) == plan
        assert [number for number, layer in enumerate(step.layers) if layer.decision is not None] == UNPINNED
        assert plan[0] is plan[-1] is Action.FULL
