"""Measures what the service adds to the engine: the same streams in the engine alone and through gRPC, in turn."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.contenders import Contender, require_cached
from benchmarks.figures import Report
from benchmarks.rounds import Effort, Work, interleaved, progress
from benchmarks.runs import Arrivals, Run, run_from_arrivals
from benchmarks.server_process import DEADLINE_SECONDS, RunningServer, running_server
from benchmarks.setting import Setting
from dash_client import DashClient, Session
from dash_runtime.config import SkipOptions

_TARGETS = {1: "≤ 0.05", 16: "≤ 0.10"}


class ServedContender:
    """Streams through a stopped server, which is awake meanwhile, each read by a thread of this process.

    They are calls of their own, or all in one session.
    """

    def __init__(self, server: RunningServer, skip: SkipOptions, *, in_session: bool = False) -> None:
        self._server = server
        self._skip = skip
        self._in_session = in_session

    def run(self, prompts: Sequence[list[int]], num_tokens: int) -> Run:
        client = self._server.client
        with self._server.awake(), client.session() as session, ThreadPoolExecutor(len(prompts)) as pool:
            asked = session if self._in_session else client
            started = time.perf_counter()
            streams = list(pool.map(lambda prompt: self._read(asked, prompt, num_tokens), prompts))
        return run_from_arrivals(started, streams)

    def _read(self, asked: DashClient | Session, prompt: list[int], num_tokens: int) -> Arrivals:
        arrivals: list[tuple[float, int]] = []
        stream = asked.stream(
            prompt,
            mode=str(self._skip.mode),
            compute_budget=self._skip.compute_budget,
            temperature=0,
            max_new_tokens=num_tokens,
            ignore_eos=True,
            timeout=DEADLINE_SECONDS,
        )
        with stream:
            for delta in stream:
                if delta.token_ids:
                    arrivals.append((time.perf_counter(), len(delta.token_ids)))
            require_cached(stream.final().usage.cached_prompt_token_count, 0)
        return arrivals


def measure_rpc(report: Report, setting: Setting, effort: Effort) -> None:
    """Adds the overhead in seconds per token of the server over the engine, and the time to the first token."""
    progress("service: starting for the streams")
    with running_server() as server, server.stopped():
        contenders: dict[str, Contender] = {
            "engine": setting.ours(setting.adaptive),
            "server": ServedContender(server, setting.adaptive),
            "session": ServedContender(server, setting.adaptive, in_session=True),
        }
        works: dict[str, Work] = {
            f"{name}_{count}": _streaming(f"{name}_{count}", contender, setting, count, effort)
            for count in _TARGETS
            for name, contender in contenders.items()
            if count > 1 or name != "session"
        }
        values = interleaved(report, "engine and server", works, effort.rounds)
    for count, target in _TARGETS.items():
        for name, overhead, speed in (("server", "rpc_overhead", "served"), ("session", "session_overhead", "session")):
            alone, served = values.get(f"engine_{count}"), values.get(f"{name}_{count}")
            if alone and served:
                overheads = [through / own - 1 for own, through in zip(alone, served, strict=True)]
                report.add(f"{overhead}_{count}", overheads, target)
                report.add(f"{speed}_tokens_per_second_{count}", [1 / seconds for seconds in served])
    if "engine_1" in values and "server_1" in values:
        added = [served - own for own, served in zip(values["engine_1"], values["server_1"], strict=True)]
        report.add("split_ipc_and_grpc_seconds", added)
    report.add("time_to_first_token_seconds", values.get("server_1_first", []))
    report.note(
        f"rpc_overhead_N: ADAPTIVE, N streams through StreamGenerate with the Python client, each read by a thread of "
        f"the measuring process, over the engine alone in that process; the server is stopped meanwhile. "
        f"{effort.num_tokens} new tokens for one stream, {effort.stream_tokens} each for several; "
        "session_overhead_N is the same with all streams in one session. split_ipc_and_grpc_seconds is the difference "
        "for one stream, time_to_first_token_seconds that of one short prompt at the client"
    )


def _streaming(name: str, contender: Contender, setting: Setting, count: int, effort: Effort) -> Work:
    prompts = setting.prompts.streams(count)
    num_tokens = effort.num_tokens if count == 1 else effort.stream_tokens

    def work() -> Mapping[str, float]:
        run = contender.run(prompts, num_tokens)
        return {name: run.seconds_per_token, f"{name}_first": run.seconds_to_first}

    return work
