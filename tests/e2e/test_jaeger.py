"""Traces of a real server in a real Jaeger, read back through its query API. `make jaeger` builds one."""

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from dash_client import Action, Generation
from tests.e2e.service import Service
from tests.e2e.test_tracing import UNPINNED, traced_service
from tests.runtime.random_policy import NAME
from tests.server.server_harness import free_port

ROOT = Path(__file__).resolve().parents[2]
JAEGER = shutil.which("jaeger") or shutil.which("jaeger", path=str(Path(sys.executable).parent))
PORTS = {"0.0.0.0:16686": "query", "127.0.0.1:13133": "health", "0.0.0.0:4317": "otlp"}

ADAPTIVE = {"mode": "adaptive", "compute_budget": 1.0, "policy_name": NAME}
NUM_ADAPTIVE_SPANS = 2 + 12 + 11 * len(UNPINNED)

pytestmark = [
    pytest.mark.jaeger,
    pytest.mark.skipif(JAEGER is None, reason="needs a jaeger on the path: make jaeger"),
]


class Jaeger:
    """A Jaeger with the stack's configuration, but for its ports."""

    def __init__(self, folder: Path) -> None:
        self.ports = {name: free_port() for name in PORTS.values()}
        text = (ROOT / "deploy" / "jaeger.yaml").read_text()
        for address, name in PORTS.items():
            assert text.count(address) == 1
            text = text.replace(address, f"127.0.0.1:{self.ports[name]}")
        self._config = folder / "jaeger.yaml"
        self._config.write_text(text)
        self._log = folder / "jaeger.log"

    def start(self) -> None:
        assert JAEGER is not None
        with self._log.open("a") as log:
            command = [JAEGER, "--config", str(self._config)]
            environment = {"OTEL_TRACES_SAMPLER": "always_off"}  # as in docker-compose.yml
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.until(lambda: self.ask("health", "status")["status"] == "StatusOK")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def ask(self, port: str, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[port]}/{path}", timeout=5) as response:
            return json.load(response)

    def until(self, is_there: Callable[[], bool], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if is_there():
                    return
            except OSError as error:  # not there yet, or no such trace yet
                last: object = error
            else:
                last = "not there"
            assert time.monotonic() < deadline, (last, self._log.read_text()[-2000:])
            time.sleep(0.1)

    def found(self, **query: str) -> list[dict[str, Any]]:
        """Returns the traces that a search finds."""
        traces: list[dict[str, Any]] = self.ask("query", f"api/traces?{urlencode(query)}")["data"]
        return traces

    def trace(self, request_id: str, num_spans: int) -> "ShownTrace":
        """Returns a request's trace when it has that many spans."""
        query = {"service": "dash-llm", "tags": json.dumps({"dash.request_id": request_id})}
        self.until(lambda: any(len(trace["spans"]) >= num_spans for trace in self.found(**query)))
        (trace,) = self.found(**query)
        return ShownTrace(trace)


class ShownTrace:
    """A trace as Jaeger's pages get it."""

    def __init__(self, trace: dict[str, Any]) -> None:
        self.spans: list[dict[str, Any]] = trace["spans"]
        self.services = {key: process["serviceName"] for key, process in trace["processes"].items()}
        self._parents = {span["spanID"]: reference["spanID"] for span in self.spans for reference in span["references"]}
        (self.root,) = (span for span in self.spans if span["spanID"] not in self._parents)

    def check(self) -> None:
        """Checks that nothing is orphaned, outside its parent, or warned of."""
        known = {span["spanID"]: span for span in self.spans}
        assert len(known) == len(self.spans)
        for span in self.spans:
            assert not span["warnings"]
            if span is not self.root:
                parent = known[self._parents[span["spanID"]]]
                assert parent["startTime"] <= span["startTime"]
                end, parents_end = (each["startTime"] + each["duration"] for each in (span, parent))
                assert end <= parents_end + 1  # whole microseconds

    def children(self, parent: dict[str, Any]) -> list[dict[str, Any]]:
        own = [span for span in self.spans if self._parents.get(span["spanID"]) == parent["spanID"]]
        return sorted(own, key=lambda span: (span["startTime"], tags(span).get("dash.layer", 0)))

    @property
    def generation(self) -> dict[str, Any]:
        (generation,) = self.children(self.root)
        return generation


def tags(span: dict[str, Any]) -> dict[str, Any]:
    return {tag["key"]: tag["value"] for tag in span["tags"]}


@pytest.fixture(scope="module")
def jaeger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jaeger]:
    jaeger = Jaeger(tmp_path_factory.mktemp("jaeger"))
    jaeger.start()
    yield jaeger
    jaeger.kill()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, jaeger: Jaeger) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("traced")
    options = {"OTEL_METRICS_EXPORTER": "none", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "2"}
    with traced_service(folder, tiny_folder, f"http://127.0.0.1:{jaeger.ports['otlp']}", **options) as service:
        yield service


