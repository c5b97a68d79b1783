from dash_api.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StepKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_KIND_UNSPECIFIED: _ClassVar[StepKind]
    STEP_KIND_DECODE: _ClassVar[StepKind]
    STEP_KIND_DRAFT: _ClassVar[StepKind]
    STEP_KIND_VERIFICATION: _ClassVar[StepKind]
STEP_KIND_UNSPECIFIED: StepKind
STEP_KIND_DECODE: StepKind
STEP_KIND_DRAFT: StepKind
STEP_KIND_VERIFICATION: StepKind

class GetModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("name", "architecture", "layer_count", "vocabulary_size", "context_length", "max_new_tokens_limit", "default_max_new_tokens", "cache_tokens", "slot_count", "actions", "modes", "default_mode", "policy_names", "default_policy_name", "device", "default_draft_policy_name", "is_compiled", "weight_error")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    LAYER_COUNT_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SIZE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_LIMIT_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SLOT_COUNT_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    MODES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MODE_FIELD_NUMBER: _ClassVar[int]
    POLICY_NAMES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_POLICY_NAME_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_DRAFT_POLICY_NAME_FIELD_NUMBER: _ClassVar[int]
    IS_COMPILED_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_ERROR_FIELD_NUMBER: _ClassVar[int]
    name: str
    architecture: str
    layer_count: int
    vocabulary_size: int
    context_length: int
    max_new_tokens_limit: int
    default_max_new_tokens: int
    cache_tokens: int
    slot_count: int
    actions: _containers.RepeatedScalarFieldContainer[_common_pb2.Action]
    modes: _containers.RepeatedScalarFieldContainer[_common_pb2.Mode]
    default_mode: _common_pb2.Mode
    policy_names: _containers.RepeatedScalarFieldContainer[str]
    default_policy_name: str
    device: str
    default_draft_policy_name: str
    is_compiled: bool
    weight_error: float
    def __init__(self, name: _Optional[str] = ..., architecture: _Optional[str] = ..., layer_count: _Optional[int] = ..., vocabulary_size: _Optional[int] = ..., context_length: _Optional[int] = ..., max_new_tokens_limit: _Optional[int] = ..., default_max_new_tokens: _Optional[int] = ..., cache_tokens: _Optional[int] = ..., slot_count: _Optional[int] = ..., actions: _Optional[_Iterable[_Union[_common_pb2.Action, str]]] = ..., modes: _Optional[_Iterable[_Union[_common_pb2.Mode, str]]] = ..., default_mode: _Optional[_Union[_common_pb2.Mode, str]] = ..., policy_names: _Optional[_Iterable[str]] = ..., default_policy_name: _Optional[str] = ..., device: _Optional[str] = ..., default_draft_policy_name: _Optional[str] = ..., is_compiled: bool = ..., weight_error: _Optional[float] = ...) -> None: ...

class GetPolicyRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetPolicyResponse(_message.Message):
    __slots__ = ("name", "note", "learned", "lookahead", "pinned_layers", "action_costs", "lowest_budget", "compensation", "recommended_budget", "is_drafter")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    LEARNED_FIELD_NUMBER: _ClassVar[int]
    LOOKAHEAD_FIELD_NUMBER: _ClassVar[int]
    PINNED_LAYERS_FIELD_NUMBER: _ClassVar[int]
    ACTION_COSTS_FIELD_NUMBER: _ClassVar[int]
    LOWEST_BUDGET_FIELD_NUMBER: _ClassVar[int]
    COMPENSATION_FIELD_NUMBER: _ClassVar[int]
    RECOMMENDED_BUDGET_FIELD_NUMBER: _ClassVar[int]
    IS_DRAFTER_FIELD_NUMBER: _ClassVar[int]
    name: str
    note: str
    learned: bool
    lookahead: int
    pinned_layers: _containers.RepeatedScalarFieldContainer[int]
    action_costs: _containers.RepeatedCompositeFieldContainer[ActionCost]
    lowest_budget: float
    compensation: str
    recommended_budget: float
    is_drafter: bool
    def __init__(self, name: _Optional[str] = ..., note: _Optional[str] = ..., learned: bool = ..., lookahead: _Optional[int] = ..., pinned_layers: _Optional[_Iterable[int]] = ..., action_costs: _Optional[_Iterable[_Union[ActionCost, _Mapping]]] = ..., lowest_budget: _Optional[float] = ..., compensation: _Optional[str] = ..., recommended_budget: _Optional[float] = ..., is_drafter: bool = ...) -> None: ...

