"""Converts the runtime's dataclasses to protobuf responses; `from_pb` is the way in.

Checks nothing: all values come from the server itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dash_api.v1 import common_pb2, generation_pb2, model_pb2
from dash_runtime.actions import Action
from dash_runtime.config import Mode, ModelFacts, PolicyFacts
from dash_runtime.decision_trace import StepKind, TraceStep, unpack_float32, unpack_uint32
from dash_runtime.events import (
    EndReason,
    SequenceFinished,
    SlotGranted,
    SpeculationStatistics,
    TokenLogprobs,
)
from dash_server.admission import Admission
from dash_server.audit import Audit
from dash_server.dispatcher import Load
from dash_server.from_pb import MODES, PreparedRequest
from dash_server.recent_decisions import KeptDecisions
from dash_server.settings import Settings
from dash_server.worker.outbox import MergedOutput

_MODE_NUMBERS = {mode: number for number, mode in MODES.items()}

_FINISH_REASONS = {
    EndReason.END_OF_SEQUENCE: generation_pb2.FINISH_REASON_END_OF_SEQUENCE,
    EndReason.STOP_TOKEN: generation_pb2.FINISH_REASON_STOP_TOKEN,
    EndReason.STOP_STRING: generation_pb2.FINISH_REASON_STOP_STRING,
    EndReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}

_WIRE_NUMBERS = bytes.maketrans(
    bytes(Action), bytes(common_pb2.Action.Value(f"ACTION_{action.name}") for action in Action)
)
"""The numbers of `dash_api.v1.Action`, which are not in order of work, for those of `Action`."""

_STEP_KINDS = {
    StepKind.DECODE: model_pb2.STEP_KIND_DECODE,
    StepKind.DRAFT: model_pb2.STEP_KIND_DRAFT,
    StepKind.VERIFICATION: model_pb2.STEP_KIND_VERIFICATION,
}


def started_to_pb(
    prepared: PreparedRequest, granted: SlotGranted, facts: ModelFacts
) -> generation_pb2.GenerationStarted:
    request = prepared.request
    return generation_pb2.GenerationStarted(
        request_id=request.request_id,
        prompt_token_count=len(request.prompt_token_ids),
        seed=request.sampling.seed,
        model=facts.name,
        mode=_MODE_NUMBERS[request.skip.mode],
        policy=granted.policy,
        policy_note=granted.policy_note,
        compute_budget=granted.compute_budget,
        layer_count=facts.num_layers,
        prefill_action=_action_to_pb(granted.prefill_action),
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """Output that leaves together: tokens, and the text and the calls of tools that they complete."""

    text: str
    output: MergedOutput
    tool_calls: Sequence[common_pb2.ToolCall] = ()

    def write(self, delta: generation_pb2.GenerationDelta) -> None:
        """Writes it into an empty message. To copy one message into another takes several times as long."""
        delta.text = self.text
        delta.token_ids.extend(self.output.token_ids)
        if self.output.actions:
            delta.actions = bytes(self.output.actions).translate(_WIRE_NUMBERS)
        if self.output.logprobs:
            delta.logprobs.extend(map(_logprobs_to_pb, self.output.logprobs))
        if self.tool_calls:
            delta.tool_calls.extend(self.tool_calls)


Event = Piece | generation_pb2.GenerationStarted | generation_pb2.GenerationFinished
"""A part of an answer's stream: its start, output, or its end."""


def write_event(event: Event, index: int, message: generation_pb2.StreamGenerateResponse) -> None:
    """Writes an event of answer `index` into an empty message."""
    if index:
        message.answer_index = index
    if isinstance(event, Piece):
        event.write(message.delta)
    elif isinstance(event, generation_pb2.GenerationStarted):
        message.started.CopyFrom(event)
    else:
        message.finished.CopyFrom(event)


def _logprobs_to_pb(logprobs: TokenLogprobs) -> generation_pb2.TokenLogprobs:
    top = [generation_pb2.TokenLogprob(token_id=id_, logprob=logprob) for id_, logprob in logprobs.top]
    return generation_pb2.TokenLogprobs(chosen=logprobs.chosen, top=top)


def finished_to_pb(
    finished: SequenceFinished,
    queue_seconds: float,
    prompt_token_count: int,
    output_token_count: int,
    stop_string: str | None,
) -> generation_pb2.GenerationFinished:
    reason = EndReason.STOP_STRING if stop_string is not None else finished.reason
    depth = finished.depth
    return generation_pb2.GenerationFinished(
        reason=_FINISH_REASONS[reason],
        stop_string=stop_string,
        usage=generation_pb2.Usage(
            prompt_token_count=prompt_token_count,
            output_token_count=output_token_count,
            queue_seconds=queue_seconds,
            prefill_seconds=finished.prefill_seconds,
            decode_seconds=finished.decode_seconds,
            speculation=_speculation_to_pb(finished.speculation),
            cached_prompt_token_count=finished.num_cached_prompt_tokens,
        ),
        depth=generation_pb2.DepthStatistics(
            decode_token_count=depth.num_decode_tokens,
            action_counts=_counts_to_pb(depth.action_counts),
            mean_cost=depth.mean_cost,
            exposed_policy_seconds=depth.mean_exposed_seconds,
            speculative_action_counts=_counts_to_pb(depth.speculative_action_counts),
        ),
    )


def score_to_pb(response: generation_pb2.GenerateResponse, num_top_logprobs: int) -> generation_pb2.ScoreResponse:
    """Returns the response of Score, from a generation whose output was given and that has log probabilities."""
    output = response.output
    score = generation_pb2.ScoreResponse(
        started=response.started,
        output=output,
        finished=response.finished,
        log_probability=math.fsum(entry.chosen for entry in output.logprobs),
        is_greedy=all(
            entry.top[0].token_id == token_id for entry, token_id in zip(output.logprobs, output.token_ids, strict=True)
        ),
    )
    for entry in score.output.logprobs:
        del entry.top[num_top_logprobs:]
    return score


