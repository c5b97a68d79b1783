"""A server offers the actions that were asked for, or those whose weights fit well into the memory that is free."""

import pytest

from dash_runtime.actions import Action
from dash_runtime.errors import ConfigError
from dash_runtime.startup.offer import asked_actions, fitting_actions

SKIP, _, INT4, INT8, FULL = Action
ALL = (SKIP, INT4, INT8, FULL)
EAGER = "layers run eagerly"


def needed(actions: tuple[Action, ...]) -> int:
    """Returns gigabytes, as of a model of 8 billion parameters."""
    return sum({SKIP: 0, INT4: 5, INT8: 8, FULL: 16}[action] for action in actions) * 10**9


@pytest.mark.parametrize(
    ("free", "expected"),
    [(100, ALL), (50, ALL), (40, (SKIP, INT4, INT8)), (22, (SKIP, INT4, INT8)), (20, (SKIP, INT4)), (2, (SKIP, INT4))],
)
def test_the_most_that_fits_well_is_offered_and_what_is_left_out_is_said(
    free: int, expected: tuple[Action, ...]
) -> None:
    said: list[str] = []
    assert fitting_actions(ALL, needed, free * 10**9, None, said.append) == expected
    assert len(said) == (expected != ALL)
    if said:
        assert "DASH_ACTIONS=SKIP,INT4,INT8,FULL" in said[0]
        assert all(action.name in said[0] for action in set(ALL) - set(expected))


def test_all_is_offered_where_nobody_knows_what_is_free_or_full_has_to_be_there() -> None:
    for free, why_full in ((None, None), (10**9, EAGER)):
        assert fitting_actions(ALL, needed, free, why_full, lambda said: None) == ALL


def test_what_was_asked_for_is_offered_however_much_it_takes() -> None:
    assert asked_actions([INT4, SKIP], ALL, None) == (SKIP, INT4)
    assert asked_actions([FULL], ALL, EAGER) == (FULL,)


@pytest.mark.parametrize(
    ("asked", "supported", "why_full", "words"),
    [
        ([INT8, SKIP], (SKIP, INT4, FULL), None, "INT8 has no kernel here; supported: SKIP, INT4, FULL"),
        ([SKIP], ALL, None, "must name more than SKIP, which alone runs no layer"),
        ([INT4, SKIP], ALL, EAGER, "must name FULL: layers run eagerly"),
    ],
)
def test_what_cannot_be_offered_is_refused_by_name(
    asked: list[Action], supported: tuple[Action, ...], why_full: str | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        asked_actions(asked, supported, why_full)
    assert refused.value.field == "actions"
