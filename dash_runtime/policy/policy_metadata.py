"""What a policy file says of its policy beside the tensors: written as JSON, read with every type and bound checked.

Knows JSON and the shape of a model; knows no files and no tensors.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from dash_runtime.actions import Action, CostTable
from dash_runtime.errors import PolicyFileError
from dash_runtime.files.json_file import parse_json
from dash_runtime.files.wording import quoted
from dash_runtime.model_config import ModelConfig
from dash_runtime.policy.learned import Calibration

FORMAT = "dash-policy-2"
FEATURES = "rms-normalised-hidden|block|last-action|cost-spent,log-price,log-price-squared"

_OPTIONAL = {"pinned_action": Action.FULL.name, "is_drafter": False}
"""Not in files from before there were drafters."""
_MAX_LOG_PRICE = 100.0
"""Calibration tries prices of e^±10 or so; beyond e^±700 there are none."""
_ROUNDING = 1e-3
"""A measured divergence may be below zero by so much."""
_MAX_DIVERGENCE = 1e3
_MAX_COST = 100.0
"""Of one layer or head, in full-depth tokens."""


@dataclass(frozen=True, slots=True)
class PolicyMetadata:
    """The fields of `LearnedPolicy` that are no tensors, and what the file is for."""

    name: str
    model_fingerprint: str
    actions: tuple[Action, ...]
    pinned: frozenset[int]
    lookahead: int
    block_size: int
    head: Action
    pinned_action: Action
    is_drafter: bool
    compensation: str
    costs: CostTable
    calibration: Calibration

    def to_json(self) -> str:
        """What `parse` reads."""
        return json.dumps(
            {
                "format": FORMAT,
                "name": self.name,
                "model_fingerprint": self.model_fingerprint,
                "features": FEATURES,
                "actions": [action.name for action in self.actions],
                "pinned": sorted(self.pinned),
                "lookahead": self.lookahead,
                "block_size": self.block_size,
                "head": self.head.name,
                "pinned_action": self.pinned_action.name,
                "is_drafter": self.is_drafter,
                "compensation": self.compensation,
                "costs": self.costs.to_json(),
                "calibration": [list(point) for point in self.calibration.points],
                "divergences": list(self.calibration.divergences),
                "recommended_budget": self.calibration.recommended_budget,
            }
        )

    @classmethod
    def parse(cls, text: str) -> "PolicyMetadata":
        """Reads what `to_json` wrote, and checks all that needs no model.

        Raises:
            PolicyFileError: a value is of another type, out of its bounds, or does not fit the others.
            ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError: it is no such thing.
        """
        facts = _OPTIONAL | parse_json(text)
        for key, expected in (("format", FORMAT), ("features", FEATURES)):
            if facts.pop(key) != expected:
                raise PolicyFileError(f"has another {key} than this version reads, which is {expected!r}")
        actions = tuple(Action[name] for name in _list(facts.pop("actions"), "actions"))
        if not actions or len(set(actions)) < len(actions):
            raise PolicyFileError("has no actions, or one of them twice")
        metadata = cls(
            _text(facts.pop("name"), "name"),
            _text(facts.pop("model_fingerprint"), "model_fingerprint"),
            actions,
            frozenset(_whole(layer, "pinned layer") for layer in _list(facts.pop("pinned"), "pinned")),
            _whole(facts.pop("lookahead"), "lookahead"),
            _whole(facts.pop("block_size"), "block_size"),
            Action[facts.pop("head")],
            Action[facts.pop("pinned_action")],
            _truth(facts.pop("is_drafter"), "is_drafter"),
            _text(facts.pop("compensation"), "compensation"),
            _costs(facts.pop("costs")),
            _calibration(facts.pop("calibration"), facts.pop("divergences"), facts.pop("recommended_budget")),
        )
        if facts:
            raise PolicyFileError(f"says something unknown, {quoted(min(facts))}")
        metadata._check_costs()
        return metadata

    def check_for(self, config: ModelConfig, fingerprint: str) -> None:
        """Checks that it is for this model.

        Raises:
            PolicyFileError: it is for another, or one of its layers does not exist there.
        """
        num_layers = config.num_layers
        if self.model_fingerprint != fingerprint:
            raise PolicyFileError(f"was made for another model than {config.name}")
        if self.costs.num_layers != num_layers:
            raise PolicyFileError("has a cost table for another number of layers than its model's")
        if not 1 <= self.block_size <= num_layers:
            raise PolicyFileError(f"has block_size {quoted(self.block_size)}; it must be 1 to {num_layers}")
        if self.lookahead < 1:
            raise PolicyFileError(f"has lookahead {quoted(self.lookahead)}; it must be at least 1")
        if not self.pinned <= set(range(num_layers)):
            raise PolicyFileError(f"pins layers that a model of {num_layers} layers does not have")
        undecided = set(range(min(self.lookahead, num_layers))) | {num_layers - 1}
        if not undecided <= self.pinned:
            raise PolicyFileError(f"must pin layers {sorted(undecided)}, which it cannot decide with its lookahead")

    def _check_costs(self) -> None:
        if not set(self.actions) <= set(self.costs.layer):
            raise PolicyFileError("has a cost table for other actions than its own")
        if self.head not in self.costs.head:
            raise PolicyFileError(f"has no cost for its head precision {self.head.name}")
        if self.pinned_action is Action.SKIP or self.pinned_action not in self.costs.layer:
            raise PolicyFileError(f"runs pinned layers in {self.pinned_action.name}, which is no kernel or has no cost")


def _costs(facts: Any) -> CostTable:
    for part in ("layer", "head"):
        for action, cost in facts[part].items():
            if _number(cost, f"cost of {quoted(action)}") > _MAX_COST:
                raise PolicyFileError(f"has a cost of {quoted(action)} that cannot be")
    _whole(facts["num_layers"], "num_layers of its costs")
    if _number(facts["fixed"], "fixed cost") < 0:
        raise PolicyFileError("has a fixed cost below 0")
    return CostTable.from_json(facts)


def _calibration(points: Any, divergences: Any, recommended_budget: Any) -> Calibration:
    pairs = [_list(point, "calibration") for point in _list(points, "calibration")]
    calibrated = tuple((_number(budget, "budget"), _number(log_price, "price")) for budget, log_price in pairs)
    if not calibrated or list(calibrated) != sorted(calibrated) or not 0 < calibrated[0][0] <= calibrated[-1][0] <= 1:
        raise PolicyFileError("has a calibration that is empty, not ascending or outside (0, 1]")
    if any(abs(log_price) > _MAX_LOG_PRICE for _, log_price in calibrated):
        raise PolicyFileError("has a calibration with a price that cannot be")
    calibration = Calibration(
        calibrated,
        tuple(_number(value, "divergence") for value in _list(divergences, "divergences")),
        _number(recommended_budget, "recommended_budget"),
    )
    if len(calibration.divergences) != len(calibrated) or not all(
        -_ROUNDING < divergence < _MAX_DIVERGENCE for divergence in calibration.divergences
    ):
        raise PolicyFileError("has divergences that do not fit its calibration")
    if not calibrated[0][0] <= calibration.recommended_budget <= 1:
        raise PolicyFileError("has a recommended budget that does not fit its calibration")
    return calibration


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise PolicyFileError(f"has {name} {quoted(value)}, which is no list")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise PolicyFileError(f"has {name} {quoted(value)}, which is no text on one line")
    return value


def _truth(value: Any, name: str) -> bool:
    if type(value) is not bool:
        raise PolicyFileError(f"has {name} {quoted(value)}, which is neither true nor false")
    return value


def _whole(value: Any, name: str) -> int:
    if type(value) is not int:
        raise PolicyFileError(f"has {name} {quoted(value)}, which is no whole number")
    return value


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise PolicyFileError(f"has {name} {quoted(value)}, which is no number")
    return float(value)
