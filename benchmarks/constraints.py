"""Measures what a constraint costs each mode, and what forced text saves EXACT, with a JSON schema."""

import json
from collections.abc import Mapping

from benchmarks.contenders import EngineContender
from benchmarks.figures import Report
from benchmarks.rounds import Effort, interleaved
from benchmarks.setting import FULL_DEPTH, INT4, Setting
from dash_runtime.config import Mode, SkipOptions
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


def measure_constraints(report: Report, setting: Setting, effort: Effort) -> None:
    """Adds each mode's speed with a schema over its speed without one, one stream and sixteen."""
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

    values = interleaved(
        report, "constraints", {name: (lambda name=name: work(name)) for name in _MODES}, effort.rounds
    )
    for name in (*_MODES, "full_depth_16"):
        target = None if name == "exact" else "≥ 0.95"
        report.add_ratio(f"{name}_schema_vs_free", values, f"{name}_schema", name, target)
    report.add_ratio("exact_schema_vs_full_depth_schema", values, "exact_schema", "full_depth_schema")
    report.note(
        "*_schema_vs_free: tokens per second with a JSON schema (three films with five properties) over without"
    )
