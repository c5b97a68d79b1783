"""`python -m benchmarks.prefix`: measures what reusing a prompt's prefix saves and what cutting prompts for it costs.

Run it alone on the machine, like every benchmark.
"""

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from benchmarks.figures import Report
from benchmarks.prompts import Prompts
from benchmarks.rounds import interleaved, progress
from dash_runtime.actions import Action
from dash_runtime.checkpoints import default_cache_folder, resolve_checkpoint, tokenizer_file
from dash_runtime.config import EngineConfig, GenerationRequest, StoppingParameters
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.engine import Engine
from dash_runtime.events import SequenceFinished, TokenProduced
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Identity
from dash_runtime.startup.build import BuildOptions, build_engine

_PREFIX_TOKENS, _ENDING_TOKENS = 500, 20
_CUTS = {
    f"passes_{pass_tokens}_blocks_{block_tokens}": (pass_tokens, block_tokens)
    for pass_tokens, block_tokens in ((256, 256), (256, 128), (256, 64), (128, 128), (64, 64))
}
_UNCUT = next(iter(_CUTS))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefix", description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    rounds: int = parser.parse_args().rounds
    cache_folder = default_cache_folder(os.environ)
    folder = resolve_checkpoint("embedded", None, cache_folder)
    reusing, plain = (
        build_engine(folder, cache_folder, BuildOptions(["cpu"]), config, progress)
        for config in (EngineConfig(), EngineConfig(prefix_cache_tokens=0))
    )
    prompts = Prompts(tokenizer_file(folder))
    report = Report()
    measure_reuse(report, reusing, plain, prompts, rounds)
    measure_cuts(report, plain._decoder, prompts.text(_PREFIX_TOKENS), rounds)
    report.print()


def measure_reuse(report: Report, reusing: Engine, plain: Engine, prompts: Prompts, rounds: int) -> None:
    """Measures seconds to the first token behind a cached prefix, behind one not cached yet, and without a cache.

    Each round has a different ending, so that only the prefix is ever found.
    """
    num_endings = rounds + 2  # one to store the prefix, one to warm up
    text = prompts.text(_PREFIX_TOKENS + num_endings * _ENDING_TOKENS)
    prefix, endings = text[:_PREFIX_TOKENS], text[_PREFIX_TOKENS:]
    first, *others = (
        prefix + endings[start : start + _ENDING_TOKENS] for start in range(0, len(endings), _ENDING_TOKENS)
    )
    _seconds_to_first(reusing, first, "shared")
    turns: dict[str, Iterator[tuple[Engine, list[int], str]]] = {
        "reused": ((reusing, prompt, "shared") for prompt in others),
        "stored": ((reusing, prompt, f"round {number}") for number, prompt in enumerate(others)),
        "off": ((plain, prompt, "") for prompt in others),
    }

    def work(name: str) -> Mapping[str, float]:
        seconds, num_cached = _seconds_to_first(*next(turns[name]))
        return {name: seconds, f"{name}_tokens": num_cached}

    values = interleaved(report, "prefix", {name: (lambda name=name: work(name)) for name in turns}, rounds)
    for name in turns:
        report.add(f"prefix_{name}_seconds_to_first_token", values.get(name, []))
    report.add("prefix_reused_tokens", values.get("reused_tokens", []))
    report.add_ratio("prefix_reused_vs_off", values, "reused", "off", "≤ 0.3")
    report.add_ratio("prefix_stored_vs_off", values, "stored", "off")
    report.note(
        f"prefix: plain text, {_PREFIX_TOKENS + _ENDING_TOKENS} prompt tokens, the first {_PREFIX_TOKENS} an earlier "
        "prompt's, one stream, full depth; reused: in its namespace; stored: in a new namespace each time, so that "
        "nothing is reused and all of it is stored; off: no prefix cache"
    )


def measure_cuts(report: Report, decoder: Decoder, token_ids: Sequence[int], rounds: int) -> None:
    """Measures the prefill of these tokens in passes and attention blocks of several lengths."""

    def work(name: str) -> Mapping[str, float]:
        return {name: _prefill_seconds(decoder, token_ids, *_CUTS[name])}

    values = interleaved(report, "cuts", {name: (lambda name=name: work(name)) for name in _CUTS}, rounds)
    for name in _CUTS:
        report.add(f"prefill_seconds_{name}", values.get(name, []))
    for name in list(_CUTS)[1:]:
        report.add_ratio(f"{name}_vs_uncut", values, name, _UNCUT)
    report.note(
        f"prefill_seconds_*: {len(token_ids)} tokens of plain text through all layers at full depth, without the head, "
        f"in passes of so many tokens and attention in blocks of so many; the engine's are {decoder.max_prompt_rows} "
        f"and {decoder.row_block}"
    )


def _seconds_to_first(engine: Engine, prompt: list[int], namespace: str) -> tuple[float, int]:
    """Returns seconds from the request to its first token, and how many prompt tokens were reused."""
    stopping = StoppingParameters(1, ignore_eos=True)
    started = time.perf_counter()
    engine.submit(GenerationRequest("prefix", prompt, stopping, cache_namespace=namespace))
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, TokenProduced):
                seconds = time.perf_counter() - started
            elif isinstance(event, SequenceFinished):
                num_cached = event.num_cached_prompt_tokens
    return seconds, num_cached


@torch.inference_mode()
def _prefill_seconds(decoder: Decoder, token_ids: Sequence[int], pass_tokens: int, block_tokens: int) -> float:
    (cache,) = decoder.caches([len(token_ids)])
    usual, decoder.row_block = decoder.row_block, block_tokens
    started = time.perf_counter()
    for start in range(0, len(token_ids), pass_tokens):
        chunk = token_ids[start : start + pass_tokens]
        batch = decoder.batch(PassKind.PREFILL, [cache], [len(chunk)], [Identity()])
        hidden = decoder.embed(chunk)
        for layer in range(decoder.num_layers):
            hidden = decoder.run_layer(layer, (Action.FULL,) * len(chunk), hidden, batch)
        batch.commit()
    seconds = time.perf_counter() - started
    decoder.row_block = usual
    return seconds


if __name__ == "__main__":
    main()
