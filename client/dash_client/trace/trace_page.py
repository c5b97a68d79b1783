"""Draws recorded decisions as one HTML page that needs no network and no other file.

The page's security policy allows only its own script and style, by their digests, so nothing that a server sent can
run. Knows no server, and no files except its templates.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from importlib import resources
from string import Template
from typing import Any

from dash_client.decision_trace import RecordedDecisions, RecordedLayer, RecordedStep, StepKind
from dash_client.trace.trace_summary import (
    StepGroup,
    action_shares,
    evaluations,
    exposed_ns_per_token,
    first_positions,
    mean_cost_spent,
    output_token_count,
    step_groups,
)
from dash_client.types import Action

_LETTERS = {Action.SKIP: "S", Action.INT3: "3", Action.INT4: "4", Action.INT8: "8", Action.FULL: "F"}
_MAX_WIDE_STEPS = 32
_MAX_CELLS = 30_000
"""Browsers are slow with many more."""
_MAX_TOKENS = 16
"""The most token ids shown for one step. A decode has one; a verification has at most a draft's length plus one."""
_BAR_WIDTH = 240


def trace_page(decisions: RecordedDecisions) -> str:
    """Returns the page as HTML, to be written as UTF-8. Shows only the first of very many steps.

    The page follows a fragment such as `#step=3&layer=12&zoom=4`; steps count from 1, layers from 0.
    """
    decisions = _bounded(decisions)
    style, script = _template("trace.css"), _template("trace.js")
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}"
    return Template(_template("trace.html")).substitute(
        policy=f"{policy}; base-uri 'none'; form-action 'none'",
        title=html.escape(f"Decisions of request {decisions.request_id}"),
        style=style,
        facts="\n".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in _facts(decisions)
        ),
        body=_body(decisions) if decisions.steps else '<p class="note">No step was recorded.</p>',
        data=_data(decisions),
        script=script,
    )


