"""Marks of parameters."""

from collections.abc import Iterable
from typing import Any

import pytest


def long(values: Iterable[Any]) -> list[Any]:
    """Returns parameters whose tests tell little that those of the others do not: only `make test-long` runs them."""
    return [pytest.param(value, marks=pytest.mark.long) for value in values]
