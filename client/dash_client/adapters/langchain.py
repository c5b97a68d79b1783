"""`ChatDash`, a LangChain chat model for a dash server. Needs the extra `langchain`.

    from dash_client.adapters.langchain import ChatDash

    model = ChatDash(mode="adaptive", max_tokens=64)
    print(model.invoke("What is the capital of France?").text)

Knows LangChain's core only; the client and the server check the ranges of options.
"""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.base import LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from dash_client.adapters.answer_facts import answer_facts
from dash_client.adapters.langchain_messages import call_chunks, calls, conversation, usage_metadata
from dash_client.adapters.option_fields import ConnectionFields, OptionFields, client_options
from dash_client.adapters.shared_clients import shared_async_client, shared_client
from dash_client.aio import AsyncDashClient
from dash_client.client import DashClient
from dash_client.types import Generation, StreamDelta

PROVIDER = "dash"
"""Our name among LangChain's providers."""


class ChatDash(ConnectionFields, OptionFields, BaseChatModel):
    """A chat model that a dash server serves.

    Options set here apply to every request; those of `bind` or of a call override them: `model.bind(mode="exact")`.
    An answer's `usage_metadata` counts its tokens; its `response_metadata` holds the finish reason, policy, mean cost
    and request id. A call that fails raises a `DashError`.

    Example:
        model = ChatDash(mode="adaptive", compute_budget=0.8)
        for chunk in model.stream("Once upon a time"):
            print(chunk.text, end="", flush=True)
    """

    model_config = ConfigDict(extra="forbid")

    token: SecretStr | None = Field(default=None, description="Bearer token; unset: DASH_TOKEN")
    max_retries: int | None = Field(default=None, description="Tries after the first, in [0, 4]; unset: 3")
    streaming: bool = Field(default=False, description="Whether `invoke` streams, for callbacks to see each token")
    stop_token_ids: Sequence[int] | None = Field(default=None, description="Stop at the first of these token ids")
    logit_bias: Mapping[int, float] | None = Field(default=None, description="Added to these token ids' logits")
    logprobs: int | None = Field(default=None, description="Return log probabilities and this many alternatives")
    return_decisions: bool | None = Field(default=None, description="Return the action of every layer and token")

    @property
    def _llm_type(self) -> str:
        return "dash-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """The parameters that an answer depends on; also the key of LangChain's cache."""
        return {"target": self.target, **self._options()}

    @property
    def lc_secrets(self) -> dict[str, str]:
        return {"token": "DASH_TOKEN"}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    def get_token_ids(self, text: str) -> list[int]:
        """Returns the token ids of a text, by the server's tokenizer."""
        return list(self._client().tokenize(text))

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
    ) -> int:
        """Returns the number of tokens in the conversation, including those of the chat template."""
        offered = None if tools is None else [convert_to_openai_tool(tool) for tool in tools]
        return len(self._client().tokenize(conversation(messages), tools=offered))

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Returns a model that may call these tools; its calls keep the tools' schemas.

        Args:
            tools: functions, pydantic model classes, TypedDicts, LangChain's tools, or dicts in OpenAI's form.
            tool_choice: "auto", "none", "any" or "required" or True (calls alone), or the name of the one that is
                called, also in OpenAI's form.
            kwargs: other options of every request, as for `bind`. `strict` is ignored: calls are always strict.
        """
        kwargs.pop("strict", None)
        offered = [convert_to_openai_tool(tool) for tool in tools]
        return cast(
            Runnable[LanguageModelInput, AIMessage],
            self.bind(tools=offered, tool_choice=_choice(tool_choice), **kwargs),
        )

    def with_structured_output(
        self, schema: dict[str, Any] | type, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """Returns a model whose answers are instances of a pydantic model class, or dicts by another schema.

        Args:
            schema: a pydantic model class, a TypedDict or a JSON schema; every answer keeps to it unless it is cut off.
            include_raw: return a dict of `raw`, `parsed` and `parsing_error`, and raise nothing for a text cut off.
            kwargs: `method` may be "json_schema", which is the only one.

        Raises:
            ValueError: another method or option is asked for.
        """
        if (method := kwargs.pop("method", "json_schema")) != "json_schema" or kwargs:
            raise ValueError(f"cannot do {', '.join([f'method={method!r}', *kwargs])}; the only method is json_schema")
        parser: BaseOutputParser[Any] = JsonOutputParser()
        if is_basemodel_subclass(cast(type, schema)):  # of pydantic 1, too
            parser = PydanticOutputParser(pydantic_object=cast(type[BaseModel], schema))
        is_known = isinstance(schema, dict) or issubclass(schema, BaseModel)
        wanted = schema if is_known else convert_to_json_schema(schema, strict=True)
        answer = self.bind(
            constraint=wanted,
            ls_structured_output_format={"kwargs": {"method": method}, "schema": convert_to_json_schema(schema)},
        )
        if not include_raw:
            return answer | parser
        parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=answer) | parsed.with_fallbacks([failed], exception_key="parsing_error")

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _result(self._client().chat(conversation(messages), **self._options(stop, kwargs)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _result(await self._async_client().chat(conversation(messages), **self._options(stop, kwargs)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with self._client().chat_stream(conversation(messages), **self._options(stop, kwargs)) as stream:
            num_calls = 0
            for delta in stream:
                if delta.text or delta.tool_calls:
                    yield _chunk(delta, num_calls)
                    num_calls += len(delta.tool_calls)
            yield _last_chunk(stream.final())

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async with self._async_client().chat_stream(conversation(messages), **self._options(stop, kwargs)) as stream:
            num_calls = 0
            async for delta in stream:
                if delta.text or delta.tool_calls:
                    yield _chunk(delta, num_calls)
                    num_calls += len(delta.tool_calls)
            yield _last_chunk(await stream.final())

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        own = [self.stop] if isinstance(self.stop, str) else self.stop
        params = super()._get_ls_params(stop=own if stop is None else stop, **kwargs)
        # The name of the served model is known only after an answer.
        params.setdefault("ls_model_name", PROVIDER)
        return params

    def _options(self, stop: list[str] | None = None, call: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Returns the keyword arguments of the client's `chat`."""
        declared = [*OptionFields.model_fields, "stop_token_ids", "logit_bias", "logprobs", "return_decisions"]
        options = {name: getattr(self, name) for name in declared}
        # `stream` is an argument of LangChain's own.
        options |= {name: value for name, value in (call or {}).items() if name != "stream"}
        if stop is not None:
            options["stop"] = stop
        return client_options(options)

    def _client(self) -> DashClient:
        return shared_client(**self._connection())

    def _async_client(self) -> AsyncDashClient:
        return shared_async_client(**self._connection())

    def _connection(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in ConnectionFields.model_fields}
        given["retries"] = self.max_retries
        given["token"] = None if self.token is None else self.token.get_secret_value()
        return {name: value for name, value in given.items() if value is not None}


def _result(generation: Generation) -> ChatResult:
    message = AIMessage(generation.text, tool_calls=calls(generation.tool_calls), **_metadata(generation))
    return ChatResult(generations=[ChatGeneration(message=message)])


def _choice(choice: dict[str, Any] | str | bool | None) -> str | None:
    """Returns the client's `tool_choice`."""
    if isinstance(choice, dict):
        return str(choice["function"]["name"])
    if isinstance(choice, bool):
        return "required" if choice else "auto"
    return "required" if choice == "any" else choice


def _chunk(delta: StreamDelta, num_calls: int) -> ChatGenerationChunk:
    chunks = call_chunks(delta.tool_calls, num_calls)
    return ChatGenerationChunk(message=AIMessageChunk(content=delta.text, tool_call_chunks=chunks))


def _last_chunk(generation: Generation) -> ChatGenerationChunk:
    message = AIMessageChunk(content="", chunk_position="last", **_metadata(generation))
    return ChatGenerationChunk(message=message)


def _metadata(generation: Generation) -> dict[str, Any]:
    facts = {"model_provider": PROVIDER, **answer_facts(generation)}
    return {"usage_metadata": usage_metadata(generation.usage), "response_metadata": facts}
