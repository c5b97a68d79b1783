"""The served model without its weights: facts, tokenizer and chat template, from a ready worker. Knows no network."""

import logging
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from dash_api.v1 import common_pb2, generation_pb2, model_pb2
from dash_runtime.checkpoints import resolve_checkpoint
from dash_runtime.checkpoints.chat_template import ChatTemplate
from dash_runtime.checkpoints.hub import is_hub_id
from dash_runtime.config import ModelFacts
from dash_runtime.errors import CheckpointNotFound, InvalidRequest
from dash_server.statuses import below
from dash_server.text import TextTokenizer
from dash_server.tools import Tools, calls_as_text, read_tools, template_messages, template_tools
from dash_server.worker.messages import Ready

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """All that the server needs of a model to read requests and write their output."""

    facts: ModelFacts
    tokenizer: TextTokenizer
    chat_template: ChatTemplate
    folder: Path
    files: tuple[tuple[str, int, int], ...] = ()
    """The folder's files when they were read: names, sizes, and when they last changed."""

    @classmethod
    def load(
        cls, ready: Ready, model: str, revision: str | None, cache_folder: Path, last: "ServedModel | None" = None
    ) -> "ServedModel":
        """Reads the worker's model folder. If this machine has no such folder, `model` is fetched from the hub.

        What `last` read of unchanged files is kept: a tokenizer is large, and workers that fail begin often.

        Raises:
            CheckpointError: a file is missing or damaged, or the model has another machine's folder.
        """
        folder = Path(ready.model_folder)
        if not folder.is_dir():
            if not is_hub_id(model):
                # A conversion would import torch into this process.
                raise CheckpointNotFound(
                    f"The worker's model is in {folder}, which this machine does not have: DASH_MODEL and "
                    "DASH_CACHE_FOLDER must be folders that all machines share, at the same path."
                )
            folder = resolve_checkpoint(model, revision, cache_folder, logger.info)
        files = _files(folder)
        if last is not None and (last.folder, last.files) == (folder, files):
            return replace(last, facts=ready.facts)
        return cls(ready.facts, TextTokenizer.load(folder), ChatTemplate.load(folder), folder, files)

    def tokenize(self, prompt: generation_pb2.GenerationParameters | model_pb2.TokenizeRequest) -> list[int]:
        """Returns the prompt's token ids. Blocks: a long text takes milliseconds.

        Raises:
            InvalidRequest: there is no prompt, or the conversation cannot be rendered.
        """
        if prompt.WhichOneof("prompt") == "token_ids":
            return list(prompt.token_ids.ids)
        return self.tokenizer.encode(self._text(prompt))

    def split(self, score: generation_pb2.ScoreRequest) -> tuple[list[int], list[int]]:
        """Returns the token ids of the prompt and of the output to score. Blocks, as `tokenize` does.

        Raises:
            InvalidRequest: there is no prompt or no output, or the conversation cannot be rendered.
        """
        kind, parameters = score.WhichOneof("continuation"), score.parameters
        with below("parameters"):
            given = None if parameters.WhichOneof("prompt") == "token_ids" else self._text(parameters)
        prompt = list(parameters.token_ids.ids) if given is None else self.tokenizer.encode(given)
        if kind is None:
            whole, num_given = prompt, 1
        elif given is None or kind == "token_ids":
            more = score.token_ids.ids if kind == "token_ids" else self.tokenizer.encode(score.text)
            whole, num_given = [*prompt, *more], len(prompt)
        else:
            whole = self.tokenizer.encode(given + score.text)
            # The tokenizer may join the prompt's end and the text's beginning in one token: it is scored.
            num_given = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))
        if num_given < 1:
            raise InvalidRequest("parameters.prompt", "has no token of its own before the continuation")
        if num_given >= len(whole):
            missing = "must not be empty" if kind else "is missing, and the prompt has only one token"
            raise InvalidRequest("continuation", missing)
        return whole[:num_given], whole[num_given:]

    def tools(self, chat: common_pb2.ChatPrompt) -> Tools | None:
        """Returns the tools that the reply may call. Raises InvalidRequest as `read_tools` does."""
        return read_tools(chat, self.chat_template, self.tokenizer)

    def prompt_messages(self, prompt: generation_pb2.GenerationParameters) -> list[tuple[str, str]]:
        """Returns role and text of each message. A prompt that is no chat counts as one user message."""
        match prompt.WhichOneof("prompt"):
            case "chat":
                return [(message.role, message.content + calls_as_text(message)) for message in prompt.chat.messages]
            case "token_ids":
                return [("user", self.tokenizer.decode(prompt.token_ids.ids))]
            case _:
                return [("user", prompt.text)]

    def _text(self, prompt: generation_pb2.GenerationParameters | model_pb2.TokenizeRequest) -> str:
        """Returns the prompt's text. Raises InvalidRequest: there is none, or it cannot be rendered."""
        match prompt.WhichOneof("prompt"):
            case "text":
                return prompt.text
            case "chat":
                # Each message takes a token at least.
                if (number := len(prompt.chat.messages)) > (limit := self.facts.context_length):
                    raise InvalidRequest("chat.messages", f"has {number} messages, and the context {limit} tokens")
                tools = self.tools(prompt.chat)
                shown = None if tools is None else template_tools(prompt.chat, tools)
                return self.chat_template.render(template_messages(prompt.chat), shown)
            case _:
                raise InvalidRequest("prompt", "is required")


def _files(folder: Path) -> tuple[tuple[str, int, int], ...]:
    each = [(path.name, path.stat() if path.exists() else path.lstat()) for path in folder.iterdir()]
    return tuple(sorted((name, status.st_size, status.st_mtime_ns) for name, status in each))
