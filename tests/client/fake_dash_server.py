"""A dash server without a model: real sockets, scripted answers, and a record of the requests."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
from fake_session import GenerationContext, SessionPlay
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from dash_api.v1 import (
    common_pb2,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)

LAYER_COUNT = 4
NOTE = "a random plan, until a trained policy ships"

Event = generation_pb2.StreamGenerateResponse
Script = list[Event | Callable[[grpc.ServicerContext], None]]


def started(**changes: Any) -> Event:
    fields: dict[str, Any] = {
        "request_id": "r-1",
        "prompt_token_count": 3,
        "seed": 42,
        "model": "fake-model",
        "mode": common_pb2.MODE_ADAPTIVE,
        "policy": "random",
        "policy_note": NOTE,
        "compute_budget": 0.8,
        "layer_count": LAYER_COUNT,
    }
    return Event(started=generation_pb2.GenerationStarted(**(fields | changes)))


def delta(text: str, token_ids: list[int], actions: list[int] | None = None, **changes: Any) -> Event:
    return Event(
        delta=generation_pb2.GenerationDelta(text=text, token_ids=token_ids, actions=bytes(actions or []), **changes)
    )


def finished(tokens: int = 3, **changes: Any) -> Event:
    decode = tokens - 1
    counts = [generation_pb2.ActionCount(action=4, count=2 * decode)]
    counts.append(generation_pb2.ActionCount(action=1, count=2 * decode))
    fields: dict[str, Any] = {
        "reason": generation_pb2.FINISH_REASON_LENGTH,
        "usage": generation_pb2.Usage(
            prompt_token_count=3,
            output_token_count=tokens,
            queue_seconds=0.25,
            prefill_seconds=0.5,
            decode_seconds=0.1,
        ),
        "depth": generation_pb2.DepthStatistics(
            decode_token_count=decode,
            action_counts=counts if decode else [],
            mean_cost=0.75 if decode else 0.0,
            exposed_policy_seconds=1e-5,
            speculative_action_counts=[generation_pb2.ActionCount(action=4, count=decode)],
        ),
    }
    return Event(finished=generation_pb2.GenerationFinished(**(fields | changes)))


HELLO: Script = [
    started(),
    delta("Hel", [10], [4, 4, 4, 4]),
    delta("", [11], [4, 1, 1, 4]),
    delta("lo", [12], [4, 1, 2, 4]),
    finished(),
]


def fail(
    code: grpc.StatusCode, message: str, *details: Any, pause_ms: int | None = None
) -> Callable[[grpc.ServicerContext], None]:
    """Returns a step of a script that ends the call with this status and google.rpc details.

    `pause_ms` is when to come back, which calls and sessions are told in different ways; -1 is never.
    """

    def step(context: grpc.ServicerContext) -> None:
        trailers: list[tuple[str, str | bytes]] = []
        own = list(details)
        if pause_ms is not None:
            trailers.append(("grpc-retry-pushback-ms", str(pause_ms)))
            if pause_ms >= 0:
                own.append(error_details_pb2.RetryInfo())
                own[-1].retry_delay.FromMilliseconds(pause_ms)
        if own:
            status = status_pb2.Status(code=code.value[0], message=message)
            for detail in own:
                status.details.add().Pack(detail)
            trailers.append(("grpc-status-details-bin", status.SerializeToString()))
        context.set_trailing_metadata(tuple(trailers))
        context.abort(code, message)

    return step


def free_port() -> int:
    """Finds a port that is free on both addresses of localhost. gRPC binds even if only one is free."""
    if not socket.has_dualstack_ipv6():
        return 0
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as probe:
        return int(probe.getsockname()[1])


class FakeDashServer(generation_pb2_grpc.GenerationServiceServicer, model_pb2_grpc.ModelServiceServicer):
    """A context manager; `target` is where it listens.

    Every generation plays `script`, or one of `scripts` if its prompt has one: events are sent, functions are called
    with the context. `decisions` holds recorded decisions by request id. `metadata` has the metadata of
    each request in `requests`.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        port: int = 0,
        serving: bool = True,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.script = HELLO if script is None else script
        self.scripts: dict[str, Script] = {}
        self.requests: list[Any] = []
        self.num_sessions = 0
        self.timeouts: list[float] = []
        """The seconds until the deadline of each request of a session; 0 for none."""
        self.metadata: list[dict[str, Any]] = []
        self.decisions: dict[str, model_pb2.GetDecisionsResponse] = {}
        self.loading: str | None = None
        """The message of GetModel's refusal while the model is loaded; None: it answers."""
        self.cancelled = threading.Event()
        self._has_waited = False
        self._health = health.HealthServicer()
        self.set_serving(serving)
        self._pool = ThreadPoolExecutor(max_workers=4)
        self._server = grpc.server(self._pool)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        address = f"localhost:{port or free_port()}"
        if credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, credentials)
        self.target = f"localhost:{port}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends all calls and closes the port."""
        self._server.stop(grace=0).wait()
        self._pool.shutdown(wait=True)

    def set_serving(self, serving: bool) -> None:
        statuses = health_pb2.HealthCheckResponse
        self._health.set("", statuses.SERVING if serving else statuses.NOT_SERVING)

    def wait(self, context: Any) -> None:
        """Waits until the call or the server ends; a step of a script."""
        over = threading.Event()
        if context.add_callback(over.set):
            over.wait()

    def wait_once(self, context: Any) -> None:
        """Waits like `wait`, the first time only."""
        if not self._has_waited:
            self._has_waited = True
            self.wait(context)

    def begin(self, request: Any, context: Any) -> Script:
        """Records a generation; returns its script."""
        self._record(request, context)
        return self.scripts.get(request.parameters.text, self.script)

    def _record(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))

    def StreamGenerate(  # noqa: N802
        self, request: generation_pb2.StreamGenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[Event]:
        played = threading.Event()
        if not context.add_callback(lambda: None if played.is_set() else self.cancelled.set()):
            self.cancelled.set()
        try:
            for step in self.begin(request, context):
                if isinstance(step, Event):
                    yield step
                else:
                    step(context)
        finally:
            if context.is_active():
                played.set()

    def Session(  # noqa: N802
        self, requests: Iterator[generation_pb2.SessionRequest], context: grpc.ServicerContext
    ) -> Iterator[generation_pb2.SessionResponse]:
        self.num_sessions += 1
        return SessionPlay(context, self._begin_in_session, self.cancelled).run(requests)

    def _begin_in_session(self, request: generation_pb2.SessionRequest, context: GenerationContext) -> Script:
        self.timeouts.append(request.timeout_seconds)
        return self.begin(request.generate, context)

    def Generate(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> generation_pb2.GenerateResponse:
        response = generation_pb2.GenerateResponse()
        for step in self.begin(request, context):
            if not isinstance(step, Event):
                step(context)
            elif step.WhichOneof("event") == "delta":
                # Repeated fields are appended; text and bytes are replaced by a merge.
                text = response.output.text + step.delta.text
                actions = response.output.actions + step.delta.actions
                response.output.MergeFrom(step.delta)
                response.output.text, response.output.actions = text, actions
            else:
                response.started.MergeFrom(step.started)
                response.finished.MergeFrom(step.finished)
        return response

    def GetModel(  # noqa: N802
        self, request: model_pb2.GetModelRequest, context: grpc.ServicerContext
    ) -> model_pb2.GetModelResponse:
        self._record(request, context)
        if self.loading is not None:
            reason = error_details_pb2.ErrorInfo(reason="WORKER_UNAVAILABLE")
            fail(grpc.StatusCode.UNAVAILABLE, self.loading, reason)(context)
        return model_pb2.GetModelResponse(
            name="fake-model",
            architecture="LlamaForCausalLM",
            layer_count=LAYER_COUNT,
            vocabulary_size=100,
            context_length=64,
            max_new_tokens_limit=64,
            default_max_new_tokens=16,
            cache_tokens=128,
            slot_count=2,
            actions=[1, 2, 4, 9],
            modes=[1, 2, 9],
            default_mode=common_pb2.MODE_FULL_DEPTH,
            policy_names=["random"],
            default_policy_name="random",
            device="cpu",
        )

    def GetPolicy(  # noqa: N802
        self, request: model_pb2.GetPolicyRequest, context: grpc.ServicerContext
    ) -> model_pb2.GetPolicyResponse:
        self._record(request, context)
        if request.name not in ("", "random"):
            context.abort(grpc.StatusCode.NOT_FOUND, f"no policy is called {request.name!r}")
        return model_pb2.GetPolicyResponse(
            name="random",
            note=NOTE,
            lookahead=1,
            pinned_layers=[0, 3],
            action_costs=[model_pb2.ActionCost(action=4, cost=1.0), model_pb2.ActionCost(action=1, cost=0.1)],
            lowest_budget=0.4,
            recommended_budget=0.8,
            compensation="identity",
        )

    def Tokenize(  # noqa: N802
        self, request: model_pb2.TokenizeRequest, context: grpc.ServicerContext
    ) -> model_pb2.TokenizeResponse:
        self._record(request, context)
        return model_pb2.TokenizeResponse(token_ids=[1, 2, 3])

    def GetAudit(  # noqa: N802
        self, request: model_pb2.GetAuditRequest, context: grpc.ServicerContext
    ) -> model_pb2.GetAuditResponse:
        self._record(request, context)
        if request.request_id != "audited":
            context.abort(grpc.StatusCode.NOT_FOUND, "no audit of that request of yours is held")
        return model_pb2.GetAuditResponse(
            request_id="audited",
            policy="random",
            compute_budget=0.5,
            token_count=12,
            agreement=0.75,
            logprob_gap=-0.25,
            divergence=0.125,
        )

    def GetDecisions(  # noqa: N802
        self, request: model_pb2.GetDecisionsRequest, context: grpc.ServicerContext
    ) -> model_pb2.GetDecisionsResponse:
        self._record(request, context)
        if request.request_id not in self.decisions:
            context.abort(grpc.StatusCode.NOT_FOUND, "no decisions of that request of yours are held")
        return self.decisions[request.request_id]
