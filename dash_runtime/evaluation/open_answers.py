"""Generates answers greedily with an engine, and checks them against references.

Knows an engine's requests and events, and numbers in texts; knows no questions.
"""

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from dash_runtime.config import GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.engine.engine import Engine
from dash_runtime.errors import InvalidRequest
from dash_runtime.events import EndReason, EngineEvent, SequenceFinished, TokenProduced

Decode = Callable[[Sequence[int]], str]
"""Decodes token ids to text, without special tokens."""

# A minus belongs to a number unless something to subtract from is before it. A comma belongs to it before three digits,
# a full stop before any digit.
_NUMBER = re.compile(
    r"(?:(?<![\w)])(?P<minus>[-−])[$€£]?)?"
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]*\.[0-9]+|[0-9]+)"
)


@dataclass(frozen=True, slots=True)
class Generated:
    """The output for one prompt. Cost and seconds are summed over its decode tokens; `exposed_seconds` is the part of
    them that the decoder lost to the policy."""

    text: str
    token_ids: tuple[int, ...]
    num_decode_tokens: int
    total_cost: float
    decode_seconds: float
    exposed_seconds: float


def skip_options(budget: float | None, policy_name: str | None = None) -> SkipOptions:
    """Returns full depth if `budget` is None, else ADAPTIVE with the policy of that name, or with the default one.

    Raises:
        InvalidRequest: the budget is not in (0, 1].
    """
    if budget is None:
        return SkipOptions(Mode.FULL_DEPTH)
    return SkipOptions(Mode.ADAPTIVE, compute_budget=budget, policy_name=policy_name)


def generate(
    engine: Engine,
    decode: Decode,
    prompts: Sequence[Sequence[int]],
    skip: SkipOptions,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    *,
    ignores_end_of_sequence: bool = False,
) -> list[Generated]:
    """Returns greedy continuations of the prompts. The engine must have no other work.

    Each ends at its end of sequence, before the first of the `stop` strings, or after `max_new_tokens`.

    Raises:
        InvalidRequest: a prompt or an option does not fit the engine; nothing was generated.
    """
    stopping = StoppingParameters(max_new_tokens, ignore_eos=ignores_end_of_sequence)
    requests = [_request(engine, place, ids, stopping, skip) for place, ids in enumerate(prompts)]
    places = {request.request_id: place for place, request in enumerate(requests)}
    outputs: list[list[int]] = [[] for _ in requests]
    results: dict[int, Generated] = {}
    try:
        for request in requests:
            engine.submit(request)
        while engine.has_work:
            events: deque[EngineEvent] = deque(engine.step())
            while events:
                event = events.popleft()
                output = outputs[places[event.request_id]]
                if isinstance(event, TokenProduced):
                    output.append(event.token_id)
                    text = decode(output) if stop else ""
                    if any(string in text for string in stop):
                        events.extend(engine.stop(event.request_id))
                elif isinstance(event, SequenceFinished):
                    # The token that ends the sequence is not text.
                    ended = event.reason in (EndReason.END_OF_SEQUENCE, EndReason.STOP_TOKEN)
                    text = _cut(decode(output[:-1] if ended else output), stop)
                    depth = event.depth
                    results[places[event.request_id]] = Generated(
                        text,
                        tuple(output),
                        depth.num_decode_tokens,
                        depth.total_cost,
                        event.decode_seconds,
                        depth.exposed_ns / 1e9,
                    )
    finally:
        for request in requests:
            engine.cancel(request.request_id)
    return [results[place] for place in range(len(requests))]


def answer_in(text: str, reference: str) -> Decimal | str | None:
    """Returns the answer that a text gives to a question with this reference; equal answers are equal values.

    It is the last number if the reference has one (GSM8K's `#### 1,072` is 1072), None if the text then has none.
    Otherwise it is the text, without case, repeated white space and a full stop at the end.
    """
    return _normalised(text) if last_number(reference) is None else last_number(text)


def last_number(text: str) -> Decimal | None:
    """Returns the last number written in digits, with its minus, or None. `1,072.50.` is 1072.5."""
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    value = Decimal(matches[-1]["digits"].replace(",", ""))
    return -value if matches[-1]["minus"] else value


def _request(
    engine: Engine, place: int, prompt: Sequence[int], stopping: StoppingParameters, skip: SkipOptions
) -> GenerationRequest:
    try:
        request = GenerationRequest(f"evaluation-{place}", list(prompt), stopping, skip=skip)
        engine.facts.validate(request)
    except InvalidRequest as error:
        raise InvalidRequest(error.field, f"{error.description} (prompt {place + 1})") from None
    return request


def _cut(text: str, stop: Sequence[str]) -> str:
    return text[: min((place for string in stop if (place := text.find(string)) >= 0), default=len(text))]


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(" .")
