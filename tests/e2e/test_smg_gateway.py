"""OpenAI's HTTP by the SMG gateway, with OpenAI's own client, in front of a real server with a tiny model.

Skipped where `smg` (100 MB) or `openai` is not installed; `.ci/run` installs both.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="needs openai")
pytest.importorskip("smg_grpc_proto", reason="needs the extra smg")

import openai

from dash_client import DashClient
from tests.e2e.service import REPEATABLE, Service
from tests.server.server_harness import free_port

GATEWAY = shutil.which("smg", path=str(Path(sys.executable).parent))
pytestmark = pytest.mark.skipif(GATEWAY is None, reason="needs the gateway smg")
MESSAGES: Any = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
TOOLS: Any = [{"type": "function", "function": {"name": "paint", "description": "Paints", "parameters": SCHEMA}}]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("smg"), tiny_folder, DASH_VLLM_ENGINE="true", **REPEATABLE)
    yield running
    assert running.stop() == 0, running.log.read_text()


@contextmanager
def gateway(target: str, log: Path) -> Iterator[Any]:
    """Yields OpenAI's client of a gateway in front of the server."""
    assert GATEWAY is not None
    port = free_port()
    ports = ("--port", str(port), "--prometheus-port", str(free_port()), "--prometheus-host", "127.0.0.1")
    command = (GATEWAY, "launch", "--worker-urls", f"grpc://{target}", "--host", "127.0.0.1", *ports)
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "--request-id-headers", "x-dash"], stdout=output, stderr=output)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        deadline = time.monotonic() + 60
        while True:
            try:
                if client.models.list().data:
                    client.chat.completions.create(model=model_of(client), messages=MESSAGES, max_tokens=1)
                    break
            except openai.OpenAIError:
                pass  # it registers the server, and fetches the tokenizer, after it listens
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield client
    finally:
        process.terminate()
        process.wait(20)


def model_of(client: Any) -> str:
    return str(client.models.list().data[0].id)


@pytest.fixture(scope="module")
def client(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with gateway(service.client.target, tmp_path_factory.mktemp("gateway") / "log") as running:
        yield running


@pytest.fixture
def options(client: Any) -> dict[str, Any]:
    return {"model": model_of(client), "messages": MESSAGES, "max_tokens": 24, "temperature": 0}


def test_an_answer_is_the_one_of_our_own_client_whole_and_streamed(
    client: Any, service: Service, options: dict[str, Any]
) -> None:
    expected = service.client.chat(MESSAGES, max_new_tokens=24)
    # The gateway keeps a last character to itself that is incomplete.
    whole = expected.text.rstrip("\ufffd")
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.content.rstrip("\ufffd") == whole
    usage = expected.usage
    assert answer.usage.prompt_tokens == usage.prompt_token_count
    assert answer.usage.completion_tokens == usage.output_token_count
    chunks = list(client.chat.completions.create(**options, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.rstrip("\ufffd") == whole
    assert len(chunks) > 3


def test_output_keeps_to_a_schema_and_required_tools_are_called(client: Any, options: dict[str, Any]) -> None:
    options["max_tokens"] = 100
    closed = {**SCHEMA, "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": closed}}
    answer = client.chat.completions.create(**options, response_format=wanted)
    assert json.loads(answer.choices[0].message.content)["colour"] in ("red", "blue")
    tools = [{"type": "function", "function": {**TOOLS[0]["function"], "parameters": closed}}]
    named = {"type": "function", "function": {"name": "paint"}}
    (call,) = client.chat.completions.create(**options, tools=tools, tool_choice=named).choices[0].message.tool_calls
    assert call.function.name == "paint"
    assert json.loads(call.function.arguments)["colour"] in ("red", "blue")


def test_several_answers_and_log_probabilities(client: Any, options: dict[str, Any]) -> None:
    options |= {"temperature": 1.0, "seed": 3, "max_tokens": 8}
    answer = client.chat.completions.create(**options, n=3, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    for choice in answer.choices:
        assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in choice.logprobs.content)


def test_a_mode_and_a_budget_come_with_the_requests_id(client: Any, options: dict[str, Any]) -> None:
    exact = client.chat.completions.create(**options, extra_headers={"x-dash": "dash:mode=exact:"})
    full = client.chat.completions.create(**options, extra_headers={"x-dash": "dash:mode=full_depth:"})
    assert exact.choices[0].message.content == full.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="fixed_action"):
        client.chat.completions.create(**options, extra_headers={"x-dash": "dash:mode=fixed:"})


def test_a_wrong_request_is_told_by_its_field(client: Any, options: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="max_new_tokens"):
        client.chat.completions.create(**{**options, "max_tokens": 100_000})


def test_leaving_a_stream_frees_its_slot(client: Any, service: Service, options: dict[str, Any]) -> None:
    with client.chat.completions.create(**{**options, "max_tokens": 400}, stream=True) as stream:
        next(iter(stream))
    deadline = time.monotonic() + 20
    with DashClient(service.client.target) as own:
        while own.load().running_request_count:
            assert time.monotonic() < deadline
            time.sleep(0.02)
