"""The Python client of a dash server.

    from dash_client import DashClient

    with DashClient() as client:
        print(client.generate([{"role": "user", "content": "Hello!"}], mode="adaptive").text)

Needs neither torch nor numpy.
"""

from dash_client.client import DashClient, GenerationStream
from dash_client.errors import (
    CancelledError,
    DashError,
    DeadlineExceededError,
    FieldViolation,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    ServerError,
    UnavailableError,
    UnimplementedError,
)
from dash_client.recorded import RecordedDecision, RecordedDecisions, RecordedLayer, RecordedStep, StepKind
from dash_client.types import (
    Action,
    ChatMessage,
    Decisions,
    DepthStatistics,
    FinishReason,
    Generation,
    GenerationOptions,
    GenerationStarted,
    HealthStatus,
    Mode,
    ModelInfo,
    PolicyInfo,
    Prompt,
    SpeculationUsage,
    StreamDelta,
    TokenLogprobs,
    Usage,
)

__all__ = [
    "Action",
    "CancelledError",
    "ChatMessage",
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
    "Mode",
    "ModelInfo",
    "NotFoundError",
    "PolicyInfo",
    "Prompt",
    "RecordedDecision",
    "RecordedDecisions",
    "RecordedLayer",
    "RecordedStep",
    "ResourceExhaustedError",
    "ServerError",
    "SpeculationUsage",
    "StepKind",
    "StreamDelta",
    "TokenLogprobs",
    "UnavailableError",
    "UnimplementedError",
    "Usage",
]
