"""The LangChain chat model against a real server that wants a token, with a tiny model."""

import asyncio
import pickle
import sys
import time
from typing import Any, Literal, TypedDict

import pytest

pytest.importorskip("langchain_core", reason="needs the extra langchain")

from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import get_usage_metadata_callback
from langchain_core.load import dumps, load
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.tool import invalid_tool_call
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from pydantic import BaseModel, Field, SecretStr, ValidationError

from dash_client import DashClient, DashError, GenerationOptions, InvalidArgumentError, UnavailableError
from dash_client.adapters.langchain import ChatDash
from tests.e2e.service import TOKEN, Service

HELLO = "Hello, who are you?"
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": HELLO},
]
MESSAGES = [SystemMessage("Be brief."), HumanMessage("Hello"), AIMessage("Good day."), HumanMessage(HELLO)]


@pytest.fixture
def model(token_service: Service) -> ChatDash:
    return ChatDash(target=token_service.client.target, token=SecretStr(TOKEN), max_tokens=24, ignore_eos=True, seed=7)


def nobody() -> ChatDash:
    """A model without a server."""
    return ChatDash(target="localhost:1", max_retries=0)


def joined(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


def test_an_answer_is_the_clients_with_what_it_says_of_itself(model: ChatDash, client: DashClient) -> None:
    expected = client.chat(CONVERSATION, max_new_tokens=24, ignore_eos=True, seed=7)
    answer = model.invoke(MESSAGES)
    assert answer.text == expected.text != ""
    assert answer.usage_metadata == {
        "input_tokens": expected.usage.prompt_token_count,
        "output_tokens": 24,
        "total_tokens": expected.usage.prompt_token_count + 24,
    }
    facts = answer.response_metadata
    assert facts["model_name"] == expected.started.model
    assert facts["finish_reason"] == "length"
    assert facts["policy"] == expected.started.policy
    assert facts["mean_cost"] == expected.depth.mean_cost
    assert facts["request_id"] not in ("", expected.started.request_id)
    assert client.decisions(facts["request_id"]).steps


class Person(BaseModel):
    """Somebody."""

    name: str = Field(min_length=1, max_length=5, pattern="^[a-z]+$")
    age: int = Field(ge=0, le=99)


class Pet(TypedDict):
    """An animal."""

    is_big: bool


async def test_structured_output_is_an_instance_or_a_dict_and_a_cut_one_is_told(model: ChatDash) -> None:
    roomy = model.model_copy(update={"max_tokens": 80})
    structured = roomy.with_structured_output(Person)
    assert isinstance(structured.invoke(MESSAGES), Person)
    assert isinstance(await structured.ainvoke(MESSAGES), Person)
    as_dict = roomy.with_structured_output(Person.model_json_schema()).invoke(MESSAGES)
    assert Person(**as_dict) == structured.invoke(MESSAGES)
    assert roomy.with_structured_output(Pet).invoke(MESSAGES)["is_big"] in (True, False)
    short = model.model_copy(update={"max_tokens": 3}).with_structured_output(Person, include_raw=True)
    cut = short.invoke(MESSAGES)
    assert cut["parsed"] is None
    assert cut["parsing_error"] is not None
    assert cut["raw"].response_metadata["finish_reason"] == "length"
    whole = roomy.with_structured_output(Person, include_raw=True, method="json_schema").invoke(MESSAGES)
    assert (whole["parsed"], whole["parsing_error"]) == (structured.invoke(MESSAGES), None)
    with pytest.raises(ValueError, match="function_calling"):
        model.with_structured_output(Person, method="function_calling")
    with pytest.raises(ValueError, match="strict"):
        model.with_structured_output(Person, strict=True)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="pydantic 1 does not know this Python")
def test_structured_output_takes_a_model_of_pydantic_1(model: ChatDash) -> None:
    from pydantic.v1 import BaseModel as OldModel

    class Answer(OldModel):
        is_big: bool

    answer = model.model_copy(update={"max_tokens": 80}).with_structured_output(Answer).invoke(MESSAGES)
    assert isinstance(answer, Answer)


def clock(zone: Literal["CET", "UTC"]) -> str:
    """Tells the time."""
    return zone


