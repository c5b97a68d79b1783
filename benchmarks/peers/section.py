"""Many streams, and one, beside peers in processes of their own: vLLM in process and served, and OpenVINO GenAI."""

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.contenders import Contender, EngineContender, LlamaCpp, check_llama_cpp
from benchmarks.figures import Report
from benchmarks.peers.child import ChildContender
from benchmarks.peers.http_stream import HttpContender
from benchmarks.peers.install import RECIPES, find_peer
from benchmarks.peers.peer_process import PeerProcess
from benchmarks.peers.vllm_options import free_port, serve_arguments, vllm_variables
from benchmarks.rounds import Effort, Work, interleaved, progress
from benchmarks.rpc import ServedContender
from benchmarks.server_process import RunningServer, running_server
from benchmarks.setting import FULL_DEPTH, INT4, WITHOUT_LOOKUP, Setting
from dash_runtime.checkpoints.embedded import embedded_gguf
from dash_runtime.config import EngineConfig

STREAMS = (4, 16, 64)
_MOST = STREAMS[-1]
_LLAMA_CPP_STREAMS = (16, 64)
_LAST_ROUND_BEGINS_SECONDS = 270
"""A round takes less than a minute, so that all of it takes less than six minutes, the loading before included."""
_RATIOS = {
    f"full_vs_vllm_{_MOST}": (f"full_{_MOST}", f"vllm_{_MOST}", "≥ 1.3"),
    f"adaptive_vs_full_{_MOST}": (f"adaptive_{_MOST}", f"full_{_MOST}", "≥ 1.1"),
    f"served_share_{_MOST}": (f"served_{_MOST}", f"full_{_MOST}", "≥ 0.85"),
    f"session_share_{_MOST}": (f"session_{_MOST}", f"full_{_MOST}", "≥ 0.85"),
    f"session_vs_vllm_{_MOST}": (f"session_{_MOST}", f"vllm_served_{_MOST}", "≥ 1.5"),
    f"served_vs_vllm_{_MOST}": (f"served_{_MOST}", f"vllm_served_{_MOST}", "≥ 1.5"),
    "adaptive_vs_llama_cpp_16": ("adaptive_16", "llama_cpp_16", "≥ 2"),
    f"adaptive_vs_llama_cpp_{_MOST}": (f"adaptive_{_MOST}", f"llama_cpp_{_MOST}", None),
    "int4_vs_openvino": ("int4_1", "openvino_1", None),
}


def measure_peers(report: Report, setting: Setting, effort: Effort, folder: Path) -> None:
    """Adds tokens per second of all streams together, ours and those of the peers in `folder`, and the ratios."""
    ends_at = time.monotonic() + _LAST_ROUND_BEGINS_SECONDS
    length = len(setting.prompts.streams(_MOST)[0]) + effort.stream_tokens
    with ExitStack() as running:
        progress("peers: starting our server")
        variables = {"DASH_SLOTS": str(_MOST), "DASH_CACHE_TOKENS": str(_MOST * length)}
        server = running.enter_context(running_server(**variables))
        running.enter_context(server.stopped())
        contenders = _ours(setting, _MOST * length, server)
        _add_llama_cpp(report, contenders, length)
        _add_peers(report, contenders, setting, folder, length, running)
        works = {
            f"{name}_{count}": _streaming(f"{name}_{count}", contender, setting, count, effort)
            for name, (contender, counts) in contenders.items()
            for count in counts
        }
        values = interleaved(report, "peers", works, effort.rounds, lambda: time.monotonic() < ends_at)
    for name in works:
        report.add(f"peers_{name}", values.get(name, []))
    for name, (upper, lower, target) in _RATIOS.items():
        report.add_ratio(name, values, upper, lower, target)
    usual = EngineConfig()
    report.note(
        f"peers_CONTENDER_N: tokens per second of N streams together, greedy, {effort.stream_tokens} new tokens of "
        f"each of up to {_MOST} different prompts of one length, from when all have their first token to the last; one "
        f"stream: {effort.num_tokens} tokens of one prompt. full, adaptive, int4: ours in process; served: ours at "
        "full depth through StreamGenerate, each stream read by a thread of the measuring process; session: all in one "
        f"session; vllm_served: each a call over HTTP, likewise. {torch.get_num_threads()} threads each; whoever has a "
        "process of its own is stopped while another one runs"
    )
    report.note(
        f"ours has {_MOST} slots and a cache of {_MOST * length} tokens here; a server's default is {usual.num_slots} "
        f"and {usual.cache_tokens} (DASH_SLOTS, DASH_CACHE_TOKENS), so that it runs {usual.num_slots} streams at a time"
    )


