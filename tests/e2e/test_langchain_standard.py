"""LangChain's own tests for chat models, against a real server with a tiny model.

Skipped without `langchain-tests`, which brings seven plugins for pytest: install it in an environment of its own.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("langchain_tests", reason="needs langchain-tests")

from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from dash_client.adapters.langchain import ChatDash
from tests.e2e.service import Service


class TestWithoutAServer(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatDash

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        params = super().standard_chat_model_params
        # LangChain's word for it is not the same everywhere; here it is `token`.
        params["token"] = params.pop("api_key")
        return params

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"DASH_TOKEN": "unused"}, {"target": "localhost:1"}, {"target": "localhost:1", "token": None}

    @pytest.fixture
    def snapshot(self) -> Callable[..., dict[str, Any]]:
        """The stored form of a model."""
        options = {"temperature": 0.0, "max_tokens": 100, "timeout": 60.0, "stop": [], "max_retries": 2}
        return lambda name: {
            "lc": 1,
            "type": "constructor",
            "id": ["dash_client", "adapters", "langchain", "ChatDash"],
            "name": "ChatDash",
            "kwargs": {**options, "token": {"lc": 1, "type": "secret", "id": ["DASH_TOKEN"]}},
        }

    @pytest.mark.xfail(
        reason="LangChain loads the classes on its own list only, or those it is given", raises=ValueError
    )
    def test_serdes(self, model: BaseChatModel, snapshot: Any) -> None:
        super().test_serdes(model, snapshot)

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False


class TestWithAServer(ChatModelIntegrationTests):
    variables: ClassVar = {"DASH_NUM_THREADS": "1", "DASH_NATIVE": "off"}
    target = ""

    @classmethod
    def served_model(cls, tiny_folder: Path) -> Path:
        return tiny_folder

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def service(cls, tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[None]:
        running = Service(tmp_path_factory.mktemp("langchain"), cls.served_model(tiny_folder), **cls.variables)
        cls.target = running.client.target
        yield
        assert running.stop() == 0, running.log.read_text()

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatDash

    @property
    def chat_model_params(self) -> dict[str, Any]:
        # The seed is one with which the tiny model's answers are no empty ones.
        return {"target": self.target, "max_tokens": 16, "seed": 7, "ignore_eos": True}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False  # the tiny model's strings have no end


@pytest.mark.skipif("DASH_TOOL_MODEL" not in os.environ, reason="needs DASH_TOOL_MODEL, a model that calls tools")
class TestWithAModelThatCallsTools(TestWithAServer):
    """What a tiny model cannot do: decide to call a tool, read the answer, and end a string."""

    variables: ClassVar = {"DASH_NATIVE": "off"}

    @classmethod
    def served_model(cls, tiny_folder: Path) -> Path:
        return Path(os.environ["DASH_TOOL_MODEL"])

    @property
    def chat_model_params(self) -> dict[str, Any]:
        # A small model repeats itself: its calls, and the words of a string.
        own = {"parallel_tool_calls": False, "repetition_penalty": 1.1}
        return {"target": self.target, "max_tokens": 128, "mode": "full_depth", **own}

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_structured_output(self) -> bool:
        return True
