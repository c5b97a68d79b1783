"""The metadata of a policy file: written as JSON, read with every type and bound checked.

Knows JSON and the shape of a model; knows no files and no tensors.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dash_runtime.actions import Action, CostTable
from dash_runtime.errors import ConfigError, PolicyFileError
from dash_runtime.files.json_file import parse_json
from dash_runtime.files.wording import quoted
from dash_runtime.model_config import ModelConfig
from dash_runtime.policy.budgets import BudgetCalibration, PricePoint
from dash_runtime.policy.fixed_plans import MeasuredPlan
from dash_runtime.policy.model_sketch import is_same_model
from dash_runtime.policy.plan_spec import PlanSpec

FORMAT = "dash-policy-4"
FEATURES = "rms-normalised-hidden|block|last-action|cost-spent,log-price,log-price-squared"

_FIRST_ACTIONS = ["SKIP", "INT4", "INT8", "FULL"]
"""The actions of the first rows of `fact_weight` in files that do not name them."""
_OPTIONAL = {"is_drafter": False, "embedded_actions": _FIRST_ACTIONS, "int4": None}
"""Keys that a file may lack, as older files do."""
_MAX_LOG_PRICE = 100.0
"""Calibration tries prices of about e^±10; e^±700 overflows."""
_ROUNDING = 1e-3
"""A measured divergence may be this far below zero."""
_MAX_DIVERGENCE = 1e3
_MAX_COST = 100.0
"""Limit for one layer or head, in full-depth tokens."""


@dataclass(frozen=True, slots=True)
class PolicyMetadata:
    """The parts of a `LearnedPolicy` that are not tensors, and the model that it is for."""

    name: str
    model_fingerprint: str
    """The sketch of its model (`model_sketch.py`)."""
    spec: PlanSpec
    is_drafter: bool
    rounding: str | None
    compensation: str
    calibration: BudgetCalibration
    plans: tuple[MeasuredPlan, ...]
    embedded_actions: tuple[str, ...]
    """The action of each row of the network's `action_embedding`, by name: not every reader knows them all."""

    def to_json(self) -> str:
        """Returns the text that `parse` reads."""
        spec, calibration = self.spec, self.calibration
        facts = {
            "format": FORMAT,
            "name": self.name,
            "model_fingerprint": self.model_fingerprint,
            "features": FEATURES,
            "actions": [action.name for action in spec.actions],
            "pinned": {str(layer): action.name for layer, action in sorted(spec.pinned.items())},
            "lookahead": spec.lookahead,
            "block_size": spec.block_size,
            "head": spec.head.name,
            "is_drafter": self.is_drafter,
            "compensation": self.compensation,
            "costs": spec.costs.to_json(),
            "calibration": [_point_to_json(point) for point in calibration.points],
            "plans": [plan.to_json() for plan in self.plans],
        }
        # Older versions refuse a key that they do not know, and need none for what was so always.
        own = {"embedded_actions": list(self.embedded_actions), "int4": self.rounding}
        facts |= {key: value for key, value in own.items() if value != _OPTIONAL[key]}
        return json.dumps(facts)

    @classmethod
    def parse(cls, text: str, known: Mapping[str, Action]) -> "PolicyMetadata":
        """Reads the text of `to_json`, and checks everything that needs no model.

        `known` are the actions that this reader has, by name.

        Raises:
            PolicyFileError: a value has another type, is out of its bounds, or does not fit the others.
            ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError: the text is no metadata.
        """
        facts = _OPTIONAL | parse_json(text)
        for key, expected in (("format", FORMAT), ("features", FEATURES)):
            if facts.pop(key) != expected:
                raise PolicyFileError(
                    f"has another {key} than this version reads, which is {expected!r}: "
                    "train it anew with `dash-policy train`"
                )
        actions = tuple(known[name] for name in _list(facts.pop("actions"), "actions"))
        if not actions or len(set(actions)) < len(actions):
            raise PolicyFileError("has no actions, or one of them twice")
        metadata = cls(
            name=_text(facts.pop("name"), "name"),
            model_fingerprint=_text(facts.pop("model_fingerprint"), "model_fingerprint"),
            spec=PlanSpec(
                actions=actions,
                pinned={int(layer): known[action] for layer, action in facts.pop("pinned").items()},
                lookahead=_int(facts.pop("lookahead"), "lookahead"),
                block_size=_int(facts.pop("block_size"), "block_size"),
                head=known[facts.pop("head")],
                costs=_costs(facts.pop("costs")),
            ),
            is_drafter=_bool(facts.pop("is_drafter"), "is_drafter"),
            rounding=None if (rounding := facts.pop("int4")) is None else _text(rounding, "int4"),
            compensation=_text(facts.pop("compensation"), "compensation"),
            calibration=_calibration(facts.pop("calibration"), known),
            plans=tuple(_plan(plan) for plan in _list(facts.pop("plans"), "plans")),
            embedded_actions=_embedded_actions(facts.pop("embedded_actions")),
        )
        if facts:
            raise PolicyFileError(f"says something unknown, {quoted(min(facts))}")
        metadata._check_costs()
        return metadata

    def check_for(self, config: ModelConfig, fingerprint: str) -> None:
        """Checks that the policy is for this model.

        Raises:
            PolicyFileError: it is for another, or one of its layers does not exist there.
        """
        spec, num_layers = self.spec, config.num_layers
        if not is_same_model(self.model_fingerprint, fingerprint):
            raise PolicyFileError(f"was made for another model than {config.name}")
        if spec.num_layers != num_layers:
            raise PolicyFileError("has a cost table for another number of layers than its model's")
        if not 1 <= spec.block_size <= num_layers:
            raise PolicyFileError(f"has block_size {quoted(spec.block_size)}; it must be 1 to {num_layers}")
        if spec.lookahead < 1:
            raise PolicyFileError(f"has lookahead {quoted(spec.lookahead)}; it must be at least 1")
        if not set(spec.pinned) <= set(range(num_layers)):
            raise PolicyFileError(f"pins layers that a model of {num_layers} layers does not have")
        undecided = set(range(min(spec.lookahead, num_layers))) | {num_layers - 1}
        if not undecided <= set(spec.pinned):
            raise PolicyFileError(f"must pin layers {sorted(undecided)}, which it cannot decide with its lookahead")
        if any(abs(sum(point.counts.values()) - num_layers) > _ROUNDING for point in self.calibration.points):
            raise PolicyFileError(f"has a calibration for another number of layers than its model's {num_layers}")
        if any(len(plan.actions) != num_layers for plan in self.plans):
            raise PolicyFileError(f"has a plan for another number of layers than its model's {num_layers}")

    def _check_costs(self) -> None:
        spec = self.spec
        if not set(spec.actions) <= set(spec.costs.layer):
            raise PolicyFileError("has a cost table for other actions than its own")
        if spec.head not in spec.costs.head:
            raise PolicyFileError(f"has no cost for its head precision {spec.head.name}")
        for action in set(spec.pinned.values()):
            if action == Action.SKIP or action not in spec.costs.layer:
                raise PolicyFileError(f"runs pinned layers in {action.name}, which is no kernel or has no cost")
        counted = {action for point in self.calibration.points for action in point.counts}
        if not counted <= {*spec.actions, *spec.pinned.values()}:
            raise PolicyFileError("has a calibration of other actions than its own")


