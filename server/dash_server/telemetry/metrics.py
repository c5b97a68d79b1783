"""The server's metrics: instruments that are filled from calls that are over or read the server's own counts.

Knows no exporters; `metric_export` does. Attributes come from small fixed sets, so that no caller can create series.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import grpc
from opentelemetry.metrics import CallbackOptions, Meter, Observation

from dash_runtime.actions import Action
from dash_runtime.config import Mode
from dash_runtime.events import SpeculationStatistics
from dash_server.admission import Admission
from dash_server.audit import Audit
from dash_server.dispatcher import Dispatcher
from dash_server.request_record import PROVIDER_NAME, RequestRecord
from dash_server.worker.link import WorkerLink

# Boundaries of the GenAI conventions.
_DURATION_BOUNDARIES = [0.01 * 2**exponent for exponent in range(14)]
_FIRST_TOKEN_BOUNDARIES = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]
_OUTPUT_TOKEN_BOUNDARIES = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5]
_COST_BOUNDARIES = [0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1, 1.25]
_ACCEPTED_LENGTH_BOUNDARIES = [0, 1, 2, 3, 4, 5, 6, 7, 11, 14]
_DIVERGENCE_BOUNDARIES = [0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
_EXPOSED_BOUNDARIES = [0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01]
_DRAFT_SOURCES, _GUESS_SOURCES = ("text", "model"), ("guess",)
"""Sources of drafted tokens, in EXACT and in other modes."""

Attributes = dict[str, str | int]


def _zero() -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Sources:
    """Owners of the server's own counts. Other threads than the event loop's read them, so only plain numbers."""

    admission: Admission
    dispatcher: Dispatcher
    links: Sequence[WorkerLink]
    model_name: Callable[[], str | None]
    """Returns None until the first worker is ready."""
    dropped_spans: Callable[[], int] = field(default=_zero)
    exported_spans: Callable[[], int] = field(default=_zero)


class Metrics:
    """All instruments of one server. `observe` is a `request_record.Observer`."""

    def __init__(self, meter: Meter, sources: Sources) -> None:
        self._model_name = sources.model_name
        self._actions: list[list[int]] = []
        """Counts by layer and action: 120 sums after each request instead of 120 counter calls."""
        self._action_attributes: list[list[Attributes]] = []
        self._duration = meter.create_histogram(
            "gen_ai.server.request.duration",
            "s",
            "Time from the request to the end of its response",
            explicit_bucket_boundaries_advisory=_DURATION_BOUNDARIES,
        )
        self._first_token = meter.create_histogram(
            "gen_ai.server.time_to_first_token",
            "s",
            "Time from the request to its first output token, the wait for a slot included",
            explicit_bucket_boundaries_advisory=_FIRST_TOKEN_BOUNDARIES,
        )
        self._output_token = meter.create_histogram(
            "gen_ai.server.time_per_output_token",
            "s",
            "Time of each output token after the first, by the worker's clock",
            explicit_bucket_boundaries_advisory=_OUTPUT_TOKEN_BOUNDARIES,
        )
        self._cost = meter.create_histogram(
            "dash.cost_share",
            "1",
            "Mean cost of a request's decode tokens, as a share of full depth's",
            explicit_bucket_boundaries_advisory=_COST_BOUNDARIES,
        )
        self._exposed = meter.create_histogram(
            "dash.exposed_policy_time",
            "s",
            "The decoder's wait for the policy, mean of a request's decode tokens",
            explicit_bucket_boundaries_advisory=_EXPOSED_BOUNDARIES,
        )
        self._tokens = meter.create_counter(
            "dash.tokens",
            "{token}",
            "Tokens of requests that had a slot; cached_input is the part of input found in the prefix cache",
        )
        self._drafts = meter.create_counter(
            "dash.drafts",
            "{token}",
            "Tokens drafted and accepted in mode EXACT; source guess: guessed and right in other modes",
        )
        self._accepted_length = meter.create_histogram(
            "dash.draft.accepted_length",
            "{token}",
            "Accepted tokens of each draft in mode EXACT",
            explicit_bucket_boundaries_advisory=_ACCEPTED_LENGTH_BOUNDARIES,
        )
        for named in (_DRAFT_SOURCES, _GUESS_SOURCES):
            self._add_drafts(SpeculationStatistics(0, 0, 0, [], 0, 0), *named)  # so that the series start at zero
        meter.create_observable_counter(
            "dash.actions", [self._observe_actions], "{layer}", "Layers run for decode tokens, by layer and action"
        )
        self._audited_tokens = meter.create_counter(
            "dash.audit.tokens",
            "{token}",
            "Tokens of audited answers, by whether full depth agrees with them",
        )
        self._audit_divergence = meter.create_histogram(
            "dash.audit.divergence",
            "1",
            "Divergence of audited answers from full depth, in nats per token",
            explicit_bucket_boundaries_advisory=_DIVERGENCE_BOUNDARIES,
        )
        # A histogram takes no negative numbers.
        self._audit_gap = meter.create_up_down_counter(
            "dash.audit.logprob_gap", "{nat}", "Log probability of audited answers' tokens less full depth's, summed"
        )
        _read_counts(meter, sources)

    def observe_audit(self, audit: Audit) -> None:
        """Adds a comparison of an answer with full depth."""
        budget = "" if audit.compute_budget is None else f"{audit.compute_budget:.1f}"
        attributes: Attributes = {"dash.policy": audit.policy, "dash.compute_budget": budget}
        num_agreeing = round(audit.agreement * audit.num_tokens)
        self._audited_tokens.add(num_agreeing, {**attributes, "dash.audit.agrees": "true"})
        self._audited_tokens.add(audit.num_tokens - num_agreeing, {**attributes, "dash.audit.agrees": "false"})
        self._audit_divergence.record(audit.divergence, attributes)
        self._audit_gap.add(audit.logprob_gap * audit.num_tokens, attributes)

    def observe(self, record: RequestRecord) -> None:
        """Adds a call that is over."""
        attributes = self._attributes(record)
        is_failed = record.code is not grpc.StatusCode.OK
        failure: Attributes = {"error.type": record.code.name} if is_failed else {}
        self._duration.record(record.seconds, attributes | failure)
        if record.granted is None or record.prepared is None:
            return
        mode: Attributes = {"dash.mode": record.prepared.request.skip.mode.value}
        self._tokens.add(len(record.prepared.request.prompt_token_ids), {**mode, "dash.token.type": "input"})
        self._tokens.add(record.num_output_tokens, {**mode, "dash.token.type": "output"})
        finished = record.finished
        if finished is None:
            return
        self._tokens.add(finished.num_cached_prompt_tokens, {**mode, "dash.token.type": "cached_input"})
        if not is_failed and record.first_token_unix_ns is not None:
            self._first_token.record((record.first_token_unix_ns - record.started_unix_ns) / 1e9, attributes)
        if not is_failed and finished.num_output_tokens > 1:
            # The worker's own time: a busy event loop may take many tokens at once.
            self._output_token.record(finished.decode_seconds / (finished.num_output_tokens - 1), attributes)
        if finished.depth.num_decode_tokens:
            self._cost.record(finished.depth.mean_cost, mode)
            self._exposed.record(finished.depth.mean_exposed_seconds, mode)
        self._add_actions(finished.depth.layer_action_counts)
        if finished.speculation is not None:
            is_exact = record.prepared.request.skip.mode is Mode.EXACT
            self._add_drafts(finished.speculation, *(_DRAFT_SOURCES if is_exact else _GUESS_SOURCES))
            if is_exact:
                for length, count in enumerate(finished.speculation.accepted_lengths):
                    for _ in range(count):
                        self._accepted_length.record(length)

    def _attributes(self, record: RequestRecord) -> Attributes:
        attributes: Attributes = {
            "gen_ai.operation.name": record.operation,
            "gen_ai.provider.name": PROVIDER_NAME,
        }
        if (name := self._model_name()) is not None:
            attributes["gen_ai.request.model"] = name
        if record.prepared is not None:
            attributes["dash.mode"] = record.prepared.request.skip.mode.value
        return attributes

    def _add_drafts(self, drafts: SpeculationStatistics, *sources: str) -> None:
        """Adds what came from the text, and if there is a second source what came from it."""
        drafted, accepted = drafts.num_drafted_from_text, drafts.num_accepted_from_text
        by_source = (drafted, accepted), (drafts.num_drafted - drafted, drafts.num_accepted - accepted)
        for source, counts in zip(sources, by_source, strict=False):
            for state, count in zip(("drafted", "accepted"), counts, strict=True):
                self._drafts.add(count, {"dash.draft.source": source, "dash.draft.state": state})

    def _add_actions(self, counts_by_layer: list[list[int]]) -> None:
        if len(self._actions) < len(counts_by_layer):
            self._grow(len(counts_by_layer))
        for sums, counts in zip(self._actions, counts_by_layer, strict=False):
            for action, count in enumerate(counts):
                sums[action] += count

    def _grow(self, num_layers: int) -> None:
        """Adds layers, attributes first: a reader in another thread takes as many layers as both lists have."""
        for layer in range(len(self._actions), num_layers):
            self._action_attributes.append(
                [{"dash.layer": layer, "dash.action": action.name.lower()} for action in Action]
            )
            self._actions.append([0] * len(Action))

    def _observe_actions(self, _: CallbackOptions) -> Iterable[Observation]:
        for sums, attributes in zip(self._actions, self._action_attributes, strict=False):
            for count, attribute in zip(sums, attributes, strict=True):
                if count:
                    yield Observation(count, attribute)


def _read_counts(meter: Meter, sources: Sources) -> None:
    """Creates the instruments that are read at each export and cost nothing until then."""
    links, load = sources.links, sources.dispatcher.load

    def reading(number: Callable[[], float]) -> list[Callable[[CallbackOptions], Iterable[Observation]]]:
        return [lambda _: [Observation(number())]]

    def total(of_link: Callable[[WorkerLink], int]) -> Callable[[], int]:
        return lambda: sum(map(of_link, links))

    gauges: list[tuple[str, str, str, Callable[[], float]]] = [
        ("dash.requests.inside", "{request}", "Requests waiting or running", lambda: sources.admission.num_inside),
        ("dash.queue.requests", "{request}", "Requests waiting for a slot", lambda: load().num_waiting),
        ("dash.slots", "{slot}", "Slots of the workers that are ready", lambda: load().num_slots),
        ("dash.slots.used", "{slot}", "Requests at the workers", lambda: load().num_running),
        (
            "dash.cache.tokens",
            "{token}",
            "KV cache tokens reserved by requests at the workers",
            lambda: load().num_reserved_tokens,
        ),
        ("dash.cache.limit", "{token}", "Size of the KV caches", lambda: load().num_cache_tokens),
        (
            "dash.cost_table.error",
            "1",
            "Most that a plan's tokens take beyond, or below, what they are said to cost, in full-depth tokens",
            lambda: max((link.cost_status.error for link in links), default=0.0),
        ),
        (
            "dash.decode.speed",
            "{token}/s",
            "Speed of one stream after its first token, the median of the latest requests",
            lambda: load().decode_tokens_per_second or 0.0,
        ),
        (
            "dash.prefill.speed",
            "{token}/s",
            "Prompt tokens a second, the median of the latest requests",
            lambda: load().prefill_tokens_per_second or 0.0,
        ),
        ("dash.workers.ready", "{worker}", "Workers that take requests", lambda: load().num_workers),
    ]
    for name, unit, description, number in gauges:
        meter.create_observable_gauge(name, reading(number), unit, description)
    counters: list[tuple[str, str, str, Callable[[], int]]] = [
        ("dash.worker.restarts", "{restart}", "Workers started to replace one", total(lambda link: link.num_restarts)),
        (
            "dash.cost_table.replacements",
            "{replacement}",
            "Cost tables replaced because served tokens took something else",
            total(lambda link: link.num_cost_table_replacements),
        ),
        ("dash.spans.exported", "{span}", "Spans that a collector accepted", sources.exported_spans),
        ("dash.spans.dropped", "{span}", "Spans lost on the way to a collector", sources.dropped_spans),
    ]
    for name, unit, description, number in counters:
        meter.create_observable_counter(name, reading(number), unit, description)
