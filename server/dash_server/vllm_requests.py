"""Turns the messages of `vllm.grpc.engine` into our own, and our output into theirs. Knows no connection.

Imported only with the extra `smg`.

The protocol has no field for a mode or a budget, and the gateway passes on no header but the one with the request's id.
So they come in front of the id: `dash:mode=exact:…`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from llguidance.gbnf_to_lark import any_to_lark
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm_pb2

from dash_api.v1 import generation_pb2
from dash_runtime.errors import InvalidRequest

_OPTIONS_IN_ID = re.compile(r"dash:([^:]*):")
_OPTION_KINDS: dict[str, Callable[[str], Any]] = {
    "mode": lambda text: f"MODE_{text.upper()}",
    "compute_budget": float,
    "policy_name": str,
    "fixed_action": lambda text: f"ACTION_{text.upper()}",
    "draft_length": int,
}
_SAME_SAMPLING = ("min_p", "frequency_penalty", "presence_penalty")
_FINISH_REASONS = {generation_pb2.FINISH_REASON_LENGTH: "length"}
"""The others are "stop"."""
_MOST = 2**31 - 1
"""Theirs are numbers without a sign, ours have one."""


def parameters_of(request: vllm_pb2.GenerateRequest) -> generation_pb2.GenerationParameters:
    """Returns the parameters of the request, with vLLM's defaults.

    Raises:
        InvalidRequest: it asks for what this server does not do. Paths are those of the request.
    """
    params = request.sampling_params
    if request.HasField("mm_inputs") or request.HasField("media_refs") or request.extra_mm_inputs:
        raise InvalidRequest("mm_inputs", "the model takes text only")
    if params.min_tokens:
        raise InvalidRequest("sampling_params.min_tokens", "is not known here")
    if params.HasField("prompt_logprobs"):
        raise InvalidRequest("sampling_params.prompt_logprobs", "is not known here; ask Score of GenerationService")
    for name in ("n", "max_tokens"):
        if (number := getattr(params, name)) > _MOST:
            raise InvalidRequest(f"sampling_params.{name}", f"{number} is too large")
    parameters = generation_pb2.GenerationParameters(
        sampling=_sampling(params),
        n=params.n or None,
        stopping=generation_pb2.StoppingParameters(
            max_new_tokens=params.max_tokens if params.HasField("max_tokens") else None,
            stop_strings=params.stop,
            stop_token_ids=params.stop_token_ids,
            ignore_eos=params.ignore_eos,
        ),
        skip=_skip(request.request_id),
        output=generation_pb2.OutputOptions(logprobs=params.logprobs if params.HasField("logprobs") else None),
        constraint=_constraint(params),
    )
    if request.WhichOneof("input") == "text":
        parameters.text = request.text
    else:
        ids = request.tokenized.input_ids
        if params.HasField("truncate_prompt_tokens") and params.truncate_prompt_tokens > 0:
            ids = ids[-params.truncate_prompt_tokens :]
        parameters.token_ids.ids.extend(ids)
    return parameters


def chunk(
    delta: generation_pb2.GenerationDelta, started: generation_pb2.GenerationStarted, index: int
) -> vllm_pb2.GenerateResponse:
    """Returns the message of a piece of output; counts are of the piece."""
    return vllm_pb2.GenerateResponse(
        chunk=vllm_pb2.GenerateStreamChunk(
            token_ids=delta.token_ids,
            prompt_tokens=started.prompt_token_count,
            completion_tokens=len(delta.token_ids),
            output_logprobs=_logprobs(delta.token_ids, delta.logprobs),
            index=index,
        )
    )


def complete(
    output: generation_pb2.GenerationDelta, finished: generation_pb2.GenerationFinished, index: int
) -> vllm_pb2.GenerateResponse:
    """Returns the last message of an answer. `output` is what no chunk had."""
    usage = finished.usage
    speculation = usage.speculation
    return vllm_pb2.GenerateResponse(
        complete=vllm_pb2.GenerateComplete(
            output_ids=output.token_ids,
            finish_reason=_FINISH_REASONS.get(finished.reason, "stop"),
            prompt_tokens=usage.prompt_token_count,
            completion_tokens=len(output.token_ids),
            cached_tokens=usage.cached_prompt_token_count,
            output_logprobs=_logprobs(output.token_ids, output.logprobs),
            index=index,
            matched_stop_str=finished.stop_string if finished.HasField("stop_string") else None,
            spec_accepted_tokens=speculation.accepted_token_count,
            spec_draft_tokens=speculation.drafted_token_count,
        )
    )


def aborted(index: int) -> vllm_pb2.GenerateResponse:
    """Returns the last message of an answer that `Abort` ended."""
    return vllm_pb2.GenerateResponse(complete=vllm_pb2.GenerateComplete(finish_reason="abort", index=index))


def _skip(request_id: str) -> generation_pb2.SkipOptions:
    """Returns the options in front of a request's id, such as `dash:mode=adaptive,compute_budget=0.5:chatcmpl-1`."""
    options = generation_pb2.SkipOptions()
    found = _OPTIONS_IN_ID.match(request_id)
    for item in filter(None, found[1].split(",") if found else ()):
        name, _, value = item.partition("=")
        try:
            options.MergeFrom(generation_pb2.SkipOptions(**{name: _OPTION_KINDS[name](value)}))
        except KeyError:
            known = ", ".join(_OPTION_KINDS)
            raise InvalidRequest("request_id", f"has the option {name!r}, and those known are {known}") from None
        except ValueError:
            raise InvalidRequest("request_id", f"has {value!r} as {name}") from None
    return options