def _speculation_to_pb(speculation: SpeculationStatistics | None) -> generation_pb2.SpeculationUsage | None:
    if speculation is None:
        return None
    return generation_pb2.SpeculationUsage(
        drafted_token_count=speculation.num_drafted,
        accepted_token_count=speculation.num_accepted,
        wasted_token_count=speculation.num_drafted - speculation.num_accepted,
        verification_count=speculation.num_verifications,
        draft_seconds=speculation.draft_ns / 1e9,
        verification_seconds=speculation.verification_ns / 1e9,
        text_drafted_token_count=speculation.num_drafted_from_text,
        text_accepted_token_count=speculation.num_accepted_from_text,
        accepted_length_counts=speculation.accepted_lengths,
    )


def _counts_to_pb(counts: Mapping[Action, int]) -> list[generation_pb2.ActionCount]:
    return [
        generation_pb2.ActionCount(action=_action_to_pb(action), count=count)
        for action, count in sorted(counts.items())
    ]


def _action_to_pb(action: Action) -> str:
    return f"ACTION_{action.name}"


def load_to_pb(load: Load, admission: Admission, settings: Settings) -> model_pb2.GetLoadResponse:
    return model_pb2.GetLoadResponse(
        running_request_count=load.num_running,
        waiting_request_count=load.num_waiting,
        slot_count=load.num_slots,
        worker_count=load.num_workers,
        token_count=admission.num_tokens_inside,
        token_limit=settings.max_queue_tokens,
        cache_token_count=load.num_reserved_tokens,
        cache_token_limit=load.num_cache_tokens,
        decode_tokens_per_second=load.decode_tokens_per_second,
        prefill_tokens_per_second=load.prefill_tokens_per_second,
        is_draining=admission.is_draining,
    )


def audit_to_pb(audit: Audit) -> model_pb2.GetAuditResponse:
    return model_pb2.GetAuditResponse(
        request_id=audit.request_id,
        policy=audit.policy,
        compute_budget=audit.compute_budget,
        token_count=audit.num_tokens,
        agreement=audit.agreement,
        logprob_gap=audit.logprob_gap,
        divergence=audit.divergence,
        calibrated_divergence=audit.expected_divergence,
    )


def model_to_pb(facts: ModelFacts, settings: Settings) -> model_pb2.GetModelResponse:
    return model_pb2.GetModelResponse(
        name=facts.name,
        architecture=facts.architecture,
        layer_count=facts.num_layers,
        vocabulary_size=facts.vocab_size,
        context_length=facts.context_length,
        max_new_tokens_limit=settings.max_new_tokens,
        default_max_new_tokens=settings.default_max_new_tokens,
        cache_tokens=facts.cache_tokens,
        slot_count=facts.num_slots,
        actions=map(_action_to_pb, sorted(facts.actions)),
        modes=[_MODE_NUMBERS[mode] for mode in Mode if mode is not Mode.FULL_DEPTH or Action.FULL in facts.actions],
        default_mode=_MODE_NUMBERS[Mode(settings.default_mode)],
        policy_names=[policy.name for policy in facts.policies],
        default_policy_name=facts.policy(None).name,
        device=facts.device,
        default_draft_policy_name=facts.policy(None, Mode.EXACT).name,
        is_compiled=facts.has_native_code,
        weight_error=facts.weight_error,
    )


def policy_to_pb(policy: PolicyFacts) -> model_pb2.GetPolicyResponse:
    return model_pb2.GetPolicyResponse(
        name=policy.name,
        note=policy.note,
        learned=policy.learned,
        lookahead=policy.lookahead,
        pinned_layers=policy.pinned_layers,
        action_costs=[
            model_pb2.ActionCost(action=_action_to_pb(action), cost=cost)
            for action, cost in sorted(policy.action_costs.items())
        ],
        lowest_budget=policy.lowest_budget,
        recommended_budget=policy.recommended_budget,
        is_drafter=policy.is_drafter,
        compensation=policy.compensation,
    )


def decisions_to_pb(kept: KeptDecisions) -> model_pb2.GetDecisionsResponse:
    trace = kept.decision_trace
    return model_pb2.GetDecisionsResponse(
        request_id=trace.request_id,
        model=kept.model,
        policy=trace.policy,
        mode=_MODE_NUMBERS[kept.mode],
        compute_budget=trace.compute_budget,
        price_of_compute=trace.price,
        layer_count=trace.num_layers,
        pinned_layers=trace.pinned_layers,
        score_actions=map(_action_to_pb, trace.score_actions),
        steps=map(_step_to_pb, trace.steps),
        unrecorded_step_count=trace.num_unrecorded_steps,
    )


def _step_to_pb(step: TraceStep) -> model_pb2.RecordedStep:
    return model_pb2.RecordedStep(
        kind=_STEP_KINDS[step.kind],
        token_ids=step.token_ids,
        start_unix_nanos=step.start_unix_ns,
        duration_nanos=step.duration_ns,
        actions=step.actions.translate(_WIRE_NUMBERS),
        layer_start_nanos=unpack_uint32(step.layer_starts),
        layer_end_nanos=unpack_uint32(step.layer_ends),
        decision_start_nanos=unpack_uint32(step.decision_starts),
        decision_end_nanos=unpack_uint32(step.decision_ends),
        exposed_nanos=unpack_uint32(step.exposed),
        scores=unpack_float32(step.scores),
        cost_spent=unpack_float32(step.cost_spent),
        accepted_token_count=step.accepted_token_count,
        text_token_count=step.text_token_count,
    )
