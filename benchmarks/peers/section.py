"""Many streams, and one, beside peers in processes of their own: vLLM in process and served, llama.cpp in the fastest
format of each class, and OpenVINO GenAI."""

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.contenders import Contender, EngineContender
from benchmarks.figures import Report
from benchmarks.peers.child import ChildContender
from benchmarks.peers.gguf_formats import of_class, start_formats
from benchmarks.peers.gptq_folder import write_gptq_folder
from benchmarks.peers.http_stream import HttpContender
from benchmarks.peers.install import find_peer
from benchmarks.peers.peer_process import PeerProcess
from benchmarks.peers.vllm_options import free_port, serve_arguments, vllm_variables
from benchmarks.rounds import Effort, Work, interleaved, progress
from benchmarks.rpc import ServedContender
from benchmarks.server_process import RunningServer, running_server
from benchmarks.setting import FULL_DEPTH, INT4, PLAIN, Setting
from dash_runtime.checkpoints.embedded import embedded_gguf
from dash_runtime.config import EngineConfig
from dash_runtime.files.disk_cache import digest

STREAMS = (4, 16, 64)
_MOST = STREAMS[-1]
_LLAMA_CPP_STREAMS = (16, 64)
_LAST_ROUND_BEGINS_SECONDS = 480
"""A round takes less than two minutes, so that all of it takes some ten, the loading before included."""
_RATIOS = {
    f"adaptive_vs_full_{_MOST}": (f"adaptive_{_MOST}", f"full_{_MOST}", "≥ 1.1"),
    f"served_share_{_MOST}": (f"served_{_MOST}", f"full_{_MOST}", "≥ 0.85"),
    f"session_share_{_MOST}": (f"session_{_MOST}", f"full_{_MOST}", "≥ 0.85"),
    "int4_vs_openvino": ("int4_1", "openvino_1", None),
}
_VLLM = ("vllm", "vllm_served")
_RATIOS_TO_BEST = {
    "adaptive_vs_vllm_int4_16": ("adaptive_16", ["vllm_int4_16"], None),
    f"full_vs_vllm_{_MOST}": (f"full_{_MOST}", [f"{name}_{_MOST}" for name in _VLLM], "≥ 1.3"),
    f"session_vs_vllm_{_MOST}": (f"session_{_MOST}", [f"{name}_{_MOST}" for name in _VLLM], "≥ 1.5"),
    f"served_vs_vllm_{_MOST}": (f"served_{_MOST}", [f"{name}_{_MOST}" for name in _VLLM], "≥ 1.5"),
    **{
        f"{own}_vs_llama_cpp_{count}": (
            f"{own}_{count}",
            [f"{name}_{count}" for name in of_class("llama_cpp", bits)],
            "≥ 2" if bits == 4 else "≥ 1.5",
        )
        for own, bits in (("adaptive", 4), ("full", 16))
        for count in _LLAMA_CPP_STREAMS
    },
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
        _add_llama_cpp(report, contenders, setting, folder, length, effort, running)
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
    for name, (upper, lowers, target) in _RATIOS_TO_BEST.items():
        report.add_ratio_to_best(name, values, upper, lowers, target)
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
    engine = setting.build(replace(PLAIN, num_slots=_MOST, cache_tokens=cache_tokens))
    return {
        "full": (EngineContender(engine, FULL_DEPTH), STREAMS),
        "adaptive": (EngineContender(engine, setting.adaptive), STREAMS),
        "served": (ServedContender(server, FULL_DEPTH), STREAMS),
        "session": (ServedContender(server, FULL_DEPTH, in_session=True), (_MOST,)),
        "int4": (setting.ours(INT4), (1,)),
    }


def _add_llama_cpp(
    report: Report,
    contenders: _Contenders,
    setting: Setting,
    folder: Path,
    length: int,
    effort: Effort,
    running: ExitStack,
) -> None:
    """Adds the format of each class that is fastest in one turn of all, behind one that warms up, with 16 streams."""
    # llama.cpp pads each sequence's part of the cache.
    sizes = {"max_sequences": _MOST, "max_length": _round_up(length, 256)}
    formats = start_formats(report, running, "llama_cpp", folder, embedded_gguf(), **sizes)
    count, speeds = _LLAMA_CPP_STREAMS[0], dict[str, float]()
    progress(f"peers: llama.cpp's formats, {count} streams")
    for name, contender in formats.items():
        contender.run(setting.prompts.streams(count), 2)
        speeds |= _streaming(name, contender, setting, count, effort)()
    for bits in (4, 16):
        own = [name for name in of_class("llama_cpp", bits) if name in speeds]
        if own:
            fastest = max(own, key=lambda name: speeds[name])
            contenders[fastest] = (formats[fastest], _LLAMA_CPP_STREAMS)
    told = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
    report.note(f"llama.cpp's formats, {count} streams, tokens per second of the one turn that chose: {told}")


def _add_peers(
    report: Report, contenders: _Contenders, setting: Setting, folder: Path, length: int, running: ExitStack
) -> None:
    pythons = {name: find_peer(report, name, folder) for name in ("vllm", "openvino")}
    scripts, num_threads = Path(__file__).parent, torch.get_num_threads()
    vllm, openvino = pythons["vllm"], pythons["openvino"]
    if vllm is not None:
        model, variables = str(setting.folder), vllm_variables(vllm, num_threads)
        for name, streams in {"vllm": STREAMS, "vllm_int4": (16,)}.items():
            with report.attempt(name):
                progress(f"peers: loading {name}; its first start compiles")
                own = model if name == "vllm" else str(_in_int4(setting.folder, folder))
                contender = start_vllm(running, vllm, own, _MOST, length, name)
                contenders[name] = (contender, streams)
                report.note(f"{name}: {contender.description}, from the weights that transformers gets, Intel's OpenMP")
        report.note(
            "vllm_int4: weights rounded to the nearest in groups of 32, in GPTQ's layout; this build multiplies them "
            "with INT8 activations (W4A8) where the processor has AMX, and else in bf16"
        )
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


def start_vllm(
    running: ExitStack, python: Path, model: str, num_streams: int, length: int, name: str = "vllm"
) -> ChildContender:
    """Starts vLLM in a process that ends with `running`, for so many streams of up to `length` tokens."""
    script = str(Path(__file__).parent / "vllm_child.py")
    command = [str(python), "-I", script, model, str(num_streams), str(_round_up(length, 128))]
    variables = vllm_variables(python, torch.get_num_threads())
    return ChildContender(running.enter_context(PeerProcess(name, command, variables)))


def _in_int4(checkpoint: Path, folder: Path) -> Path:
    return write_gptq_folder(checkpoint, folder / "gptq" / f"{checkpoint.name}-{digest(checkpoint.stat().st_mtime_ns)}")


def _streaming(name: str, contender: Contender, setting: Setting, count: int, effort: Effort) -> Work:
    prompts = [setting.prompts.single] if count == 1 else setting.prompts.streams(count)
    num_tokens = effort.num_tokens if count == 1 else effort.stream_tokens
    return lambda: {name: contender.run(prompts, num_tokens).tokens_per_second}


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
