"""One stream: decode and prefill speed of every contender, and the share of memory bandwidth that decoding uses."""

from collections.abc import Mapping

import torch

from benchmarks.contenders import Contender, prefill_action_of
from benchmarks.figures import Report
from benchmarks.memory import Bandwidth, weight_bytes
from benchmarks.peers.gguf_formats import of_class
from benchmarks.rounds import Effort, Work, interleaved
from benchmarks.setting import FULL_DEPTH, INT3, INT4, INT8, Setting
from benchmarks.shipped import costs_of
from dash_runtime.actions import Action
from dash_runtime.config import GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.engine.engine import Engine
from dash_runtime.events import TokenProduced
from dash_runtime.policy.policy import fixed_head

_PREFILL_TOKENS = 512
_TRANSFORMERS = ["transformers", "transformers_compiled"]
_RATIOS_TO_BEST = {
    "full_depth_vs_transformers": ("full_depth", _TRANSFORMERS, "≥ 2.0"),
    "adaptive_vs_transformers": ("adaptive", _TRANSFORMERS, "≥ 6"),
    "int4_vs_llama_cpp": ("int4", of_class("llama_cpp", 4), "≥ 1.6"),
    "adaptive_vs_llama_cpp": ("adaptive", of_class("llama_cpp", 4), "≥ 1.75"),
    "int8_vs_llama_cpp": ("int8", of_class("llama_cpp", 8), "≥ 1.3"),
    "full_depth_vs_llama_cpp": ("full_depth", of_class("llama_cpp", 16), "≥ 1.1"),
    "int4_vs_ik_llama_cpp": ("int4", of_class("ik_llama_cpp", 4), "≥ 1.6"),
    "int8_vs_ik_llama_cpp": ("int8", of_class("ik_llama_cpp", 8), "≥ 1.3"),
    "full_depth_vs_ik_llama_cpp": ("full_depth", of_class("ik_llama_cpp", 16), "≥ 1.1"),
}
"""Each over the best of its class: four bits, eight, or sixteen."""
_RATIOS = {
    "int8_vs_full_depth": ("int8", "full_depth", None),
    "int4_vs_full_depth": ("int4", "full_depth", None),
    "int3_vs_int4": ("int3", "int4", None),
    "adaptive_vs_full_depth": ("adaptive", "full_depth", None),
    "adaptive_vs_best_fixed": ("adaptive", "int4", "≥ 1.10"),
}


def measure_decode(report: Report, setting: Setting, effort: Effort) -> None:
    """Adds tokens per second of every contender, the ratios with targets, and the policy's exposed share."""
    contenders: dict[str, Contender] = {
        "full_depth": setting.ours(FULL_DEPTH),
        "int8": setting.ours(INT8),
        "int4": setting.ours(INT4),
        "adaptive": setting.ours(setting.adaptive),
        "adaptive_default": setting.ours(SkipOptions(Mode.ADAPTIVE)),
    }
    if Action.INT3 in setting.engine.facts.actions:  # where `dash-policy quantize` made its weights
        contenders["int3"] = setting.ours(INT3)
    contenders |= setting.rivals
    prompt = setting.prompts.single
    works = {name: _decoding(name, contender, prompt, effort.num_tokens) for name, contender in contenders.items()}
    values = interleaved(report, "decoding", works | {"bandwidth": _reading(Bandwidth())}, effort.rounds)
    for name in contenders:
        report.add(f"{name}_tokens_per_second", values.get(name, []))
    for name, (upper, lower, target) in _RATIOS.items():
        report.add_ratio(name, values, upper, lower, target)
    for name, (upper, lowers, target) in _RATIOS_TO_BEST.items():
        report.add_ratio_to_best(name, values, upper, lowers, target)
    report.add("exposed_policy_share", values.get("adaptive_exposed", []), "≤ 0.03")
    _add_bandwidth(report, setting, values)
    costs = [f"{action.name} {cost:.3f}" for action, cost in sorted(costs_of(setting.engine).layer.items())]
    report.note(
        f"decoding: one stream, greedy, {len(prompt)} prompt tokens, {effort.num_tokens} new tokens, from the first to "
        f"the last, {effort.rounds} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}; INT8 and "
        "INT4 in all layers, each with the head of its own precision"
    )
    report.note(
        "adaptive_vs_best_fixed: over INT4 in all layers and the head, the fastest fixed plan within 0.005 nats"
    )
    if setting.is_embedded:
        report.note(
            "the embedded model's own weights are 4-bit, so INT4 is nearly free of error on it: its speed carries over "
            "to other models, its quality does not"
        )
    report.note(f"cost of an action as a share of a full layer, as this device's table has it: {', '.join(costs)}")


