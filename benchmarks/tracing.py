"""`python -m benchmarks.tracing`: measures what recording and exporting decisions costs.

Servers of the same model answer the same requests in turn: one records nothing, the other records and exports none, a
tenth or all of the requests. The collector accepts everything and reads nothing, so that its own work is not measured.
Run it alone on the machine, like every benchmark.
"""

import argparse
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import grpc

from benchmarks.figures import Report
from benchmarks.prompts import Prompts
from benchmarks.rounds import interleaved, progress
from benchmarks.server_process import running_server
from dash_client import DashClient
from dash_runtime.checkpoints import default_cache_folder, resolve_checkpoint, tokenizer_file
from dash_runtime.config import EngineConfig, GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.engine.engine import Engine
from dash_runtime.startup.build import BuildOptions, build_engine

_REQUESTS, _TOKENS, _STEPS = 10, 128, 32
_PROMPT_TOKENS = 32
_POLICY = "smollm2-135m-four-actions"
"""By name: a fixed plan, which may be better, decides nothing that could be recorded."""
_TRACED = {"nothing_recorded": 0, "none_sampled": 0, "tenth_sampled": 1, "all_sampled": _REQUESTS}
_TARGETS = {"none_sampled": "≥ 0.99", "tenth_sampled": "≥ 0.97", "all_sampled": "≥ 0.9"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tracing", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds: int = parser.parse_args().rounds
    cache_folder = default_cache_folder(os.environ)
    folder = resolve_checkpoint("embedded", None, cache_folder)
    prompt = Prompts(tokenizer_file(folder)).text(_PROMPT_TOKENS)
    report = Report()
    config = EngineConfig(record_steps=_STEPS)
    measure_recording(report, build_engine(folder, cache_folder, BuildOptions(["cpu"]), config, progress), prompt)
    measure_serving(report, prompt, rounds)
    report.print()


def measure_recording(report: Report, engine: Engine, prompt: list[int]) -> None:
    """Measures microseconds per decision for recording and packing a request's decisions."""
    stopping = StoppingParameters(_STEPS + 1, ignore_eos=True)
    values = []
    for number in range(20):
        skip = SkipOptions(Mode.ADAPTIVE, policy_name=_POLICY)
        request = GenerationRequest(str(number), prompt, stopping, skip=skip, is_immediate=True)
        engine.submit(request)
        for _ in range(_STEPS):  # stops before the last step, so that the sequence still exists
            engine.step()
        recorder = engine._running[request.request_id].recorder
        started_ns = time.perf_counter_ns()
        packed = recorder.packed(request.request_id)
        assert packed is not None
        for _ in range(len(packed.steps) * packed.num_layers * 2):  # the clock readings of the layer loop
            time.perf_counter_ns()
        elapsed_ns = time.perf_counter_ns() - started_ns
        num_decisions = len(packed.steps) * (packed.num_layers - len(packed.pinned_layers))
        values.append(elapsed_ns / num_decisions / 1000)
        engine.cancel(request.request_id)
    engine.close()
    report.add("recording_us_per_decision", values[2:], "≤ 1")


def measure_serving(report: Report, prompt: list[int], rounds: int) -> None:
    """Adds tokens per second of one stream after another."""
    with ExitStack() as stack:
        endpoint = stack.enter_context(_collector())
        traced = {
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": endpoint,
            "OTEL_METRICS_EXPORTER": "none",
            "DASH_TRACE_STEPS": str(_STEPS),
            "DASH_TRACE_RATIO": "0",
        }
        plain = stack.enter_context(running_server(DASH_TRACE_STEPS="0", DASH_RECENT_REQUESTS="0")).client
        tracing = stack.enter_context(running_server(**traced)).client
        works = {
            name: (lambda name=name: {name: _tokens_per_second(plain if "nothing" in name else tracing, prompt, name)})
            for name in _TRACED
        }
        values = interleaved(report, "tracing", works, rounds)
    for name in _TRACED:
        report.add(f"{name}_tokens_per_second", values.get(name, []))
    for name, target in _TARGETS.items():
        report.add_ratio(f"{name}_vs_nothing_recorded", values, name, "nothing_recorded", target)
    report.note(
        f"{_REQUESTS} requests of {_TOKENS} tokens one after the other, ADAPTIVE, {_STEPS} steps recorded of each; a "
        "span for each decision, and none for layers; server, worker, collector and client share the machine's cores"
    )


def _tokens_per_second(client: DashClient, prompt: list[int], name: str) -> float:
    started = time.perf_counter()
    for number in range(_REQUESTS):
        is_traced = number < _TRACED[name]
        options = {"mode": "adaptive", "policy_name": _POLICY, "trace": is_traced}
        client.generate(prompt, max_new_tokens=_TOKENS, ignore_eos=True, **options)
    return _REQUESTS * _TOKENS / (time.perf_counter() - started)


@contextmanager
def _collector() -> Iterator[str]:
    """Runs an OTLP endpoint that answers every export with an empty message, which means success."""
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")

    class TakesAnything(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return handler

    server = grpc.server(ThreadPoolExecutor(2), handlers=[TakesAnything()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(0)


if __name__ == "__main__":
    main()