@pytest.mark.parametrize("choice", ["any", True, "clock", {"type": "function", "function": {"name": "clock"}}])
async def test_bound_tools_are_called_and_their_answers_go_back(model: ChatDash, choice: Any) -> None:
    roomy = model.model_copy(update={"max_tokens": 80, "ignore_eos": False})
    bound = roomy.bind_tools([clock], tool_choice=choice)
    answer = bound.invoke(MESSAGES)
    assert {call["name"] for call in answer.tool_calls} == {"clock"}
    assert {call["args"]["zone"] for call in answer.tool_calls} <= {"CET", "UTC"}
    whole = joined(list(bound.stream(MESSAGES)))
    streamed = joined([chunk async for chunk in bound.astream(MESSAGES)])
    for chunk in (whole, streamed):
        assert [(call["name"], call["args"]) for call in chunk.tool_calls] == [
            (call["name"], call["args"]) for call in answer.tool_calls
        ]
    results = [ToolMessage("noon", tool_call_id=call["id"]) for call in answer.tool_calls]
    assert roomy.bind_tools([clock], tool_choice="none").invoke([*MESSAGES, answer, *results]).text


def test_tools_count_as_tokens_of_the_prompt(model: ChatDash) -> None:
    assert model.get_num_tokens_from_messages(MESSAGES, [clock]) > model.get_num_tokens_from_messages(MESSAGES)


async def test_streaming_and_awaiting_change_nothing(model: ChatDash) -> None:
    expected = model.invoke(MESSAGES)
    answers = [
        joined(list(model.stream(MESSAGES))),
        await model.ainvoke(MESSAGES),
        joined([chunk async for chunk in model.astream(MESSAGES)]),
    ]
    for answer in answers:
        assert answer.text == expected.text
        assert answer.usage_metadata == expected.usage_metadata
        facts = ("model_name", "finish_reason", "mode", "policy", "mean_cost", "mean_layers")
        assert {name: answer.response_metadata.get(name) for name in facts} == {
            name: expected.response_metadata.get(name) for name in facts
        }


def test_a_stream_comes_in_pieces_of_which_the_last_has_the_facts(model: ChatDash) -> None:
    chunks = list(model.stream(HELLO))
    assert len(chunks) > 3
    assert all(chunk.usage_metadata is None and chunk.text for chunk in chunks[:-1])
    assert chunks[-1].chunk_position == "last"
    assert chunks[-1].response_metadata["request_id"]


async def test_a_batch_is_answered_in_order(model: ChatDash) -> None:
    prompts = [f"prompt {'x' * number}" for number in range(5)]
    expected = [model.invoke(prompt).text for prompt in prompts]
    assert [answer.text for answer in model.batch(prompts)] == expected
    assert [answer.text for answer in await model.abatch(prompts)] == expected


def test_it_is_part_of_a_chain_and_its_tokens_are_added_up(model: ChatDash) -> None:
    chain = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{question}")]) | model
    with get_usage_metadata_callback() as counted:
        text = (chain | StrOutputParser()).invoke({"question": HELLO})
    assert text == model.invoke([SystemMessage("Be brief."), HumanMessage(HELLO)]).text
    assert [counts["output_tokens"] for counts in counted.usage_metadata.values()] == [24]


def test_what_a_call_sets_goes_before_what_the_model_sets(model: ChatDash) -> None:
    full = model.bind(mode="full_depth", max_tokens=6)
    adaptive = full.bind(mode="adaptive", compute_budget=1.0, return_decisions=True, logprobs=2)
    assert full.invoke(HELLO).response_metadata["mode"] == "full_depth"
    answer = adaptive.invoke(HELLO)
    facts = answer.response_metadata
    assert (facts["mode"], facts["compute_budget"]) == ("adaptive", pytest.approx(1.0))
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == len(facts["decisions"]) == len(facts["logprobs"]) == 6
    assert set(facts["decisions"][0]) == {"full"}
    assert len(facts["logprobs"][0]["top"]) == 2


def test_a_calls_stop_strings_replace_the_models(model: ChatDash) -> None:
    text = model.invoke(HELLO).text
    early, late = text[1:3], text[4:6]
    stopping = model.model_copy(update={"stop": [early]})
    assert stopping.invoke(HELLO).text == text[: text.index(early)]
    answer = stopping.invoke(HELLO, stop=[late])
    assert answer.text == text[: text.index(late)]
    assert answer.response_metadata["finish_reason"] == "stop_string"
    assert answer.response_metadata["stop_string"] == late


