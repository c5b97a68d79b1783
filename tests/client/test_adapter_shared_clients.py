"""Copies of a model object share clients. No server is needed, since nothing is called."""

import asyncio
import gc
import weakref
from typing import Any

import pytest

from dash_client import InvalidArgumentError
from dash_client.adapters.shared_clients import shared_async_client, shared_client


def test_equal_arguments_share_a_client_and_others_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    client = shared_client(target="localhost:1", token="a-token")
    assert shared_client(token="a-token", target="localhost:1") is client
    assert shared_client(target="localhost:1", token="another") is not client
    assert shared_client(target="localhost:2", token="a-token") is not client
    before = shared_client()
    monkeypatch.setenv("DASH_TARGET", "localhost:3")
    assert shared_client() is not before
    assert shared_client().target == "localhost:3"


def test_what_is_wrong_is_said_each_time() -> None:
    for _ in range(2):
        with pytest.raises(InvalidArgumentError, match="target"):
            shared_client(target="https://localhost")


def test_clients_that_nobody_uses_any_more_are_let_go() -> None:
    first = weakref.ref(shared_client(target="localhost:4"))
    for port in range(1000, 1040):
        shared_client(target=f"localhost:{port}")
    gc.collect()
    assert first() is None
    assert shared_client(target="localhost:1039") is shared_client(target="localhost:1039")


def test_each_event_loop_has_a_client_that_goes_with_it() -> None:
    async def client() -> Any:
        ours = shared_async_client(target="localhost:5")
        assert shared_async_client(target="localhost:5") is ours
        return weakref.ref(ours)

    first = asyncio.run(client())
    second = asyncio.run(client())
    gc.collect()
    assert first() is None
    assert second() is not None
