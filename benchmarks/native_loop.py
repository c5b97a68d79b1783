"""`python -m benchmarks.native_loop`: what it saves that native code takes a row through all layers.

One engine, with and without the native loop in turn. Run it alone on the machine, like every benchmark.
"""

import argparse
import os
from collections.abc import Mapping

from benchmarks.contenders import EngineContender
from benchmarks.figures import Report
from benchmarks.prompts import Prompts
from benchmarks.rounds import interleaved, progress
from benchmarks.setting import FULL_DEPTH, INT4, INT8
from benchmarks.shipped import shipped_policy
from dash_runtime.actions import Action
from dash_runtime.checkpoints import default_cache_folder, resolve_checkpoint, tokenizer_file
from dash_runtime.config import EngineConfig, Mode, SkipOptions
from dash_runtime.decoder.backends.inductor import InductorBackend
from dash_runtime.layers.batch import PassKind
from dash_runtime.startup.build import BuildOptions, build_engine

_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.native_loop", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds: int = parser.parse_args().rounds
    cache_folder = default_cache_folder(os.environ)
    folder = resolve_checkpoint("embedded", None, cache_folder)
    engine = build_engine(folder, cache_folder, BuildOptions(["cpu"]), EngineConfig(), progress)
    backend = engine._decoder.backends[PassKind.DECODE][0]
    assert isinstance(backend, InductorBackend), "nothing is compiled here"
    native = backend._whole_passes
    modes = {
        "full_depth": FULL_DEPTH,
        "int8": INT8,
        "int4": INT4,
        "skip": SkipOptions(Mode.FIXED, fixed_action=Action.SKIP),
        "adaptive": SkipOptions(Mode.ADAPTIVE, policy_name=shipped_policy(folder).name),
        "exact": SkipOptions(Mode.EXACT),
    }
    prompt = Prompts(tokenizer_file(folder)).single

    def work(name: str, skip: SkipOptions, is_native: bool) -> Mapping[str, float]:
        backend._whole_passes = native if is_native else None
        return {name: EngineContender(engine, skip).run([prompt], _TOKENS).tokens_per_second}

    names = [(mode, loop) for mode in modes for loop in ("native", "layers")]
    works = {
        f"{mode}_{loop}": (lambda mode=mode, loop=loop: work(f"{mode}_{loop}", modes[mode], loop == "native"))
        for mode, loop in names
    }
    report = Report()
    values = interleaved(report, "native loop", works, rounds)
    for mode in modes:
        report.add(f"{mode}_tokens_per_second", values.get(f"{mode}_native", []))
        report.add_ratio(f"{mode}_native_vs_layer_by_layer", values, f"{mode}_native", f"{mode}_layers")
    report.add_ratio("adaptive_vs_int4_native", values, "adaptive_native", "int4_native")
    report.add_ratio("adaptive_vs_int4_layer_by_layer", values, "adaptive_layers", "int4_layers")
    report.print()


if __name__ == "__main__":
    main()