def test_messages_become_the_conversation_that_the_chat_template_gets(model: ChatDash, client: DashClient) -> None:
    assert model.get_num_tokens_from_messages(MESSAGES) == len(client.tokenize(CONVERSATION))
    assert model.get_token_ids("some text") == list(client.tokenize("some text"))
    blocks = HumanMessage([{"type": "text", "text": HELLO[:5]}, {"type": "text", "text": HELLO[5:]}])
    assert model.invoke([*MESSAGES[:-1], blocks]).text == model.invoke(MESSAGES).text
    assert model.invoke([("human", HELLO)]).text == model.invoke(HELLO).text


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (FunctionMessage("42", name="add"), "function message"),
        (AIMessage("", invalid_tool_calls=[invalid_tool_call(name="add", args="{")]), "invalid"),
        (HumanMessage([{"type": "image", "url": "https://example.org/cat.png"}]), "'image'"),
    ],
)
def test_what_the_server_cannot_take_is_refused_before_it_is_sent(message: BaseMessage, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words) as refusal:
        nobody().invoke([HumanMessage("Hello"), message])
    assert refusal.value.field_violations[0].field == "messages[1]"


async def test_errors_are_the_clients_own(model: ChatDash) -> None:
    with pytest.raises(UnavailableError, match="no server at localhost:1"):
        nobody().invoke(HELLO)
    with pytest.raises(UnavailableError):
        list(nobody().stream(HELLO))
    with pytest.raises(UnavailableError):
        await nobody().ainvoke(HELLO)
    with pytest.raises(UnavailableError):
        await anext(nobody().astream(HELLO))
    with pytest.raises(InvalidArgumentError, match="temperature"):
        model.invoke(HELLO, temperature=-1)
    with pytest.raises(DashError) as refusal:
        model.model_copy(update={"token": SecretStr("another-token-long-enough")}).invoke(HELLO)
    assert refusal.value.code == "UNAUTHENTICATED"


def test_unknown_options_are_refused(model: ChatDash) -> None:
    with pytest.raises(ValidationError, match="temprature"):
        ChatDash(temprature=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="temprature"):
        model.invoke(HELLO, temprature=0.5)


def test_every_option_of_a_generation_is_a_field() -> None:
    names = {"max_tokens" if name == "max_new_tokens" else name for name in GenerationOptions.__annotations__}
    others = {"constraint", "tools", "tool_choice", "n"}  # set by methods; a chat model has one answer
    assert names - others <= ChatDash.model_fields.keys()


def test_the_token_is_in_nothing_that_is_shown_logged_or_stored(model: ChatDash) -> None:
    shown = [repr(model), str(model), str(model._identifying_params), str(model.model_dump())]
    assert not [text for text in (*shown, dumps(model), dumps(model | str)) if TOKEN in text]


@pytest.mark.filterwarnings("ignore:The function `load` is in beta")
def test_a_model_can_be_stored_and_loaded_and_copied(model: ChatDash) -> None:
    expected = model.invoke(HELLO).text
    stored = model.to_json()
    loaded = load(
        stored, allowed_objects=[ChatDash], valid_namespaces=["dash_client"], secrets_map={"DASH_TOKEN": TOKEN}
    )
    for other in (loaded, pickle.loads(pickle.dumps(model)), model.model_copy(deep=True)):
        assert isinstance(other, ChatDash)
        assert other.invoke(HELLO).text == expected


def test_a_cache_tells_models_with_other_options_apart(model: ChatDash) -> None:
    cache = InMemoryCache()
    short, long = (model.model_copy(update={"max_tokens": number, "cache": cache}) for number in (2, 4))
    first = short.invoke(HELLO)
    assert long.invoke(HELLO).text != first.text
    assert short.invoke(HELLO).response_metadata["request_id"] == first.response_metadata["request_id"]


def test_one_model_serves_one_event_loop_after_another(model: ChatDash) -> None:
    async def answers() -> list[str]:
        return [answer.text for answer in await asyncio.gather(*(model.ainvoke(HELLO) for _ in range(3)))]

    assert len({text for _ in range(3) for text in asyncio.run(answers())}) == 1


async def test_leaving_a_stream_frees_its_slot(model: ChatDash) -> None:
    endless: dict[str, Any] = {"max_tokens": 450, "mode": "exact", "draft_length": 15}
    begin = time.monotonic()
    whole = sum(1 for _ in model.stream(HELLO, **endless))
    seconds = time.monotonic() - begin
    assert whole > 3
    begin = time.monotonic()
    for _ in model.stream(HELLO, **endless):
        break
    model.invoke(HELLO, max_tokens=1)
    async for _ in model.astream(HELLO, **endless):
        break
    await model.ainvoke(HELLO, max_tokens=1)
    assert time.monotonic() - begin < max(seconds, 1.0)
