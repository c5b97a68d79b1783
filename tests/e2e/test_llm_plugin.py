"""The model `dash` of the `llm` command and library against a real server that wants a token, with a tiny model.

`llm` loads this plugin alone: the one of the embedded model's package, which is in the same environment, would end it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

pytest.importorskip("llm", reason="needs the extra llm")

import llm

from dash_client import DashClient, DashError, GenerationOptions, InvalidArgumentError
from dash_client.adapters.llm_plugin import AsyncDashModel, DashModel
from tests.e2e.service import TOKEN, Service

HELLO = "Hello, who are you?"
NUM_TOKENS = 64
OPTIONS = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "seed": 7}
FLAGS = [text for name, value in OPTIONS.items() for text in ("-o", name, str(value))]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def user_folder(tmp_path: Path, token_service: Service, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of `llm`, with the folder of its keys and logs."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("DASH_TARGET", token_service.client.target)
    monkeypatch.setenv("DASH_TOKEN", TOKEN)
    return tmp_path


@pytest.fixture
def command() -> Command:
    """Runs `llm` with these arguments and changes of the environment."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LLM_LOAD_PLUGINS": "dash-llm", **variables}
        arguments = (sys.executable, "-m", "llm", *arguments)
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    return run


def expected_text(client: DashClient, *messages: tuple[str, str]) -> str:
    conversation = [{"role": role, "content": content} for role, content in messages]
    return client.chat(conversation, max_new_tokens=NUM_TOKENS, ignore_eos=True, seed=7).text


