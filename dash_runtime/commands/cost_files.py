"""Reads cost tables that a user names. Knows JSON files; measures nothing."""

import json
from pathlib import Path

from dash_runtime.actions import CostTable
from dash_runtime.errors import ConfigError


def read_costs(path: Path, option: str = "costs", complaint: str = "") -> CostTable:
    """Returns the table in a file, such as `calibration/costs-….json` in a server's cache folder.

    Raises:
        ConfigError: the file cannot be read or holds none; it names the option, with the complaint if there is one.
    """
    try:
        facts = json.loads(path.read_text())
        return CostTable.from_json(facts.get("table", facts))
    except (OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise ConfigError(option, complaint or f"{path} is no cost table") from None