class ActionCost(_message.Message):
    __slots__ = ("action", "cost")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    action: _common_pb2.Action
    cost: float
    def __init__(self, action: _Optional[_Union[_common_pb2.Action, str]] = ..., cost: _Optional[float] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("text", "chat")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    text: str
    chat: _common_pb2.ChatPrompt
    def __init__(self, text: _Optional[str] = ..., chat: _Optional[_Union[_common_pb2.ChatPrompt, _Mapping]] = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("running_request_count", "waiting_request_count", "slot_count", "worker_count", "token_count", "token_limit", "cache_token_count", "cache_token_limit", "decode_tokens_per_second", "prefill_tokens_per_second", "is_draining")
    RUNNING_REQUEST_COUNT_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUEST_COUNT_FIELD_NUMBER: _ClassVar[int]
    SLOT_COUNT_FIELD_NUMBER: _ClassVar[int]
    WORKER_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_LIMIT_FIELD_NUMBER: _ClassVar[int]
    CACHE_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHE_TOKEN_LIMIT_FIELD_NUMBER: _ClassVar[int]
    DECODE_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    running_request_count: int
    waiting_request_count: int
    slot_count: int
    worker_count: int
    token_count: int
    token_limit: int
    cache_token_count: int
    cache_token_limit: int
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    is_draining: bool
    def __init__(self, running_request_count: _Optional[int] = ..., waiting_request_count: _Optional[int] = ..., slot_count: _Optional[int] = ..., worker_count: _Optional[int] = ..., token_count: _Optional[int] = ..., token_limit: _Optional[int] = ..., cache_token_count: _Optional[int] = ..., cache_token_limit: _Optional[int] = ..., decode_tokens_per_second: _Optional[float] = ..., prefill_tokens_per_second: _Optional[float] = ..., is_draining: bool = ...) -> None: ...

class GetAuditRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class GetAuditResponse(_message.Message):
    __slots__ = ("request_id", "policy", "compute_budget", "token_count", "agreement", "logprob_gap", "divergence", "calibrated_divergence")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_BUDGET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_GAP_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    CALIBRATED_DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    policy: str
    compute_budget: float
    token_count: int
    agreement: float
    logprob_gap: float
    divergence: float
    calibrated_divergence: float
    def __init__(self, request_id: _Optional[str] = ..., policy: _Optional[str] = ..., compute_budget: _Optional[float] = ..., token_count: _Optional[int] = ..., agreement: _Optional[float] = ..., logprob_gap: _Optional[float] = ..., divergence: _Optional[float] = ..., calibrated_divergence: _Optional[float] = ...) -> None: ...

class GetDecisionsRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class GetDecisionsResponse(_message.Message):
    __slots__ = ("request_id", "model", "policy", "mode", "compute_budget", "price_of_compute", "layer_count", "pinned_layers", "score_actions", "steps", "unrecorded_step_count")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_BUDGET_FIELD_NUMBER: _ClassVar[int]
    PRICE_OF_COMPUTE_FIELD_NUMBER: _ClassVar[int]
    LAYER_COUNT_FIELD_NUMBER: _ClassVar[int]
    PINNED_LAYERS_FIELD_NUMBER: _ClassVar[int]
    SCORE_ACTIONS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    UNRECORDED_STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    policy: str
    mode: _common_pb2.Mode
    compute_budget: float
    price_of_compute: float
    layer_count: int
    pinned_layers: _containers.RepeatedScalarFieldContainer[int]
    score_actions: _containers.RepeatedScalarFieldContainer[_common_pb2.Action]
    steps: _containers.RepeatedCompositeFieldContainer[RecordedStep]
    unrecorded_step_count: int
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., policy: _Optional[str] = ..., mode: _Optional[_Union[_common_pb2.Mode, str]] = ..., compute_budget: _Optional[float] = ..., price_of_compute: _Optional[float] = ..., layer_count: _Optional[int] = ..., pinned_layers: _Optional[_Iterable[int]] = ..., score_actions: _Optional[_Iterable[_Union[_common_pb2.Action, str]]] = ..., steps: _Optional[_Iterable[_Union[RecordedStep, _Mapping]]] = ..., unrecorded_step_count: _Optional[int] = ...) -> None: ...

class RecordedStep(_message.Message):
    __slots__ = ("kind", "token_ids", "start_unix_nanos", "duration_nanos", "actions", "layer_start_nanos", "layer_end_nanos", "decision_start_nanos", "decision_end_nanos", "exposed_nanos", "scores", "cost_spent", "accepted_token_count", "text_token_count")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    START_UNIX_NANOS_FIELD_NUMBER: _ClassVar[int]
    DURATION_NANOS_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    LAYER_START_NANOS_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_NANOS_FIELD_NUMBER: _ClassVar[int]
    DECISION_START_NANOS_FIELD_NUMBER: _ClassVar[int]
    DECISION_END_NANOS_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_NANOS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    COST_SPENT_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    TEXT_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    kind: StepKind
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    start_unix_nanos: int
    duration_nanos: int
    actions: bytes
    layer_start_nanos: _containers.RepeatedScalarFieldContainer[int]
    layer_end_nanos: _containers.RepeatedScalarFieldContainer[int]
    decision_start_nanos: _containers.RepeatedScalarFieldContainer[int]
    decision_end_nanos: _containers.RepeatedScalarFieldContainer[int]
    exposed_nanos: _containers.RepeatedScalarFieldContainer[int]
    scores: _containers.RepeatedScalarFieldContainer[float]
    cost_spent: _containers.RepeatedScalarFieldContainer[float]
    accepted_token_count: int
    text_token_count: int
    def __init__(self, kind: _Optional[_Union[StepKind, str]] = ..., token_ids: _Optional[_Iterable[int]] = ..., start_unix_nanos: _Optional[int] = ..., duration_nanos: _Optional[int] = ..., actions: _Optional[bytes] = ..., layer_start_nanos: _Optional[_Iterable[int]] = ..., layer_end_nanos: _Optional[_Iterable[int]] = ..., decision_start_nanos: _Optional[_Iterable[int]] = ..., decision_end_nanos: _Optional[_Iterable[int]] = ..., exposed_nanos: _Optional[_Iterable[int]] = ..., scores: _Optional[_Iterable[float]] = ..., cost_spent: _Optional[_Iterable[float]] = ..., accepted_token_count: _Optional[int] = ..., text_token_count: _Optional[int] = ...) -> None: ...
