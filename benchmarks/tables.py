"""The tables of the docs, by the names of their figures. Knows names and words; knows no files and no models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, Mapping[str, Any]]
"""As `latest.json` has them, by name."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a label and figures, one a column. With aims, a last column has each row's."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    has_aims: bool = False

    def lines(self, figures: Figures) -> list[str]:
        """Returns the table in Markdown. Rows without any figure are left out."""
        head = [*self.columns, *(["aim"] if self.has_aims else [])]
        lines = [_row(head), _row(["---"] * len(head))]
        for label, names in self.rows:
            known = [figures.get(name) for name in names]
            if not any(known):
                continue
            cells = [label, *(_cell(figure) for figure in known)]
            if self.has_aims:
                aims = [figure["target"] for figure in known if figure and figure["target"]]
                cells.append(f"{aims[0]}, {'met' if known[0] and known[0]['met'] else 'missed'}" if aims else "–")
            lines.append(_row(cells))
        return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "–"
    value, low, high = (_number(figure[part]) for part in ("value", "low", "high"))
    return value if low == high == value else f"{value} ({low} … {high})"


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def _speed(name: str) -> tuple[str, ...]:
    return f"{name}_tokens_per_second", f"prefill_tokens_per_second_{name}", f"divergence_{name}"


_GGUF = {
    "file": "the file, Q4_1", "q4_0": "Q4_0", "iq4_nl": "IQ4_NL", "q4_k_m": "Q4_K_M", "q8_0": "Q8_0", "bf16": "BF16",
}  # fmt: skip


