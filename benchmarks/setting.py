"""Loads what all sections share: the models, the prompts, and the modes to compare."""

import importlib.metadata
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.contenders import Contender, EngineContender, Transformers
from benchmarks.figures import Report
from benchmarks.peers.child import ChildContender
from benchmarks.peers.gguf_formats import BITS, FILE, MODULES, start_formats
from benchmarks.prompts import Prompts
from benchmarks.rounds import progress
from benchmarks.shipped import costs_of, shipped_policy
from dash_runtime.actions import Action
from dash_runtime.checkpoints import EMBEDDED, load_model_config, resolve_checkpoint, tokenizer_file
from dash_runtime.checkpoints.embedded import embedded_gguf
from dash_runtime.config import EngineConfig, Mode, SkipOptions
from dash_runtime.engine.engine import Engine
from dash_runtime.model_config import ModelConfig
from dash_runtime.startup.build import BuildOptions, build_engine

FULL_DEPTH = SkipOptions(Mode.FULL_DEPTH)
INT8 = SkipOptions(Mode.FIXED, fixed_action=Action.INT8)
INT4 = SkipOptions(Mode.FIXED, fixed_action=Action.INT4)
INT3 = SkipOptions(Mode.FIXED, fixed_action=Action.INT3)


_IK_KINDS = (FILE, "Q4_0", "Q8_0", "BF16")
LONGEST = 8192
"""Tokens of a prompt and an answer."""
AS_SERVED = EngineConfig(prefix_cache_tokens=0)
"""Prompt lookup as by default. Nothing of a prompt is reused: the same ones come again in each round."""
PLAIN = replace(AS_SERVED, prompt_lookup=False)
"""As those run that ours are compared with."""


@dataclass(frozen=True, slots=True)
class Setting:
    """All loaded contenders. One that could not be loaded is None, and a note says why."""

    folder: Path
    model: ModelConfig
    prompts: Prompts
    engine: Engine
    engine_without_planner: Engine | None
    transformers: Transformers | None
    transformers_compiled: Transformers | None
    ggufs: Mapping[str, ChildContender]
    """llama.cpp and its fork, in each format, by name."""
    policy_name: str | None
    cache_folder: Path
    is_embedded: bool
    """True for the embedded model, whose file is 4-bit."""

    @property
    def adaptive(self) -> SkipOptions:
        """The policy itself, at its recommended budget: a server may run a fixed plan for who names no policy."""
        return SkipOptions(Mode.ADAPTIVE, policy_name=self.policy_name)

    @property
    def rivals(self) -> dict[str, Contender]:
        """Those that run one stream, by name."""
        pair = {"transformers": self.transformers, "transformers_compiled": self.transformers_compiled}
        return {name: own for name, own in pair.items() if own is not None} | dict(self.ggufs)

    def ours(self, skip: SkipOptions, prefill: Action | None = None) -> EngineContender:
        return EngineContender(self.engine, skip, prefill=prefill)

    def build(self, config: EngineConfig) -> Engine:
        """Returns one more engine of the same model."""
        return _build(self.folder, self.cache_folder, config)


def load_setting(
    report: Report, running: ExitStack, cache_folder: Path, peers_folder: Path, model: str = EMBEDDED
) -> Setting:
    """Loads all contenders, each with torch's number of threads; of another model than the embedded one no other
    engines than the default one. Processes of peers end with `running`."""
    folder = resolve_checkpoint(model, None, cache_folder, progress)
    gguf = embedded_gguf() if model == EMBEDDED else Path(model)
    config = PLAIN
    engine = _build(folder, cache_folder, config)
    without_planner = None
    if model == EMBEDDED:
        with report.attempt("the engine without planner"):
            without_planner = _build(folder, cache_folder, replace(config, group_planner=False))
    transformers, compiled, policy_name = None, None, None
    with report.attempt("transformers"):
        progress("loading transformers")
        transformers = Transformers(folder)
        compiled = Transformers(folder, is_compiled=True)
        report.note(
            f"transformers {importlib.metadata.version('transformers')}: generate, bf16, sdpa attention, dynamic "
            "cache, no end-of-sequence check; transformers_compiled: by torch.compile, with a static cache"
        )
    ggufs: dict[str, ChildContender] = {}
    for peer in MODULES:
        kinds = tuple(BITS) if peer == "llama_cpp" else _IK_KINDS
        ggufs |= start_formats(report, running, peer, peers_folder, gguf, kinds, max_length=LONGEST)
    policy = shipped_policy(folder)
    if policy is None:
        report.note("adaptive: no policy is shipped for this model, so the best fixed plan within its budget runs")
    else:
        policy_name = policy.name
        budget = policy.recommended_budget(costs_of(engine))
        report.note(
            f"adaptive: policy {policy.name} at its recommended budget {budget:.3f}, "
            "the lowest at which its calibration says at most 0.05 nats a token of divergence from full depth; "
            "adaptive_default: what runs for requests that name no policy and no budget"
        )
    return Setting(
        folder,
        load_model_config(folder),
        Prompts(tokenizer_file(folder)),
        engine,
        without_planner,
        transformers,
        compiled,
        ggufs,
        policy_name,
        cache_folder,
        model == EMBEDDED,
    )


def _build(folder: Path, cache_folder: Path, config: EngineConfig) -> Engine:
    return build_engine(folder, cache_folder, BuildOptions(["cpu"]), config, progress)
