"""Tests that the reference says what the client's docstrings say."""

import dash_client
from docs.make_reference import PAGE, reference


def test_the_reference_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "`make reference` writes it anew"


def test_everything_that_is_exported_is_in_the_reference() -> None:
    text = reference()
    assert [name for name in dash_client.__all__ if f"### `{name}`\n" not in text] == []
