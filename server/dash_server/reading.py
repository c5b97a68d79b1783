"""Turns a message of GenerationService into a prepared request. Knows no call and no queue."""

from dataclasses import dataclass
from typing import Any

from dash_api.v1 import generation_pb2
from dash_server.auth import Caller
from dash_server.from_pb import PreparedRequest, prepare_request, prepare_score
from dash_server.request_record import RequestRecord
from dash_server.served_model import ServedModel
from dash_server.settings import Settings
from dash_server.statuses import below
from dash_server.tools import CheckGrammar

Request = generation_pb2.GenerateRequest | generation_pb2.StreamGenerateRequest | generation_pb2.ScoreRequest


@dataclass(frozen=True, slots=True)
class Reading:
    """The record, model, settings and caller with which a request is read, and what checks its grammar."""

    record: RequestRecord
    model: ServedModel
    settings: Settings
    caller: Caller
    check_grammar: CheckGrammar

    @property
    def common(self) -> dict[str, Any]:
        """The arguments that `from_pb` takes for every request."""
        return {
            "request_id": self.record.request_id,
            "model": self.model,
            "settings": self.settings,
            "caller": self.caller,
        }


def has_grammar(message: Request) -> bool:
    """True if a request has a grammar, or tools, whose calls have one."""
    return message.parameters.HasField("constraint") or bool(message.parameters.chat.tools)


def prepare(message: Request, reading: Reading) -> PreparedRequest:
    """Returns the request that `message` asks for, and fills in the record.

    Raises:
        InvalidRequest, InvalidFields: fields are wrong.
    """
    parameters: generation_pb2.GenerationParameters = message.parameters
    record = reading.record
    record.is_chat = parameters.WhichOneof("prompt") == "chat"
    record.wants_trace = parameters.output.trace
    if isinstance(message, generation_pb2.ScoreRequest):
        prepared = prepare_score(message, **reading.common)
    else:
        with below("parameters"):
            is_streamed = isinstance(message, generation_pb2.StreamGenerateRequest)
            prepared = prepare_request(
                parameters, **reading.common, is_streamed=is_streamed, check_grammar=reading.check_grammar
            )
    if record.trace_id and reading.settings.trace_content:
        record.prompt, record.output = reading.model.prompt_messages(parameters), ""
    return prepared
