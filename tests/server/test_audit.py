"""A share of ADAPTIVE answers is compared with full depth when nothing else is to do, over a real socket."""

import asyncio
import logging
import math
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_api.v1 import generation_pb2, model_pb2
from dash_runtime.events import TokenLogprobs
from dash_server.audit import Audit, Auditor, divergence
from dash_server.dispatcher import Dispatcher
from dash_server.pace import Pace
from tests.server.refusals import refusal
from tests.server.scraping import scrape
from tests.server.server_harness import RunningServer, bearer, fake_model, running_server

ADAPTIVE = generation_pb2.SkipOptions(mode="MODE_ADAPTIVE", compute_budget=0.9)
EVERY = {"audit_rate": 1.0, "context_length": 2000, "max_new_tokens": 1000}


async def audit_of(
    server: RunningServer, request_id: str, token: str | None = None, seconds: float = 10
) -> model_pb2.GetAuditResponse:
    """Returns the audit of a request, once there is one."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            request = model_pb2.GetAuditRequest(request_id=request_id)
            response: model_pb2.GetAuditResponse = await server.model.GetAudit(request, metadata=bearer(token))
            return response
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND or time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.01)


async def test_an_adaptive_answer_is_compared_and_looks_as_ever(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder), **EVERY) as server:
        plain = await server.generate(text="abc", skip=ADAPTIVE, max_new_tokens=7)
        asked = await server.generate(
            text="abc", skip=ADAPTIVE, max_new_tokens=7, output=generation_pb2.OutputOptions(logprobs=2)
        )
        audit = await audit_of(server, plain.started.request_id)
        await audit_of(server, asked.started.request_id)
    assert plain.output.text == asked.output.text == "abcabca"
    assert not plain.output.logprobs
    assert [len(entry.top) for entry in asked.output.logprobs] == [2] * 7
    # The fake worker's log probabilities are the same on every path.
    assert (audit.token_count, audit.agreement, audit.logprob_gap, audit.divergence) == (6, 1.0, 0.0, 0.0)
    assert (audit.policy, audit.compute_budget) == ("toy", 0.9)


@pytest.mark.parametrize(
    "options",
    [{"skip": {"mode": "MODE_FULL_DEPTH"}}, {"skip": ADAPTIVE, "max_new_tokens": 1}],
    ids=["full depth", "one token"],
)
async def test_what_has_nothing_to_compare_is_not(model_folder: Path, options: dict[str, Any]) -> None:
    async with running_server(fake_model(model_folder), **EVERY) as server:
        answer = await server.generate(text="abc", **{"max_new_tokens": 4, **options})
        later = await server.generate(text="abc", skip=ADAPTIVE, max_new_tokens=4)
        await audit_of(server, later.started.request_id)
        missing = await refusal(server.model.GetAudit(model_pb2.GetAuditRequest(request_id=answer.started.request_id)))
        assert missing.code is grpc.StatusCode.NOT_FOUND


async def test_without_the_setting_an_answer_is_audited_when_it_is_asked_for(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder)) as server:
        answer = await server.generate(text="abc", skip=ADAPTIVE, max_new_tokens=4)
        assert (await server.probe()).num_live == 0
        request = model_pb2.GetAuditRequest(request_id=answer.started.request_id)
        once, again = await asyncio.gather(server.model.GetAudit(request), server.model.GetAudit(request))
    assert once == again
    assert (once.token_count, once.agreement, once.logprob_gap, once.divergence) == (3, 1.0, 0.0, 0.0)
    assert (once.policy, once.compute_budget) == ("toy", 0.9)


async def test_an_audit_that_is_asked_for_waits_until_nothing_else_is_to_do(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.01)) as server:
        answer = await server.generate(text="abc", skip=ADAPTIVE, max_new_tokens=4)
        request = model_pb2.GetAuditRequest(request_id=answer.started.request_id)
        long = asyncio.ensure_future(server.generate(text="abc", max_new_tokens=40))
        await asyncio.sleep(0.05)
        late = await refusal(server.model.GetAudit(request, timeout=0.1))
        assert late.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await server.model.GetAudit(request)
        assert long.done()


async def test_an_audit_that_is_waited_for_fails_when_the_server_ends(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder, token_seconds=0.05)) as server:
        answer = await server.generate(text="abc", skip=ADAPTIVE, max_new_tokens=40)
        request = model_pb2.GetAuditRequest(request_id=answer.started.request_id)
        waiting = asyncio.ensure_future(server.model.GetAudit(request))
        await asyncio.sleep(0.1)
        await server.server.drain(1)
        assert (await refusal(waiting)).code is grpc.StatusCode.UNAVAILABLE


async def test_a_request_takes_the_slot_of_an_audit_which_begins_again(model_folder: Path) -> None:
    model = fake_model(model_folder, token_seconds=0.01)
    async with running_server(model, slots=1, **EVERY) as server:
        first = await server.generate(text="abc", skip=ADAPTIVE, max_new_tokens=60)
        await asyncio.sleep(0.1)
        assert (await server.probe()).num_live == 0, "the audit gave way"
        await asyncio.sleep(0.1)  # and has begun again
        load = await server.model.GetLoad(model_pb2.GetLoadRequest())
        assert (load.running_request_count, load.cache_token_count) == (0, 0), "an audit is no load"
        begin = time.monotonic()
        await server.generate(text="ab", max_new_tokens=2, skip=generation_pb2.SkipOptions(mode="MODE_FULL_DEPTH"))
        assert time.monotonic() - begin < 0.3, "the audit takes 0.6 s"
        assert (await audit_of(server, first.started.request_id)).token_count == 59


async def test_audits_become_metrics(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder), metrics_port=0, **EVERY) as server:
        answer = await server.generate(text="abc", skip=ADAPTIVE, max_new_tokens=4)
        await audit_of(server, answer.started.request_id)
        scraped = await scrape(server)
    labels = {"dash_policy": "toy", "dash_compute_budget": "0.9"}
    assert scraped.value("dash_audit_tokens_total", dash_audit_agrees="true", **labels) == 3
    assert scraped.value("dash_audit_tokens_total", dash_audit_agrees="false", **labels) == 0
    assert scraped.value("dash_audit_divergence_count", **labels) == 1
    assert scraped.value("dash_audit_logprob_gap", **labels) == 0


def audit(ratio: float, policy: str = "toy") -> Audit:
    return Audit("r", policy, 0.9, 10, 0.9, 0.0, ratio * 0.05, 0.05)


def test_a_policy_that_drifts_from_its_card_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    auditor = Auditor(Dispatcher(Pace()), 1.0, 3.0, 10)

    def warnings(*audits: Audit) -> int:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for one in audits:
                assert one.expected_divergence is not None
                auditor.judge(one.policy, one.divergence / one.expected_divergence)
        return len(caplog.records)

    assert warnings(*[audit(4.0)] * 7) == 0, "too few to tell"
    assert warnings(*[audit(4.0)] * 8) == 1
    assert warnings(*[audit(1.0)] * 16, *[audit(1.0, "other")] * 9) == 0
    assert warnings(*[audit(4.0)] * 8) == 1, "it was well in between"


def logprobs(probabilities: list[float], num_top: int) -> TokenLogprobs:
    top = sorted(enumerate(probabilities), key=lambda item: -item[1])[:num_top]
    return TokenLogprobs(0.0, [(token_id, math.log(p)) for token_id, p in top])


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=2, max_size=30))
def test_the_divergence_is_at_most_the_whole_one_and_equal_where_all_tokens_are_known(
    weights: list[tuple[float, float]],
) -> None:
    full, own = ([weight[side] / sum(pair[side] for pair in weights) for weight in weights] for side in (0, 1))
    whole = math.fsum(p * math.log(p / q) for p, q in zip(full, own, strict=True))
    known = divergence(logprobs(full, len(full)), logprobs(own, len(own)))
    assert known == pytest.approx(max(0.0, whole), abs=1e-6)
    assert -1e-9 <= divergence(logprobs(full, 5), logprobs(own, 5)) <= whole + 1e-6