def measure_prefill(report: Report, setting: Setting, effort: Effort) -> None:
    """Adds prompt tokens per second, until the first new token is chosen."""
    rivals = {f"prefill_tokens_per_second_{name}": own for name, own in setting.rivals.items()}
    ours = "prefill_tokens_per_second"
    prompt = setting.prompts.text(_PREFILL_TOKENS)
    rounded = f"{ours}_int8"
    contenders: dict[str, Contender] = {ours: setting.ours(FULL_DEPTH), rounded: setting.ours(INT4, Action.INT8)}
    contenders |= rivals
    works = {name: _prefilling(name, own, prompt) for name, own in contenders.items()}
    values = interleaved(report, "prefill", works, effort.rounds)
    for name in contenders:
        report.add(name, values.get(name, []))
    report.add_ratio_to_best("prefill_full_vs_best_peer", values, ours, list(rivals), "≥ 1.5")
    report.add_ratio_to_best("prefill_int8_vs_best_peer", values, rounded, list(rivals), "≥ 3")
    own = prefill_action_of(setting.engine)
    report.note(
        f"prefill: {_PREFILL_TOKENS} prompt tokens, until the first new token is chosen, ours at full depth and with "
        f"the prompt in INT8; of the two {own.name} is what prompts have here as served, but for those at full depth. "
        "Nobody reuses anything of the rounds before"
    )


def _add_bandwidth(report: Report, setting: Setting, values: Mapping[str, list[float]]) -> None:
    report.add("memory_bandwidth_gb_per_second", [rate / 1e9 for rate in values.get("bandwidth", [])])
    for name, skip in (("full_depth", FULL_DEPTH), ("int4", INT4)):
        with report.attempt(f"bandwidth share, {name}"):
            action = Action.INT4 if skip is INT4 else Action.FULL
            head = fixed_head(action, tuple(costs_of(setting.engine).head))
            size = weight_bytes(setting.model, _plan(setting.engine, setting.prompts.single, skip), head)
            read = {"read": [size * rate for rate in values[name]], "bandwidth": values["bandwidth"]}
            report.add_ratio(f"bandwidth_share_{name}", read, "read", "bandwidth")
            report.note(f"a token reads {size / 1e6:.1f} MB of matrices in mode {name}, its head in {head.name}")


def _plan(engine: Engine, prompt: list[int], skip: SkipOptions) -> bytes:
    """Returns the actions of one decoded token."""
    request = GenerationRequest(
        "plan", prompt, StoppingParameters(2, ignore_eos=True), skip=skip, return_decisions=True
    )
    engine.submit(request)
    plan = b""
    while engine.has_work:
        plan = next((event.plan for event in engine.step() if isinstance(event, TokenProduced)), plan)
    return plan


def _decoding(name: str, contender: Contender, prompt: list[int], num_tokens: int) -> Work:
    def work() -> Mapping[str, float]:
        run = contender.run([prompt], num_tokens)
        return {name: run.tokens_per_second, f"{name}_exposed": run.exposed_share}

    return work


def _prefilling(name: str, contender: Contender, prompt: list[int]) -> Work:
    return lambda: {name: len(prompt) / contender.run([prompt], 1).seconds_to_first}


def _reading(bandwidth: Bandwidth) -> Work:
    return lambda: {"bandwidth": bandwidth.bytes_per_second()}
