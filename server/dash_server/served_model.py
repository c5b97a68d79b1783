"""The model as the server knows it: facts, tokenizer and chat template, from a ready worker.

Knows no weights and no networks.
"""

from dataclasses import dataclass
from pathlib import Path

from dash_api.v1 import common_pb2, generation_pb2, model_pb2
from dash_runtime.chat_template import ChatTemplate
from dash_runtime.config import ModelFacts
from dash_runtime.errors import InvalidRequest
from dash_server.text import TextTokenizer
from dash_server.worker.messages import Ready


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What is needed to read requests and to write their output."""

    facts: ModelFacts
    tokenizer: TextTokenizer
    chat_template: ChatTemplate

    @classmethod
    def load(cls, ready: Ready) -> "ServedModel":
        """Reads the worker's model folder.

        Raises:
            CheckpointError: a file in it is missing or damaged.
        """
        folder = Path(ready.model_folder)
        return cls(ready.facts, TextTokenizer.load(folder), ChatTemplate.load(folder))

    def tokenize(self, prompt: generation_pb2.GenerationParameters | model_pb2.TokenizeRequest) -> list[int]:
        """Token ids of the prompt in either message; blocks for as long as a long text takes.

        Raises:
            InvalidRequest: there is no prompt, or the conversation cannot be rendered.
        """
        match prompt.WhichOneof("prompt"):
            case "text":
                return self.tokenizer.encode(prompt.text)
            case "chat":
                return self.tokenizer.encode(self._render(prompt.chat))
            case "token_ids":
                return list(prompt.token_ids.ids)
            case _:
                raise InvalidRequest("prompt", "is required")

    def prompt_messages(self, prompt: generation_pb2.GenerationParameters) -> list[tuple[str, str]]:
        """Role and text of each message; a prompt that is no conversation is the user's only one."""
        match prompt.WhichOneof("prompt"):
            case "chat":
                return [(message.role, message.content) for message in prompt.chat.messages]
            case "token_ids":
                return [("user", self.tokenizer.decode(prompt.token_ids.ids))]
            case _:
                return [("user", prompt.text)]

    def _render(self, chat: common_pb2.ChatPrompt) -> str:
        return self.chat_template.render([(message.role, message.content) for message in chat.messages])