def _bounded(decisions: RecordedDecisions) -> RecordedDecisions:
    """Keeps as many of the first steps as a page can show."""
    kept = decisions.steps[: max(1, _MAX_CELLS // decisions.layer_count)]
    missing = decisions.unrecorded_step_count + len(decisions.steps) - len(kept)
    return replace(decisions, steps=kept, unrecorded_step_count=missing)


@cache
def _template(name: str) -> str:
    return (resources.files("dash_client.trace") / "templates" / name).read_text(encoding="utf-8")


def _digest(inline: str) -> str:
    """Returns the content security policy's source expression for an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


def _facts(decisions: RecordedDecisions) -> Iterator[tuple[str, str]]:
    steps = decisions.steps
    yield "model", decisions.model
    yield "policy", decisions.policy or "none"
    yield "mode", decisions.mode.value
    if decisions.compute_budget is not None:
        yield "compute budget", f"{decisions.compute_budget:.3g}"
    if decisions.price_of_compute is not None:
        yield "price of compute", f"{decisions.price_of_compute:.4g}"
    missing = decisions.unrecorded_step_count
    yield "steps shown", f"{len(steps)} of {len(steps) + missing}" if missing else f"all {len(steps)}"
    yield "tokens put out", str(output_token_count(steps))
    groups = step_groups(steps)
    if drafted := sum(group.drafted for group in groups if group.accepted is not None):
        yield "drafted tokens accepted", f"{sum(group.accepted or 0 for group in groups)} of {drafted}"
    if (spent := mean_cost_spent(steps)) is not None:
        yield "mean cost before last layer", f"{spent:.3f} of full depth"
    if (exposed := exposed_ns_per_token(decisions)) is not None:
        yield "exposed time per token", f"{exposed / 1000:.1f} µs"


def _body(decisions: RecordedDecisions) -> str:
    groups = step_groups(decisions.steps)
    is_exact = any(step.kind is not StepKind.DECODE for step in decisions.steps)
    drafts = "drafts stand beside the verification that accepted (✓) or rejected (✗) them"
    legend = '<span><i class="swatch FULL undecided">F</i>hatched: not decided (pinned, or at full depth)</span>'
    if is_exact:
        legend += '\n<span><i class="swatch INT4 rejected">4</i>faint: a draft that was rejected</span>'
    return Template(_template("trace_body.html")).substitute(
        columns=drafts if is_exact else "the first token, which comes from the prefill, has none",
        shares=_shares(action_shares(decisions.steps)),
        legend=legend,
        grid=_grid(decisions, groups, is_exact),
    )


def _shares(shares: dict[Action, float]) -> str:
    """Returns a bar of the actions' shares, with a legend of the colours."""
    bar, position = "", 0.0
    for action, share in shares.items():
        width = share * _BAR_WIDTH
        bar += f'<rect class="{action.name}" x="{position:.1f}" width="{width:.1f}" height="14"/>'
        position += width
    names = "\n".join(
        f'<span><i class="swatch {action.name}">{_LETTERS[action]}</i>{action.name}'
        + (f" {shares[action]:.1%}" if shares else "")
        + "</span>"
        for action in Action
    )
    return (f'<svg viewBox="0 0 {_BAR_WIDTH} 14" aria-hidden="true">{bar}</svg>\n' if bar else "") + names


def _grid(decisions: RecordedDecisions, groups: list[StepGroup], is_exact: bool) -> str:
    steps = decisions.steps
    verdicts = [verdict for group in groups for verdict in group.verdicts()]
    head = f"<tr><th></th>{''.join(map(_group_header, groups))}</tr>\n" if is_exact else ""
    headers = "".join(
        _step_header(place, step, verdict)
        for place, (step, verdict) in enumerate(zip(steps, verdicts, strict=True), start=1)
    )
    rows = "\n".join(
        f'<tr><th scope="row">{layer}</th>{"".join(_cells(steps, verdicts, layer, decisions.layer_count))}</tr>'
        for layer in range(decisions.layer_count)
    )
    dense = ' class="dense"' if len(steps) > _MAX_WIDE_STEPS else ""
    return (
        f'<table id="grid"{dense}>\n<caption>The action of each layer (rows) in each step (columns)</caption>\n'
        f'<thead>\n{head}<tr><th scope="col">layer</th>{headers}</tr>\n</thead>\n<tbody>\n{rows}\n</tbody>\n</table>'
    )


def _group_header(group: StepGroup) -> str:
    text = ""
    if drafted := group.drafted + group.from_text:
        accepted = "not verified" if group.accepted is None else f"{group.accepted}/{drafted}"
        text = f'<span title="accepted of the drafted tokens">{accepted}</span>'
    return f'<th scope="colgroup" colspan="{len(group.steps)}">{text}</th>'


def _step_header(number: int, step: RecordedStep, verdict: bool | None) -> str:
    mark = {True: "✓", False: "✗", None: ""}[verdict]
    label = ", ".join(_tokens(step))
    if step.kind is StepKind.VERIFICATION:
        mark, label = "V", f"{len(step.token_ids)} out"
    marked = f'<span class="verdict">{mark}</span>' if mark else ""
    return f'<th scope="col" data-step="{number}">{number}<span class="token">{label}</span>{marked}</th>'


def _tokens(step: RecordedStep) -> list[str]:
    ids = step.token_ids
    return [*map(str, ids[:_MAX_TOKENS]), *(["…"] if len(ids) > _MAX_TOKENS else [])]


def _cells(
    steps: Iterable[RecordedStep], verdicts: Iterable[bool | None], layer: int, layer_count: int
) -> Iterator[str]:
    """Yields the cells of one row of the grid."""
    for number, (step, verdict) in enumerate(zip(steps, verdicts, strict=True), start=1):
        if step.layers:
            yield _cell(number, layer, step.layers[layer], verdict)
        elif layer == 0:
            yield (f'<td class="verification undecided" rowspan="{layer_count}" data-step="{number}">verification</td>')


def _cell(number: int, layer: int, run: RecordedLayer, verdict: bool | None) -> str:
    classes, label = run.action.name, run.action.name
    if run.decision is None:
        classes, label = f"{classes} undecided", f"{label}, not decided"
    if verdict is False:
        classes, label = f"{classes} rejected", f"{label}, rejected"
    return (
        f'<td class="{classes}" data-step="{number}" data-layer="{layer}" aria-label="{label}">'
        f"{_LETTERS[run.action]}</td>"
    )


def _data(decisions: RecordedDecisions) -> str:
    groups = step_groups(decisions.steps)
    verdicts = (verdict for group in groups for verdict in group.verdicts())
    steps = zip(decisions.steps, verdicts, first_positions(groups), strict=True)
    data = {
        "layerCount": decisions.layer_count,
        "pinned": decisions.pinned_layers,
        "steps": [_step_data(step, verdict, position, decisions) for step, verdict, position in steps],
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    # The data must not end the script block or begin a comment.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _step_data(step: RecordedStep, verdict: bool | None, position: int, decisions: RecordedDecisions) -> dict[str, Any]:
    return {
        "kind": step.kind.value,
        "tokens": _tokens(step),
        "position": position,
        "offset": step.start_unix_ns - decisions.steps[0].start_unix_ns,
        "duration": step.duration_ns,
        "accepted": step.accepted_token_count,
        "fromText": step.text_token_count,
        "verdict": {True: "accepted", False: "rejected", None: None}[verdict],
        "layers": [_layer_data(layer) for layer in step.layers],
        "evaluations": [
            {
                "first": run.first_layer,
                "last": run.last_layer,
                "start": run.start_ns,
                "end": run.end_ns,
                "hidden": run.hidden_ns,
                "wait": (run.wait_start_ns, run.wait_end_ns),
            }
            for run in evaluations(step)
        ],
    }


def _layer_data(layer: RecordedLayer) -> dict[str, Any]:
    decision = layer.decision
    return {
        "action": layer.action.name,
        "start": layer.start_ns,
        "end": layer.end_ns,
        "decision": (decision.start_ns, decision.end_ns) if decision else None,
        "scores": [(action.name, _finite(score)) for action, score in decision.scores.items()]
        if decision and decision.scores
        else None,
        "exposed": layer.exposed_ns,
        "cost": None if layer.cost_spent is None else _finite(layer.cost_spent),
    }


def _finite(value: float) -> float | str:
    """Returns a number that JSON can hold, else a string, which the page shows as it is. A float32 has six digits."""
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)
