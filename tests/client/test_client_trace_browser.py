"""The trace page in a real browser: headless Chromium opens the file and prints the resulting document."""

import base64
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import trace_samples as samples

from dash_api.v1 import model_pb2
from dash_client.trace.decision_trace_messages import recorded_decisions
from dash_client.trace.trace_page import trace_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--window-size=1400,1000",
)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="none of chromium, chromium-browser and google-chrome is on the PATH"
)


class Dom(HTMLParser):
    """The elements of a page in the browser, and the text of each that has an id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._id: str | None = None
        self.texts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if name := self.elements[-1][1].get("id"):
            self._id, self.texts[name] = name, ""

    def handle_data(self, data: str) -> None:
        if self._id is not None:
            self.texts[self._id] += data

    def all(self, tag: str, class_name: str = "") -> list[dict[str, str | None]]:
        return [
            found
            for name, found in self.elements
            if name == tag and (not class_name or class_name in (found.get("class") or "").split())
        ]

    @property
    def selected_steps(self) -> set[str | None]:
        return {cell["data-step"] for cell in self.all("td", "selected")}

    @property
    def focusable_cells(self) -> list[tuple[str | None, str | None]]:
        return [(cell["data-step"], cell.get("data-layer")) for cell in self.all("td") if cell.get("tabindex") == "0"]


Browse = Callable[..., Dom]


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Opens a page with a fragment, runs a script in it, and fails if the browser's console says anything."""

    def open_page(message: model_pb2.GetDecisionsResponse, fragment: str = "", script: str = "") -> Dom:
        text = trace_page(recorded_decisions(message))
        if script:
            digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            text = text.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
            text = text.replace("</body>", f"<script>{script}</script></body>")
        page = tmp_path / "page.html"
        page.write_text(text, encoding="utf-8")
        assert CHROMIUM is not None
        result = subprocess.run(
            [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"{page.as_uri()}{fragment}"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        assert re.findall(r".*CONSOLE.*", result.stderr) == []
        return Dom(result.stdout)

    return open_page


def test_the_page_opens_at_its_first_step(browse: Browse) -> None:
    dom = browse(samples.adaptive())
    assert len(dom.all("td")) == 24 * 30
    assert dom.selected_steps == {"1"}
    assert dom.focusable_cells == [("1", "0")]
    assert dom.texts["step-title"].startswith("Step 1 of 24: decode")
    assert len(dom.all("rect", "evaluation")) == 7
    assert len(dom.all("rect", "head")) == 1
    layers = [box for box in dom.all("rect", "block") if box.get("data-layer") and "evaluation" not in box["class"]]  # type: ignore[operator]
    assert [box["data-layer"] for box in layers] == [str(layer) for layer in range(30)]


def test_a_fragment_selects_a_step_and_redraws_the_timeline(browse: Browse) -> None:
    message = samples.adaptive()
    first, third = browse(message), browse(message, "#step=3&layer=12&zoom=4")
    assert third.selected_steps == {"3"}
    assert third.focusable_cells == [("3", "12")]
    assert third.texts["step-title"].startswith("Step 3 of 24")
    assert third.texts["step-summary"] != first.texts["step-summary"]
    widths = [float(dom.all("svg")[-1]["width"] or 0) for dom in (first, third)]
    assert widths[1] == pytest.approx(4 * widths[0])
    layers = [[box["x"] for box in dom.all("rect", "block")] for dom in (first, third)]
    assert layers[0] != layers[1]
    # Layer 12, and the evaluation that decided it with layers 10 to 13.
    assert [box["data-layer"] for box in third.all("rect", "chosen")] == ["12", "10"]


@pytest.mark.parametrize("fragment", ["#step=99&layer=1e9&zoom=-1", "#step=1.5&%00"])
def test_a_fragment_that_says_nothing_is_the_first_step(browse: Browse, fragment: str) -> None:
    assert browse(samples.small(), fragment).selected_steps == {"1"}


SCRIPT = """
const out = [];
const note = () => out.push(location.hash + " " + (document.activeElement.dataset.layer ?? "none"));
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
document.querySelector('td[data-step="2"][data-layer="5"]').click(); note();
for (const key of ["ArrowRight", "ArrowDown", "ArrowUp", "ArrowLeft", "End", "ArrowRight", "Home", "ArrowLeft"]) {
  press(key); note();
}
document.querySelector('th[data-step="7"]').click(); note();
document.querySelector('#timeline [data-layer="9"]').dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
const log = document.createElement("p");
log.id = "log";
log.textContent = out.join("; ");
document.body.append(log);
"""


def test_clicks_and_arrow_keys_choose_the_step_and_layer(browse: Browse) -> None:
    dom = browse(samples.adaptive(), script=SCRIPT)
    assert dom.texts["log"].strip().split("; ") == [
        "#step=2&layer=5 5",
        "#step=3&layer=5 5",
        "#step=3&layer=6 6",
        "#step=3&layer=5 5",
        "#step=2&layer=5 5",
        "#step=24&layer=5 5",
        "#step=24&layer=5 5",
        "#step=1&layer=5 5",
        "#step=1&layer=5 5",
        "#step=7 5",
    ]
    assert dom.selected_steps == {"7"}


def test_the_details_of_a_decision_are_shown_at_its_cell(browse: Browse) -> None:
    message = samples.adaptive()
    tip = browse(message, "#step=2&layer=12").texts["tip"]
    run = recorded_decisions(message).steps[1].layers[12]
    assert run.decision is not None
    assert tip.startswith("step 2, layer 12")
    for action, score in (run.decision.scores or {}).items():
        assert f"score {action.name}{score:.3f}" in tip
    assert f"cost spent before{run.cost_spent:.3f}" in tip
    assert f"{run.decision.start_ns / 1000:,.1f}".removesuffix(".0") in tip
    assert "none: pinned" in browse(message, "#step=2&layer=29").texts["tip"]


def test_a_verification_is_one_cell_and_one_bar(browse: Browse) -> None:
    dom = browse(samples.exact(), "#step=4&layer=7")
    assert dom.focusable_cells == [("4", None)]
    assert [box["data-layer"] for box in dom.all("rect", "verification")] == [""]
    assert dom.texts["tip"].startswith("step 4, verification")
    assert "3 of which it accepted" in dom.texts["step-summary"]


def test_an_inline_policy_is_seen_not_to_overlap(browse: Browse) -> None:
    dom = browse(samples.adaptive(2, is_inline=True))
    assert "none of it while a layer ran" in dom.texts["step-summary"]
    assert len(dom.all("rect", "exposed")) == len(dom.all("rect", "evaluation"))


def test_what_a_server_sends_cannot_run(browse: Browse) -> None:
    hostile = "</script><script>document.title = 'ran'</script><img src=x onerror=\"document.title='ran'\">"
    dom = browse(samples.small(model=hostile, policy=hostile, request_id=hostile))
    assert dom.all("img") == []
    assert len(dom.all("script")) == 2
    assert dom.selected_steps == {"1"}


def test_a_page_without_steps_opens_quietly(browse: Browse) -> None:
    assert browse(samples.small(steps=[])).all("td") == []
