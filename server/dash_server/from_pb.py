"""Converts a request's protobuf message to the runtime's dataclasses; `to_pb` is the way back.

The dataclasses and ModelFacts check most values. This module checks only what they cannot: unknown enum values, and the
limits in the settings. Paths of wrong fields are relative to GenerationParameters, unless said otherwise.
"""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from dash_api.v1 import common_pb2, generation_pb2
from dash_runtime.actions import Action
from dash_runtime.config import (
    GenerationRequest,
    Mode,
    ModelFacts,
    SamplingParameters,
    SkipOptions,
    StoppingParameters,
)
from dash_runtime.constraint import Constraint, ConstraintKind
from dash_runtime.errors import InvalidRequest
from dash_server.auth import Caller
from dash_server.fair_queue import Priority
from dash_server.served_model import ServedModel
from dash_server.settings import Settings
from dash_server.statuses import InvalidFields, below, below_field
from dash_server.tools import CheckGrammar
from dash_server.worker.outbox import Delivery

MODES = {
    common_pb2.MODE_FULL_DEPTH: Mode.FULL_DEPTH,
    common_pb2.MODE_ADAPTIVE: Mode.ADAPTIVE,
    common_pb2.MODE_EXACT: Mode.EXACT,
    common_pb2.MODE_FIXED: Mode.FIXED,
}
_ACTIONS = {common_pb2.Action.Value(f"ACTION_{action.name}"): action for action in Action}


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that has passed every check, with the parts that the worker does not get."""

    request: GenerationRequest
    stop_strings: tuple[str, ...]
    stop_token_ids: frozenset[int]
    """All tokens that end the output. They are not part of its text."""
    num_top_logprobs: int = 0
    """The number of most probable tokens that the caller of Score asked for."""
    priority: Priority = Priority.NORMAL
    num_answers: int = 1
    """The number of answers that the caller asked for, this one included."""
    calls_tools: bool = False
    """True if the output may hold calls of tools."""
    delivery: Delivery = Delivery.WHOLE

    @property
    def least_tokens(self) -> int:
        """The least number of output tokens, as far as the request tells."""
        stopping = self.request.stopping
        may_end_early = bool(self.stop_strings or self.stop_token_ids) or not stopping.ignore_eos
        return 1 if may_end_early else stopping.max_new_tokens

    def other_answer(self, index: int, request_id: str) -> "PreparedRequest":
        """Returns the request for answer number `index` to the same prompt, which is drawn with a seed of its own."""
        sampling = self.request.sampling
        own = replace(sampling, seed=(sampling.seed + index) % (1 << 64))
        return replace(self, request=replace(self.request, request_id=request_id, sampling=own))


class _Violations:
    """Collects wrong fields, so that a caller learns of all its mistakes at once."""

    def __init__(self) -> None:
        self._violations: list[InvalidRequest] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        try:
            yield
        except InvalidRequest as violation:
            self._violations.append(violation)
        except InvalidFields as error:
            self._violations += error.violations

    def raise_if_any(self) -> None:
        if self._violations:
            raise InvalidFields(self._violations)


def prepare_request(
    parameters: generation_pb2.GenerationParameters,
    *,
    request_id: str,
    model: ServedModel,
    settings: Settings,
    caller: Caller,
    is_streamed: bool,
    check_grammar: CheckGrammar,
) -> PreparedRequest:
    """Returns the worker's request, with every default filled in.

    Raises:
        InvalidRequest, InvalidFields: fields are wrong; names all that could be found at once.
    """
    violations = _Violations()
    sampling, skip = SamplingParameters(), SkipOptions()
    prompt_token_ids: list[int] = []
    constraint: Constraint | None = None
    tool_constraint: Constraint | None = None
    priority = Priority.NORMAL
    with violations.collected():
        sampling = _sampling(parameters.sampling)
    with violations.collected():
        priority = _priority(parameters, caller)
    with violations.collected():
        _check_number_of_answers(parameters, settings)
    with violations.collected():
        _check_stopping(parameters.stopping, settings)
    with violations.collected():
        skip = _skip(parameters.skip, settings)
    with violations.collected():
        constraint = _constraint(parameters, settings, check_grammar)
    with violations.collected():
        prompt_token_ids = model.tokenize(parameters)
        _check_prompt(prompt_token_ids, settings)
        tool_constraint = _tool_constraint(parameters, model, settings, check_grammar)
    violations.raise_if_any()

    facts = model.facts
    stopping = _stopping(parameters.stopping, len(prompt_token_ids), facts, settings)
    output, delivery = parameters.output, _delivery(parameters, is_streamed)
    request = GenerationRequest(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids,
        stopping=stopping,
        sampling=sampling,
        skip=skip,
        logprobs=_optional(output, "logprobs"),
        return_decisions=output.return_decisions,
        constraint=constraint or tool_constraint,
        is_immediate=delivery is Delivery.AT_ONCE,
        cache_namespace=caller.cache_namespace,
    )
    facts.validate(request)
    stop_strings = tuple(parameters.stopping.stop_strings)
    return PreparedRequest(
        request,
        stop_strings,
        stopping.end_token_ids(facts.eos_token_ids),
        priority=priority,
        num_answers=parameters.n if parameters.HasField("n") else 1,
        calls_tools=tool_constraint is not None,
        delivery=delivery,
    )


def _delivery(parameters: generation_pb2.GenerationParameters, is_streamed: bool) -> Delivery:
    if parameters.stopping.stop_strings or (is_streamed and parameters.output.immediate):
        return Delivery.AT_ONCE  # a stop string is found in the text, and nothing may delay the end
    return Delivery.SHARED if is_streamed else Delivery.WHOLE


def prepare_score(
    message: generation_pb2.ScoreRequest,
    *,
    request_id: str,
    model: ServedModel,
    settings: Settings,
    caller: Caller,
) -> PreparedRequest:
    """Returns the worker's request for the log probability of a given output.

    Paths of wrong fields are relative to the ScoreRequest.

    Raises:
        InvalidRequest, InvalidFields: fields are wrong; names all that could be found at once.
    """
    violations, parameters = _Violations(), message.parameters
    skip, prompt_token_ids, scored = SkipOptions(), [0], [0]
    priority = Priority.NORMAL
    for name in ("sampling", "stopping", "constraint", "n"):
        if parameters.HasField(name):
            with violations.collected():
                raise InvalidRequest(f"parameters.{name}", "does not apply: the output is given")
    with violations.collected(), below("parameters"):
        skip = _skip(parameters.skip, settings)
    with violations.collected(), below("parameters"):
        priority = _priority(parameters, caller)
    with violations.collected():
        prompt_token_ids, scored = model.split(message)
    with violations.collected(), below("parameters"):
        _check_prompt(prompt_token_ids, settings)
    with violations.collected():
        if len(scored) > settings.max_new_tokens:
            limit = settings.max_new_tokens
            raise InvalidRequest("continuation", f"must have at most {limit} tokens, got {len(scored)}")
    violations.raise_if_any()

    output = parameters.output
    try:
        request = GenerationRequest(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            stopping=StoppingParameters(len(scored), ignore_eos=True),
            skip=skip,
            # The most probable token tells whether the given one is it.
            logprobs=max(1, output.logprobs),
            return_decisions=output.return_decisions,
            scored_token_ids=scored,
            cache_namespace=caller.cache_namespace,
        )
        model.facts.validate(request)
    except InvalidRequest as error:
        if error.field == "stopping.max_new_tokens":
            raise InvalidRequest("continuation", error.description) from error
        raise error if error.field.startswith("continuation") else below_field("parameters", error) from error
    if skip.mode is Mode.EXACT:
        # Its text is full depth's.
        request = replace(request, skip=model.facts.deepest)
    return PreparedRequest(request, (), frozenset(), output.logprobs, priority)


def _check_prompt(token_ids: list[int], settings: Settings) -> None:
    if not token_ids:
        raise InvalidRequest("prompt", "must not be empty")
    if (limit := settings.max_prompt_tokens) is not None and len(token_ids) > limit:
        raise InvalidRequest("prompt", f"has {len(token_ids)} tokens, and {limit} are accepted")


def _optional(message: object, name: str) -> int | None:
    return getattr(message, name) if message.HasField(name) else None  # type: ignore[attr-defined]


def _priority(parameters: generation_pb2.GenerationParameters, caller: Caller) -> Priority:
    if parameters.priority == generation_pb2.PRIORITY_UNSPECIFIED:
        return min(Priority.NORMAL, caller.limits.highest)
    if parameters.priority not in list(Priority):
        raise InvalidRequest("priority", f"{parameters.priority} is not a Priority")
    priority = Priority(parameters.priority)
    if priority > caller.limits.highest:
        raise InvalidRequest("priority", f"this caller may ask for {caller.limits.highest.name} at most")
    return priority


def _check_number_of_answers(parameters: generation_pb2.GenerationParameters, settings: Settings) -> None:
    if parameters.HasField("n") and not 1 <= parameters.n <= settings.max_answers:
        raise InvalidRequest("n", f"must be 1 to {settings.max_answers}, got {parameters.n}")


def _sampling(sampling: generation_pb2.SamplingParameters) -> SamplingParameters:
    given = {field.name: value for field, value in sampling.ListFields() if field.name != "logit_bias"}
    given.setdefault("seed", secrets.randbits(64))
    return SamplingParameters(logit_bias=dict(sampling.logit_bias), **given)


def _check_stopping(stopping: generation_pb2.StoppingParameters, settings: Settings) -> None:
    violations = _Violations()
    with violations.collected():
        if stopping.max_new_tokens > settings.max_new_tokens:
            raise InvalidRequest(
                "stopping.max_new_tokens",
                f"must be at most {settings.max_new_tokens}, got {stopping.max_new_tokens}",
            )
        if stopping.HasField("max_new_tokens"):
            StoppingParameters(stopping.max_new_tokens)
    with violations.collected():
        if len(stopping.stop_strings) > settings.max_stop_strings:
            raise InvalidRequest(
                "stopping.stop_strings",
                f"must be at most {settings.max_stop_strings} strings, got {len(stopping.stop_strings)}",
            )
        for position, stop_string in enumerate(stopping.stop_strings):
            num_bytes = len(stop_string.encode())
            if not 0 < num_bytes <= settings.max_stop_string_bytes:
                raise InvalidRequest(
                    f"stopping.stop_strings[{position}]",
                    f"must have 1 to {settings.max_stop_string_bytes} bytes, got {num_bytes}",
                )
    violations.raise_if_any()


def _stopping(
    stopping: generation_pb2.StoppingParameters, prompt_length: int, facts: ModelFacts, settings: Settings
) -> StoppingParameters:
    room = min(facts.context_length, facts.cache_tokens) - prompt_length
    # At least 1: a prompt that leaves no room is refused later, as too long a prompt.
    default = max(1, min(settings.default_max_new_tokens, settings.max_new_tokens, room))
    return StoppingParameters(
        max_new_tokens=stopping.max_new_tokens if stopping.HasField("max_new_tokens") else default,
        stop_token_ids=frozenset(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
    )


def _constraint(
    parameters: generation_pb2.GenerationParameters, settings: Settings, check_grammar: CheckGrammar
) -> Constraint | None:
    if not parameters.HasField("constraint"):
        return None
    name = parameters.constraint.WhichOneof("kind")
    if name is None:
        raise InvalidRequest("constraint", "must be one of " + ", ".join(ConstraintKind))
    value = getattr(parameters.constraint, name)
    text = json.dumps(list(value.texts)) if name == "choices" else value
    num_bytes = len(text.encode())
    if num_bytes > settings.max_constraint_bytes:
        raise InvalidRequest(
            f"constraint.{name}", f"must have at most {settings.max_constraint_bytes} bytes, got {num_bytes}"
        )
    constraint = Constraint(ConstraintKind(name), text)
    check_grammar(constraint)
    return constraint


def _tool_constraint(
    parameters: generation_pb2.GenerationParameters,
    model: ServedModel,
    settings: Settings,
    check_grammar: CheckGrammar,
) -> Constraint | None:
    """Returns the constraint that keeps calls of tools to their schemas; None: there are no tools."""
    if (tools := model.tools(parameters.chat)) is None:
        return None
    if parameters.HasField("constraint"):
        raise InvalidRequest("constraint", "cannot stand beside tools, which constrain the output themselves")
    num_bytes = sum(len(tool.parameters_json_schema.encode()) for tool in parameters.chat.tools)
    if num_bytes > settings.max_constraint_bytes:
        limit = settings.max_constraint_bytes
        raise InvalidRequest("chat.tools", f"must have schemas of at most {limit} bytes together, got {num_bytes}")
    return tools.constraint(model.tokenizer, check_grammar)


def _skip(skip: generation_pb2.SkipOptions, settings: Settings) -> SkipOptions:
    mode = Mode(settings.default_mode)
    if skip.mode != common_pb2.MODE_UNSPECIFIED:
        if skip.mode not in MODES:
            raise InvalidRequest("skip.mode", f"{skip.mode} is not a Mode")
        mode = MODES[skip.mode]
    fixed_action = None
    if skip.HasField("fixed_action") and (fixed_action := _ACTIONS.get(skip.fixed_action)) is None:
        raise InvalidRequest("skip.fixed_action", f"{skip.fixed_action} is not an Action that can run")
    policy_name = skip.policy_name if skip.HasField("policy_name") else None
    # The worker knows the default budget: it follows the present costs.
    compute_budget = skip.compute_budget if skip.HasField("compute_budget") else None
    return SkipOptions(mode, compute_budget, policy_name, fixed_action, _optional(skip, "draft_length"))