def traced(service: Service, **options: Any) -> Generation:
    return service.client.generate("trace this", trace=True, ignore_eos=True, max_new_tokens=12, **options)


def test_decisions_of_the_worker_are_found_and_a_skipped_layer_can_be_searched_for(
    service: Service, jaeger: Jaeger
) -> None:
    answer = traced(service, **ADAPTIVE)
    trace = jaeger.trace(answer.started.request_id, NUM_ADAPTIVE_SPANS)
    of_worker = {span["operationName"] for span in trace.spans if trace.services[span["processID"]] != "dash-llm"}
    assert {trace.services[span["processID"]] for span in (trace.root, trace.generation)} == {"dash-llm"}
    assert set(jaeger.ask("query", "api/services")["data"]) == {"dash-llm", "dash-llm-worker"}
    operations = set(jaeger.ask("query", "api/services/dash-llm-worker/operations")["data"])
    assert of_worker <= operations
    (skipped, *_) = (name for name in operations if name.startswith("skip layer "))
    assert jaeger.found(service="dash-llm-worker", operation=skipped)
    step = service.client.decisions(answer.started.request_id).steps[0]
    spans = trace.children(trace.children(trace.generation)[1])
    for layer, span in zip(UNPINNED, spans, strict=True):
        decided = step.layers[layer].decision
        assert decided is not None
        for action, score in decided.scores.items():
            assert tags(span)[f"dash.scores.{action.name.lower()}"] == pytest.approx(score)


@pytest.mark.parametrize(
    ("options", "num_spans"),
    [
        (ADAPTIVE, NUM_ADAPTIVE_SPANS),
        (ADAPTIVE | {"mode": "exact"}, 2 + 12),
        ({"mode": "full_depth"}, 2 + 12),
        ({"mode": "fixed", "fixed_action": Action.SKIP}, 2 + 12),
    ],
    ids=lambda options: options["mode"] if isinstance(options, dict) else "",
)
def test_answers_of_every_mode_arrive_whole(
    service: Service, jaeger: Jaeger, options: dict[str, Any], num_spans: int
) -> None:
    trace = jaeger.trace(traced(service, **options).started.request_id, num_spans)
    trace.check()
    tokens = [span for span in trace.children(trace.generation) if span["operationName"] == "token"]
    assert len(tokens) == 12
    assert tags(trace.generation)["dash.mode"] == options["mode"]


def test_spans_arrive_again_after_jaeger_was_killed(service: Service, jaeger: Jaeger) -> None:
    jaeger.kill()
    assert len(traced(service, mode="full_depth").token_ids) == 12, "no request suffers"
    jaeger.start()

    def is_there_again() -> bool:
        traced(service, mode="full_depth")
        return bool(jaeger.found(service="dash-llm"))

    jaeger.until(is_there_again, seconds=60)
