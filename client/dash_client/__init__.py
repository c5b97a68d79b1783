"""The Python client of a dash server.

    from dash_client import DashClient

    with DashClient() as client:
        print(client.generate([{"role": "user", "content": "Hello!"}], mode="adaptive").text)

Needs neither torch nor numpy.
"""

from dash_client.aio import AsyncDashClient
from dash_client.aio_session import AsyncSession
from dash_client.client import DashClient
from dash_client.connection import ConnectionOptions
from dash_client.constraint import Constraint, LarkGrammar
from dash_client.decision_trace import RecordedDecision, RecordedDecisions, RecordedLayer, RecordedStep, StepKind
from dash_client.errors import (
    CancelledError,
    DashError,
    DeadlineExceededError,
    FieldViolation,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    ServerError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from dash_client.options import GenerationOptions, Messages, Prompt
from dash_client.score import Score, ScoreOptions
from dash_client.server_facts import Audit, ModelInfo, PolicyInfo, ServerLoad
from dash_client.session import Session
from dash_client.streams import AsyncGenerationStream, GenerationStream
from dash_client.tools import AnyTool, Tool, ToolCall
from dash_client.types import (
    Action,
    ChatMessage,
    Decisions,
    DepthStatistics,
    FinishReason,
    Generation,
    GenerationStarted,
    HealthStatus,
    Mode,
    Priority,
    SpeculationUsage,
    StreamDelta,
    TokenLogprobs,
    Usage,
)

__all__ = [
    "Action",
    "AnyTool",
    "AsyncDashClient",
    "AsyncGenerationStream",
    "AsyncSession",
    "Audit",
    "CancelledError",
    "ChatMessage",
    "ConnectionOptions",
    "Constraint",
    "DashClient",
    "DashError",
    "DeadlineExceededError",
    "Decisions",
    "DepthStatistics",
    "FieldViolation",
    "FinishReason",
    "Generation",
    "GenerationOptions",
    "GenerationStarted",
    "GenerationStream",
    "HealthStatus",
    "InvalidArgumentError",
    "LarkGrammar",
    "Messages",
    "Mode",
    "ModelInfo",
    "NotFoundError",
    "PolicyInfo",
    "Priority",
    "Prompt",
    "RecordedDecision",
    "RecordedDecisions",
    "RecordedLayer",
    "RecordedStep",
    "ResourceExhaustedError",
    "Score",
    "ScoreOptions",
    "ServerError",
    "ServerLoad",
    "Session",
    "SpeculationUsage",
    "StepKind",
    "StreamDelta",
    "TokenLogprobs",
    "Tool",
    "ToolCall",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "Usage",
]