def _sampling(params: vllm_pb2.SamplingParams) -> generation_pb2.SamplingParameters:
    """Zero stands for "unset" where vLLM has no zero."""
    for token_id in params.logit_bias:
        if token_id < 0:
            raise InvalidRequest(f"sampling_params.logit_bias[{token_id}]", "is no token id")
    return generation_pb2.SamplingParameters(
        temperature=params.temperature if params.HasField("temperature") else 1.0,
        top_k=min(params.top_k, _MOST),
        top_p=params.top_p or 1.0,
        repetition_penalty=params.repetition_penalty or 1.0,
        seed=params.seed % (1 << 64) if params.HasField("seed") else None,
        logit_bias=dict(params.logit_bias),
        **{name: getattr(params, name) for name in _SAME_SAMPLING},
    )


def _constraint(params: vllm_pb2.SamplingParams) -> generation_pb2.Constraint | None:
    constraint = generation_pb2.Constraint
    match params.WhichOneof("constraint"):
        case None:
            return None
        case "json_schema":
            return constraint(json_schema=params.json_schema)
        case "json_object":
            return constraint(json_schema='{"type": "object"}') if params.json_object else None
        case "regex":
            return constraint(regex=params.regex)
        case "choice":
            return constraint(choices=generation_pb2.Choices(texts=params.choice.choices))
        case "grammar":
            return constraint(lark_grammar=_lark(params.grammar))
        case other:
            raise InvalidRequest(f"sampling_params.{other}", "is not known here")


def _lark(grammar: str) -> str:
    """Returns a grammar of llama.cpp's dialect in Lark's; leaves one of Lark's as it is."""
    try:
        return str(any_to_lark(grammar))
    except Exception as error:  # the parser has no errors of its own
        raise InvalidRequest("sampling_params.grammar", f"cannot be read: {error}") from None


def _logprobs(
    token_ids: Sequence[int], logprobs: Sequence[generation_pb2.TokenLogprobs]
) -> vllm_pb2.OutputLogProbs | None:
    if not logprobs:
        return None
    return vllm_pb2.OutputLogProbs(
        token_logprobs=[entry.chosen for entry in logprobs],
        token_ids=token_ids,
        top_logprobs=[
            vllm_pb2.TopLogProbs(
                values=[top.logprob for top in entry.top], token_ids=[top.token_id for top in entry.top]
            )
            for entry in logprobs
        ],
    )
