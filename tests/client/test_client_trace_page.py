"""The content of a trace page, and its derived figures; test_client_trace_browser tests its behaviour."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import trace_samples as samples

from dash_api.v1 import common_pb2, model_pb2
from dash_client.trace.decision_trace_messages import recorded_decisions
from dash_client.trace.trace_page import trace_page
from dash_client.trace.trace_summary import (
    action_shares,
    evaluations,
    exposed_ns_per_token,
    first_positions,
    mean_cost_spent,
    step_groups,
)
from dash_client.types import Action

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\"'&amp;]]>"
VOID = {"meta", "input"}


class Page(HTMLParser):
    """Elements and texts of a page; refuses one whose tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.texts["script"][0])

    @property
    def facts(self) -> dict[str, str]:
        return dict(zip(self.texts["dt"], self.texts["dd"], strict=True))


def page_of(message: model_pb2.GetDecisionsResponse) -> Page:
    return Page(trace_page(recorded_decisions(message)))


SAMPLES = {
    "adaptive": samples.adaptive(),
    "inline": samples.adaptive(3, is_inline=True),
    "exact": samples.exact(),
    "empty": samples.small(steps=[]),
    "hostile": samples.small(model=HOSTILE, policy=HOSTILE, request_id=HOSTILE),
}


@pytest.mark.parametrize("message", SAMPLES.values(), ids=SAMPLES)
def test_a_page_needs_nothing_from_elsewhere(message: model_pb2.GetDecisionsResponse) -> None:
    text = trace_page(recorded_decisions(message))
    page = Page(text)
    assert not {"link", "img", "iframe", "base", "form", "object", "a"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not {"src", "href", "style", "srcset"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    style, script = page.texts["style"][0], page.texts["script"][1]
    assert "url(" not in style
    assert "@import" not in style
    # The only address is the name of an XML namespace.
    assert set(re.findall(r"https?://[^\s\"']+", style + script)) <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("message", SAMPLES.values(), ids=SAMPLES)
def test_only_the_pages_own_script_and_style_may_run(message: model_pb2.GetDecisionsResponse) -> None:
    page = page_of(message)
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    directives = dict(part.strip().split(" ", 1) for part in (policy["content"] or "").split(";"))
    digests = {
        tag: "'sha256-" + base64.b64encode(hashlib.sha256(page.texts[tag][-1].encode()).digest()).decode() + "'"
        for tag in ("script", "style")
    }
    assert directives == {
        "default-src": "'none'",
        "style-src": digests["style"],
        "script-src": digests["script"],
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert len(page.all("script")) == 2
    assert page.all("script")[0] == {"type": "application/json", "id": "data"}


def test_what_a_server_sends_is_text() -> None:
    page = page_of(SAMPLES["hostile"])
    assert page.facts["model"] == page.facts["policy"] == HOSTILE
    assert page.texts["title"] == page.texts["h1"] == [f"Decisions of request {HOSTILE}"]
    assert len(page.all("td")) == 8


def test_every_layer_of_every_step_is_a_cell_in_its_actions_colour() -> None:
    message = samples.adaptive()
    page = page_of(message)
    assert len(page.all("td")) == 24 * 30
    assert len(page.all("th", scope="row")) == 30
    assert page.texts["th"][1:25] == [str(number) for number in range(1, 25)]
    tokens = [str(step.token_ids[0]) for step in message.steps]
    assert [text for text in page.texts["span"] if text in tokens] == tokens
    for number, step in enumerate(message.steps, start=1):
        for layer, action in enumerate(step.actions):
            (cell,) = page.all("td", **{"data-step": str(number), "data-layer": str(layer)})
            classes = (cell["class"] or "").split()
            assert classes[0] == Action(action).name
            assert ("undecided" in classes) == (layer in (0, 1, 29))
            assert (cell["aria-label"] or "").startswith(Action(action).name)


def test_the_facts_sum_up() -> None:
    message = samples.adaptive()
    message.unrecorded_step_count = 6
    facts = page_of(message).facts
    exposed = sum(sum(step.exposed_nanos) for step in message.steps) / 24 / 1000
    spent = sum(step.cost_spent[-1] for step in message.steps) / 24
    assert facts == {
        "model": "smollm2-135m-instruct",
        "policy": "smollm2-135m-four-actions",
        "mode": "adaptive",
        "compute budget": "0.6",
        "price of compute": "0.8125",
        "steps shown": "24 of 30",
        "tokens put out": "24",
        "mean cost before last layer": f"{spent:.3f} of full depth",
        "exposed time per token": f"{exposed:.1f} µs",
    }


def test_shares_are_of_all_layers_that_ran_or_were_skipped() -> None:
    message = samples.adaptive()
    shares = action_shares(recorded_decisions(message).steps)
    actions = b"".join(step.actions for step in message.steps)
    assert shares == {action: actions.count(action) / len(actions) for action in Action}
    assert sum(shares.values()) == pytest.approx(1)
    page = page_of(message)
    for action, share in shares.items():
        assert any(text.endswith(f"{action.name} {share:.1%}") for text in page.texts["span"])


def test_nothing_recorded_is_said() -> None:
    page = page_of(samples.small(steps=[], mode=common_pb2.MODE_FULL_DEPTH, policy="", unrecorded_step_count=3))
    assert "No step was recorded." in page.texts["p"]
    assert page.all("table") == []
    assert page.facts["policy"] == "none"
    assert page.facts["steps shown"] == "0 of 3"
    assert "exposed time per token" not in page.facts


def test_drafts_stand_with_their_verification() -> None:
    groups = step_groups(recorded_decisions(samples.exact()).steps)
    assert [(group.first, len(group.steps), group.drafted, group.accepted) for group in groups] == [
        (0, 4, 3, 3),
        (4, 4, 3, 1),
        (8, 1, 0, None),
        (9, 2, 2, None),
    ]
    assert [list(group.verdicts()) for group in groups] == [
        [True, True, True, None],
        [True, False, False, None],
        [None],
        [None, None],
    ]
    # The groups put out 4, 2 and 1 tokens.
    assert first_positions(groups) == [1, 2, 3, 1, 5, 6, 7, 5, 7, 8, 9]


def test_an_exact_page_marks_drafts_and_shows_a_verification_as_one_column() -> None:
    page = page_of(samples.exact())
    verifications = [cell for cell in page.all("td") if "verification" in (cell["class"] or "")]
    assert [(cell["data-step"], cell["rowspan"]) for cell in verifications] == [("4", "30"), ("8", "30")]
    assert len(page.all("td")) == 9 * 30 + 2
    assert [group["colspan"] for group in page.all("th", scope="colgroup")] == ["4", "4", "1", "2"]
    for expected in ("3/3", "1/3", "not verified"):
        assert expected in page.texts["span"]
    rejected = {cell["data-step"] for cell in page.all("td") if "rejected" in (cell["class"] or "")}
    assert rejected == {"6", "7"}
    assert page.facts["drafted tokens accepted"] == "4 of 6"
    assert page.facts["tokens put out"] == "7"
    assert [step["verdict"] for step in page.data["steps"][4:8]] == ["accepted", "rejected", "rejected", None]


def test_a_blocks_layers_share_one_evaluation_beside_a_layer() -> None:
    step = recorded_decisions(samples.adaptive()).steps[0]
    runs = evaluations(step)
    assert [(run.first_layer, run.last_layer) for run in runs] == [
        (2, 5),
        (6, 9),
        (10, 13),
        (14, 17),
        (18, 21),
        (22, 25),
        (26, 28),
    ]
    for run in runs:
        layer = step.layers[run.first_layer]
        assert 0 < run.hidden_ns <= run.end_ns - run.start_ns
        # The decoder waits just before the layer whose decision it needs.
        assert (run.wait_start_ns, run.wait_end_ns) == (layer.start_ns - layer.exposed_ns, layer.start_ns)


def test_an_inline_evaluation_overlaps_nothing_and_is_exposed_itself() -> None:
    for step in recorded_decisions(samples.adaptive(3, is_inline=True)).steps:
        for run in evaluations(step):
            assert run.hidden_ns == 0
            assert (run.wait_start_ns, run.wait_end_ns) == (run.start_ns, run.end_ns)


def test_steps_without_decisions_have_no_means() -> None:
    decisions = recorded_decisions(samples.small(steps=samples.StepMaker().draft(1, 1)[1:]))
    assert action_shares(decisions.steps) == {}
    assert mean_cost_spent(decisions.steps) is None
    assert exposed_ns_per_token(decisions) == 0
    assert len(page_of(samples.small(steps=samples.StepMaker().draft(1, 1)[1:])).all("td")) == 1


def test_of_very_many_steps_the_first_are_shown() -> None:
    message = samples.adaptive(2)
    message.unrecorded_step_count = 5
    message.steps.extend([message.steps[1]] * 2_000)
    page = page_of(message)
    assert len(page.all("td")) == 30_000
    assert page.facts["steps shown"] == "1000 of 2007"
    assert len(page.data["steps"]) == 1_000


def test_of_very_many_tokens_in_a_step_the_first_are_shown() -> None:
    message = samples.small()
    message.steps[0].token_ids[:] = range(100_000)
    assert page_of(message).data["steps"][0]["tokens"] == [*map(str, range(16)), "…"]


def test_numbers_that_json_does_not_have_are_shown_as_they_are() -> None:
    message = samples.small()
    message.steps[0].scores[4:6] = [float("nan"), float("-inf")]
    scores = page_of(message).data["steps"][0]["layers"][1]["scores"]
    assert scores[:2] == [["SKIP", "nan"], ["INT4", "-inf"]]