def printable(text: str) -> str:
    """The part of the tiny model's output that arrives at the end of a pipe."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def test_the_command_answers_as_the_client_goes_on_and_logs_the_facts(command: Command, client: DashClient) -> None:
    run = command("-m", "dash", HELLO, "-s", "Be brief.", "--usage", *FLAGS)
    turns = [("system", "Be brief."), ("user", HELLO)]
    first = expected_text(client, *turns)
    assert run.returncode == 0, run.stderr
    assert printable(run.stdout) == printable(first)
    assert "Token usage:" in run.stderr
    turns += [("assistant", first), ("user", "Go on.")]
    assert printable(command("-c", "Go on.", *FLAGS).stdout) == printable(expected_text(client, *turns))
    logged = json.loads(command("logs", "list", "--json").stdout)
    prompt_tokens = len(client.tokenize([{"role": role, "content": content} for role, content in turns]))
    assert (logged[-1]["input_tokens"], logged[-1]["output_tokens"]) == (prompt_tokens, NUM_TOKENS)
    for facts in (entry["response_json"] for entry in logged):
        assert facts["finish_reason"] == "length"
        assert facts["policy"].startswith(("plan-", "fixed-", "full-depth"))
        assert client.decisions(facts["request_id"]).steps


def test_a_schema_is_kept_by_the_command_and_the_library(command: Command) -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    schema["additionalProperties"] = False
    run = command("-m", "dash", HELLO, "--schema", json.dumps(schema))
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["colour"] in ("red", "blue")
    answer = DashModel().prompt(HELLO, schema=schema).text()
    assert json.loads(answer)["colour"] in ("red", "blue")


def clock(zone: Literal["CET", "UTC"]) -> str:
    """Tells the time."""
    return f"noon in {zone}"


async def test_a_tool_is_called_and_its_answer_goes_back(client: DashClient) -> None:
    conversation = DashModel().conversation(tools=[clock])
    first = conversation.prompt(HELLO, tool_choice="clock")
    (call,) = first.tool_calls()
    assert (call.name, call.arguments["zone"] in ("CET", "UTC")) == ("clock", True)
    results = first.execute_tool_calls()
    assert results[0].output == f"noon in {call.arguments['zone']}"
    answer = conversation.prompt("So?", tool_results=results, tool_choice="none", **OPTIONS)
    called = {"id": call.tool_call_id, "function": {"name": "clock", "arguments": call.arguments}}
    messages = [
        {"role": "user", "content": HELLO},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": results[0].output, "tool_call_id": call.tool_call_id, "name": "clock"},
        {"role": "user", "content": "So?"},
    ]
    assert answer.text() == client.chat(messages, max_new_tokens=NUM_TOKENS, ignore_eos=True).text
    (awaited,) = await AsyncDashModel().prompt(HELLO, tools=[clock], tool_choice="clock").tool_calls()
    assert awaited.name == "clock"


@pytest.mark.parametrize("how", ["--no-stream", "--async"])
def test_neither_streaming_nor_awaiting_changes_the_answer(command: Command, client: DashClient, how: str) -> None:
    run = command("-m", "dash", HELLO, *FLAGS, how)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert printable(run.stdout) == printable(expected_text(client, ("user", HELLO)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("-o", "mode", "deepest"), "mode: must be one of"), (("-o", "temprature", "1"), "temprature")],
)
def test_what_is_wrong_with_a_command_is_said_without_a_traceback(
    command: Command, arguments: tuple[str, ...], words: str
) -> None:
    run = command("-m", "dash", HELLO, *arguments)
    assert run.returncode == 1
    assert words in run.stderr
    assert "Traceback" not in run.stderr


def test_a_stored_key_is_the_token(command: Command) -> None:
    assert command("keys", "set", "dash", "--value", TOKEN).returncode == 0
    run = command("-m", "dash", HELLO, *FLAGS, DASH_TOKEN="")
    assert run.returncode == 0, run.stderr


async def test_errors_are_the_clients_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, words in (
        ({"target": "localhost:1"}, "no server at localhost:1"),
        ({"temperature": -1}, "temperature: must be a number in"),
        ({"key": "another-token-long-enough"}, "token"),
    ):
        with pytest.raises(DashError, match=words):
            DashModel().prompt(HELLO, **options).text()
        with pytest.raises(DashError, match=words):
            await AsyncDashModel().prompt(HELLO, **options).text()
    monkeypatch.delenv("DASH_TOKEN")
    with pytest.raises(DashError, match="token"):
        DashModel().prompt(HELLO).text()
    assert DashModel().prompt(HELLO, key=TOKEN, **OPTIONS).text()


def test_the_command_explains_every_option(command: Command) -> None:
    listed = command("models", "list", "--options", "-m", "dash").stdout
    assert [name for name in DashModel.Options.model_fields if f"{name}: " not in listed] == []


def test_options_that_fit_a_command_line_are_all_there() -> None:
    not_on_a_command_line = {"constraint", "tools", "n", "logit_bias", "stop_token_ids", "logprobs", "return_decisions"}
    names = {"max_tokens" if name == "max_new_tokens" else name for name in GenerationOptions.__annotations__}
    assert names - not_on_a_command_line <= DashModel.Options.model_fields.keys()


async def test_the_library_streams_converses_and_counts(client: DashClient) -> None:
    conversation = DashModel().conversation()
    first = conversation.prompt(HELLO, system="Be brief.", **OPTIONS)
    pieces = list(first)
    assert len(pieces) > 3
    second = conversation.prompt("Go on.", **OPTIONS, mode="exact")
    turns = [("system", "Be brief."), ("user", HELLO), ("assistant", "".join(pieces)), ("user", "Go on.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert second.text() == client.chat(messages, max_new_tokens=NUM_TOKENS, ignore_eos=True, mode="exact").text
    assert second.usage().input == len(client.tokenize(messages))
    awaited = AsyncDashModel().prompt(HELLO, system="Be brief.", **OPTIONS)
    assert "".join([piece async for piece in awaited]) == "".join(pieces)
    assert (await awaited.usage()).output == NUM_TOKENS
    assert awaited.resolved_model == first.resolved_model == client.model_info().name


def test_a_later_turn_may_change_the_system_prompt(client: DashClient) -> None:
    conversation = DashModel().conversation()
    first = conversation.prompt(HELLO, system="Be brief.", **OPTIONS).text()
    second = conversation.prompt("Go on.", system="Be long.", **OPTIONS).text()
    turns = [("system", "Be long."), ("user", HELLO), ("assistant", first), ("user", "Go on.")]
    assert second == expected_text(client, *turns)


def test_what_the_server_cannot_take_is_refused() -> None:
    image = llm.user(llm.parts.AttachmentPart(llm.Attachment(content=b"png")))
    with pytest.raises(InvalidArgumentError, match="AttachmentPart"):
        DashModel().prompt("Go on.", messages=[image]).text()
    with pytest.raises(ValueError, match="attachments"):
        DashModel().prompt("Look.", attachments=[llm.Attachment(content=b"png")])
    with pytest.raises(DashError, match="must be one of"):
        DashModel().prompt("Go on.", mode="deepest").text()


def test_leaving_an_answer_frees_its_slot() -> None:
    for _ in DashModel().prompt(HELLO, max_tokens=450, ignore_eos=True, mode="exact", draft_length=15):
        break
    assert DashModel().prompt(HELLO, max_tokens=1, timeout=1.5).text() is not None