_Contenders = dict[str, tuple[Contender, tuple[int, ...]]]
"""Contenders by name, with the numbers of streams that each is to run."""


def _ours(setting: Setting, cache_tokens: int, server: RunningServer) -> _Contenders:
    engine = setting.build(replace(WITHOUT_LOOKUP, num_slots=_MOST, cache_tokens=cache_tokens))
    return {
        "full": (EngineContender(engine, FULL_DEPTH), STREAMS),
        "adaptive": (EngineContender(engine, setting.adaptive), STREAMS),
        "served": (ServedContender(server, FULL_DEPTH), STREAMS),
        "session": (ServedContender(server, FULL_DEPTH, in_session=True), (_MOST,)),
        "int4": (setting.ours(INT4), (1,)),
    }


def _add_llama_cpp(report: Report, contenders: _Contenders, length: int) -> None:
    with report.attempt("llama.cpp with more sequences"):
        file, num_threads = embedded_gguf(), torch.get_num_threads()
        check_llama_cpp(file, num_threads)
        # llama.cpp pads each sequence's part of the cache.
        llama_cpp = LlamaCpp(file, num_threads, max_sequences=_MOST, max_length=_round_up(length, 256))
        contenders["llama_cpp"] = (llama_cpp, _LLAMA_CPP_STREAMS)


def _add_peers(
    report: Report, contenders: _Contenders, setting: Setting, folder: Path, length: int, running: ExitStack
) -> None:
    pythons = {name: find_peer(report, name, folder) for name in RECIPES}
    scripts, num_threads = Path(__file__).parent, torch.get_num_threads()
    vllm, openvino = pythons["vllm"], pythons["openvino"]
    if vllm is not None:
        model, variables = str(setting.folder), vllm_variables(vllm, num_threads)
        with report.attempt("vLLM in process"):
            progress("peers: loading vLLM; its first start compiles")
            command = [str(vllm), "-I", str(scripts / "vllm_child.py"), model, str(_MOST), str(_round_up(length, 128))]
            child = running.enter_context(PeerProcess("vLLM", command, variables))
            contender = ChildContender(child)
            contenders["vllm"] = (contender, STREAMS)
            report.note(f"vllm: {contender.description}, bf16, from the weights that transformers gets, Intel's OpenMP")
        with report.attempt("vllm serve"):
            progress("peers: starting `vllm serve`")
            port = free_port()
            command = [str(vllm), "-I", *serve_arguments(model, port, _MOST, _round_up(length, 128))]
            served = running.enter_context(PeerProcess("vllm serve", command, variables))
            contenders["vllm_served"] = (HttpContender(served, port, model), STREAMS)
    if openvino is not None:
        with report.attempt("OpenVINO GenAI"):
            progress("peers: loading OpenVINO GenAI")
            command = [str(openvino), "-I", str(scripts / "openvino_child.py"), str(embedded_gguf()), str(num_threads)]
            child = running.enter_context(PeerProcess("OpenVINO GenAI", command, {}))
            contender = ChildContender(child)
            contenders["openvino"] = (contender, (1,))
            report.note(f"openvino: {contender.description}, from the same GGUF file")


def _streaming(name: str, contender: Contender, setting: Setting, count: int, effort: Effort) -> Work:
    prompts = [setting.prompts.single] if count == 1 else setting.prompts.streams(count)
    num_tokens = effort.num_tokens if count == 1 else effort.stream_tokens
    return lambda: {name: contender.run(prompts, num_tokens).tokens_per_second}


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
