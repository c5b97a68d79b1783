"""Measures what it costs to choose tokens otherwise than by the largest logit: by a JSON schema, and by chance.

What a schema forces takes little time.
"""

import json
from collections.abc import Mapping

from benchmarks.contenders import EngineContender
from benchmarks.figures import Report
from benchmarks.rounds import Effort, interleaved
from benchmarks.setting import FULL_DEPTH, INT4, Setting
from dash_runtime.config import Mode, SamplingParameters, SkipOptions
from dash_runtime.constraint import Constraint, ConstraintKind

_NUM_TOKENS = 200
"""More than the answer has."""
_FILM = {
    "title": {"type": "string", "maxLength": 40},
    "year": {"type": "integer", "minimum": 1900, "maximum": 2030},
    "genre": {"enum": ["drama", "comedy", "horror", "western"]},
    "rating": {"type": "number"},
    "director_name": {"type": "string", "maxLength": 30},
}
_ITEM = {"type": "object", "properties": _FILM, "required": list(_FILM), "additionalProperties": False}
_FILMS = Constraint(
    ConstraintKind.JSON_SCHEMA, json.dumps({"type": "array", "items": _ITEM, "minItems": 3, "maxItems": 3})
)
_MODES = {
    "full_depth": FULL_DEPTH,
    "int4": INT4,
    "adaptive": SkipOptions(Mode.ADAPTIVE),
    "exact": SkipOptions(Mode.EXACT),
}
_DRAWN = SamplingParameters(temperature=0.7, top_p=0.95, seed=1)
"""As a chat has it."""


def measure_constraints(report: Report, setting: Setting, effort: Effort) -> None:
    """Adds each mode's speed with a schema over its speed without one, and INT4's with draws over its greedy one; one
    stream and sixteen."""
    one = [setting.prompts.single]

    def work(name: str) -> Mapping[str, float]:
        engine, skip = setting.engine, _MODES[name]
        # Sixteen alike end together, and the decoder has as many rows with a schema as without.
        streams = {"": one} | ({"_16": one * 16} if name == "full_depth" else {})
        speeds: dict[str, float] = {}
        for number, prompts in streams.items():
            speeds[name + number] = EngineContender(engine, skip).run(prompts, _NUM_TOKENS).tokens_per_second
            constrained = EngineContender(engine, skip, _FILMS).run(prompts, _NUM_TOKENS)
            speeds[f"{name}{number}_schema"] = constrained.tokens_per_second
        return speeds

    def draws() -> Mapping[str, float]:
        speeds: dict[str, float] = {}
        for number, prompts in (("", one), ("_16", setting.prompts.streams(16))):
            for kind, sampling in (("greedy", None), ("drawn", _DRAWN)):
                contender = EngineContender(setting.engine, INT4, sampling=sampling)
                speeds[f"{kind}{number}"] = contender.run(prompts, effort.stream_tokens).tokens_per_second
        return speeds

    works = {name: (lambda name=name: work(name)) for name in _MODES} | {"draws": draws}
    values = interleaved(report, "constraints", works, effort.rounds)
    for name in (*_MODES, "full_depth_16"):
        target = None if name == "exact" else "≥ 0.95"
        report.add_ratio(f"{name}_schema_vs_free", values, f"{name}_schema", name, target)
    for number in ("", "_16"):
        report.add_ratio(f"int4{number}_drawn_vs_greedy", values, f"drawn{number}", f"greedy{number}", "≥ 0.95")
    report.add_ratio("exact_schema_vs_full_depth_schema", values, "exact_schema", "full_depth_schema")
    report.note(
        "*_schema_vs_free: tokens per second with a JSON schema (three films with five properties) over without; "
        f"*_drawn_vs_greedy: at a temperature of {_DRAWN.temperature} with top_p {_DRAWN.top_p} over greedy"
    )