def _single(*rows: tuple[str, str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Returns rows of one figure each."""
    return tuple((words, (name,)) for words, name in rows)


def _streams(name: str) -> tuple[str, ...]:
    return tuple(f"peers_{name}_{count}" for count in (4, 16, 64))


TABLES: Mapping[str, Table] = {
    "one stream": Table(
        ("", "new tokens a second", "prompt tokens a second", "nats from full depth"),
        (
            (
                "**ours**, full depth",
                ("full_depth_tokens_per_second", "prefill_tokens_per_second", "divergence_full_depth"),
            ),
            ("**ours**, INT8 everywhere", _speed("int8")),
            ("**ours**, INT4 everywhere", _speed("int4")),
            ("**ours**, the policy at its recommended budget", _speed("adaptive")),
            ("transformers `generate`, bf16", _speed("transformers")),
            ("the same, compiled, static cache", _speed("transformers_compiled")),
            *((f"llama.cpp, {words}", _speed(f"llama_cpp_{kind}")) for kind, words in _GGUF.items()),
            *((f"ik_llama.cpp, {words}", _speed(f"ik_llama_cpp_{kind}")) for kind, words in _GGUF.items()),
            ("OpenVINO GenAI, from the file", ("peers_openvino_1", "", "")),
        ),
    ),
    "ratios": Table(
        ("one stream", "times as fast"),
        _single(
            ("INT4 ÷ llama.cpp's fastest 4-bit format", "int4_vs_llama_cpp"),
            ("INT8 ÷ llama.cpp's Q8_0", "int8_vs_llama_cpp"),
            ("full depth ÷ llama.cpp's BF16", "full_depth_vs_llama_cpp"),
            ("the policy ÷ llama.cpp's fastest 4-bit format", "adaptive_vs_llama_cpp"),
            ("INT4 ÷ ik_llama.cpp's fastest 4-bit format", "int4_vs_ik_llama_cpp"),
            ("INT8 ÷ ik_llama.cpp's Q8_0", "int8_vs_ik_llama_cpp"),
            ("full depth ÷ ik_llama.cpp's BF16", "full_depth_vs_ik_llama_cpp"),
            ("full depth ÷ the faster of transformers' two", "full_depth_vs_transformers"),
            ("the policy ÷ INT4 everywhere, without prompt lookup", "adaptive_vs_best_fixed"),
            ("the same with prompt lookup, as served", "lookup_adaptive_vs_int4"),
            ("the same where answers copy", "lookup_copy_adaptive_vs_int4"),
            ("a prompt at full depth ÷ the fastest peer", "prefill_full_vs_best_peer"),
            ("a prompt in INT8 ÷ the same", "prefill_int8_vs_best_peer"),
            ("full depth behind 1,500 tokens ÷ behind 50", "long_context_ratio_full"),
            ("the policy behind 1,500 tokens ÷ behind 50", "long_context_ratio_adaptive"),
        ),
        has_aims=True,
    ),
    "streams": Table(
        ("tokens a second of all streams together", "4", "16", "64"),
        (
            ("**ours** in process, full depth", _streams("full")),
            ("**ours** in process, the policy", _streams("adaptive")),
            ("**ours** over gRPC, full depth, a call each", _streams("served")),
            ("**ours** over gRPC, full depth, one session", _streams("session")),
            ("vLLM in process, bf16", _streams("vllm")),
            ("`vllm serve`, bf16", _streams("vllm_served")),
            ("vLLM in process, INT4", _streams("vllm_int4")),
            *((f"llama.cpp, {words}", _streams(f"llama_cpp_{kind}")) for kind, words in _GGUF.items()),
            ("transformers, one batch", ("", "transformers_tokens_per_second_16", "")),
        ),
    ),
    "stream ratios": Table(
        ("many streams", ""),
        _single(
            ("64 streams, full depth ÷ the faster of vLLM's two", "full_vs_vllm_64"),
            ("64 streams over gRPC in one session ÷ the same", "session_vs_vllm_64"),
            ("64 streams over gRPC, a call each ÷ the same", "served_vs_vllm_64"),
            ("16 streams, full depth ÷ llama.cpp's BF16", "full_vs_llama_cpp_16"),
            ("64 streams, full depth ÷ llama.cpp's BF16", "full_vs_llama_cpp_64"),
            ("16 streams, the policy ÷ llama.cpp's fastest 4-bit format", "adaptive_vs_llama_cpp_16"),
            ("64 streams, the policy ÷ llama.cpp's fastest 4-bit format", "adaptive_vs_llama_cpp_64"),
            ("16 streams, the policy ÷ full depth", "adaptive_vs_full_16"),
            ("64 streams, the policy ÷ full depth", "adaptive_vs_full_64"),
            ("64 streams over gRPC in one session ÷ in process", "session_share_64"),
            ("64 streams over gRPC, a call each ÷ in process", "served_share_64"),
            ("gRPC and worker process on top of the engine, one stream", "rpc_overhead_1"),
            ("the same, 16 streams, a call each", "rpc_overhead_16"),
            ("the same, 16 streams, one session", "session_overhead_16"),
        ),
        has_aims=True,
    ),
    "lookup": Table(
        ("with prompt lookup ÷ without", "usual answers", "answers that copy"),
        tuple(
            (words, (f"lookup_{mode}", f"lookup_copy_{mode}"))
            for mode, words in (("full_depth", "full depth"), ("int4", "INT4"), ("adaptive", "the policy"))
        ),
    ),
    "exact": Table(
        ("", "times as fast"),
        _single(
            ("EXACT ÷ full depth, usual answers", "exact_vs_served_full_depth"),
            ("EXACT ÷ full depth, answers that copy", "exact_copy_vs_served_full_depth"),
            ("the slowest of all prompts", "exact_worst_prompt"),
            ("4 streams together", "exact_vs_served_full_depth_4"),
            ("16 streams together", "exact_vs_served_full_depth_16"),
            ("EXACT ÷ transformers, usual answers", "exact_vs_transformers"),
            ("EXACT ÷ transformers' prompt lookup, answers that copy", "exact_copy_vs_prompt_lookup"),
        ),
        has_aims=True,
    ),
    "parts": Table(
        ("", ""),
        _single(
            ("a skipped layer ÷ one in INT4", "skip_vs_int4_low_rank"),
            ("evaluations of the policy, share of an INT4 step", "evaluations_share"),
            ("outside of layers, head and policy: INT4", "dispatch_share_int4_1"),
            ("the same: the policy", "dispatch_share_adaptive_1"),
            ("the same: full depth", "dispatch_share_full_depth_1"),
            ("memory bandwidth, GB/s", "memory_bandwidth_gb_per_second"),
            ("what an answer says it cost, mean error", "cost_error"),
            ("warm start, seconds", "warm_start_seconds"),
            ("memory of server and worker, GB", "rss_gb"),
            ("INT4 beside an endless loop ÷ one thread alone", "served_busy_vs_quiet"),
            ("a schema ÷ free: full depth", "full_depth_schema_vs_free"),
            ("a schema ÷ free: INT4", "int4_schema_vs_free"),
            ("drawn ÷ greedy, INT4, one stream", "int4_drawn_vs_greedy"),
            ("drawn ÷ greedy, INT4, 16 streams", "int4_16_drawn_vs_greedy"),
        ),
        has_aims=True,
    ),
    "headline": Table(
        ("one stream, same file", "tokens a second", "nats from full depth"),
        (
            ("**ours**, full depth", ("full_depth_tokens_per_second", "divergence_full_depth")),
            ("**ours**, INT4", ("int4_tokens_per_second", "divergence_int4")),
            ("**ours**, the policy", ("adaptive_tokens_per_second", "divergence_adaptive")),
            ("llama.cpp, the file as it is", ("llama_cpp_file_tokens_per_second", "divergence_llama_cpp_file")),
            ("llama.cpp, Q4_0", ("llama_cpp_q4_0_tokens_per_second", "divergence_llama_cpp_q4_0")),
            ("ik_llama.cpp, the file as it is", ("ik_llama_cpp_file_tokens_per_second", "divergence_llama_cpp_file")),
            ("ik_llama.cpp, Q4_0", ("ik_llama_cpp_q4_0_tokens_per_second", "divergence_llama_cpp_q4_0")),
            ("transformers, compiled", ("transformers_compiled_tokens_per_second", "")),
        ),
    ),
}