def _embedded_actions(names: Any) -> tuple[str, ...]:
    actions = tuple(_text(name, "embedded action") for name in _list(names, "embedded_actions"))
    if not actions or len(set(actions)) < len(actions):
        raise PolicyFileError("has no embedded_actions, or one of them twice")
    return actions


def _costs(facts: Any) -> CostTable:
    for part in ("layer", "head"):
        for action, cost in facts[part].items():
            if _number(cost, f"cost of {quoted(action)}") > _MAX_COST:
                raise PolicyFileError(f"has a cost of {quoted(action)} that cannot be")
    _int(facts["num_layers"], "num_layers of its costs")
    if _number(facts["fixed"], "fixed cost") < 0:
        raise PolicyFileError("has a fixed cost below 0")
    return CostTable.from_json(facts)


def _point_to_json(point: PricePoint) -> dict[str, Any]:
    return {
        "log_price": point.log_price,
        "counts": {action.name: count for action, count in point.counts.items()},
        "divergence": point.divergence,
        "agreement": point.agreement,
    }


def _calibration(points: Any, known: Mapping[str, Action]) -> BudgetCalibration:
    read = tuple(_point(point, known) for point in _list(points, "calibration"))
    prices = [point.log_price for point in read]
    if not prices or prices != sorted(set(prices)) or max(map(abs, prices)) > _MAX_LOG_PRICE:
        raise PolicyFileError("has a calibration that is empty, not ascending, or with a price that cannot be")
    return BudgetCalibration(read)


def _point(facts: dict[str, Any], known: Mapping[str, Action]) -> PricePoint:
    counts = {known[name]: _number(count, f"count of {quoted(name)}") for name, count in facts["counts"].items()}
    point = PricePoint(
        _number(facts["log_price"], "price"),
        counts,
        _number(facts["divergence"], "divergence"),
        _number(facts["agreement"], "agreement"),
    )
    if set(facts) != set(_point_to_json(point)):
        raise PolicyFileError("says something unknown about a price")
    if not -_ROUNDING < point.divergence < _MAX_DIVERGENCE or not 0 <= point.agreement <= 1:
        raise PolicyFileError("has a divergence or an agreement that cannot be")
    if any(count < 0 for count in counts.values()):
        raise PolicyFileError("runs fewer than 0 layers with an action at a price")
    return point


def _plan(facts: Any) -> MeasuredPlan:
    try:
        return MeasuredPlan.from_json(facts)
    except ConfigError as error:
        raise PolicyFileError(f"has a fixed plan that cannot be: {error}") from None


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise PolicyFileError(f"has {name} {quoted(value)}, which is no list")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise PolicyFileError(f"has {name} {quoted(value)}, which is no text on one line")
    return value


def _bool(value: Any, name: str) -> bool:
    if type(value) is not bool:
        raise PolicyFileError(f"has {name} {quoted(value)}, which is neither true nor false")
    return value


def _int(value: Any, name: str) -> int:
    if type(value) is not int:
        raise PolicyFileError(f"has {name} {quoted(value)}, which is no whole number")
    return value


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise PolicyFileError(f"has {name} {quoted(value)}, which is no number")
    return float(value)
