"""`python -m benchmarks.policy_figure`: draws the shipped policy's decisions for one answer, as docs/policy.png.

It measures no time: the cost of a step comes from the cost table of this machine, evaluations included.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from tokenizers import Tokenizer

from benchmarks.rounds import progress
from benchmarks.shipped import costs_of, shipped_policy
from dash_runtime.actions import Action
from dash_runtime.checkpoints import (
    default_cache_folder,
    resolve_checkpoint,
    tokenizer_file,
)
from dash_runtime.config import EngineConfig, GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.engine.engine import Engine
from dash_runtime.events import TokenProduced
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.startup.build import BuildOptions, build_engine

_QUESTION = "Why is the sky blue?"
_INK, _GRID = "#333333", "#dddddd"
# Skipping stands out; the others darken with their work. They differ in lightness alone.
_COLOURS = {Action.SKIP: "#E69F00", Action.INT4: "#A6CFE8", Action.INT8: "#3F8FC4", Action.FULL: "#0B3C6B"}


@dataclass(frozen=True, slots=True)
class Column:
    """One decode step: the text of its token, and the action of every layer."""

    text: str
    plan: tuple[Action, ...]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policy_figure", description=__doc__)
    parser.add_argument("--question", default=_QUESTION)
    parser.add_argument("--budget", type=float, help="default: what the policy recommends")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("docs/policy.png"))
    options = parser.parse_args()
    cache_folder = default_cache_folder(os.environ)
    folder = resolve_checkpoint("embedded", None, cache_folder)
    engine = build_engine(folder, cache_folder, BuildOptions(["cpu"]), EngineConfig(prompt_lookup=False), progress)
    policy = at_costs_of(engine, shipped_policy(folder))
    budget = options.budget or policy.recommended_budget(policy.costs)
    skip = SkipOptions(Mode.ADAPTIVE, budget, policy.name)
    columns = answer(engine, folder, options.question, skip, options.tokens)
    draw(columns, policy, options.question, budget, options.out)
    costs = [token_cost(policy, column) for column in columns]
    print(f"{len(columns)} steps; mean cost {sum(costs) / len(costs):.3f}, {min(costs):.3f} to {max(costs):.3f}")


def at_costs_of(engine: Engine, policy: LearnedPolicy) -> LearnedPolicy:
    """Returns the policy with the cost table by which the engine counts budgets."""
    return replace(policy, spec=replace(policy.spec, costs=costs_of(engine)))


def token_cost(policy: LearnedPolicy, column: Column) -> float:
    """Returns what a token cost, the policy's evaluations included."""
    return policy.costs.token_cost(column.plan, policy.head, policy.num_evaluations)


def answer(engine: Engine, folder: Path, question: str, skip: SkipOptions, num_tokens: int) -> list[Column]:
    """Returns the decode steps of a greedy answer. The first token comes from the prefill and has none."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file(folder)))
    prompt = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").ids
    engine.submit(GenerationRequest("figure", prompt, StoppingParameters(num_tokens), skip=skip, return_decisions=True))
    tokens: list[TokenProduced] = []
    while engine.has_work:
        tokens += [event for event in engine.step() if isinstance(event, TokenProduced)]
    texts = [tokenizer.decode([token.token_id]) for token in tokens]
    plans = [tuple(Action(number) for number in token.plan) for token in tokens]
    return [Column(text, plan) for text, plan in zip(texts[1:], plans[1:], strict=True)]


def draw(columns: Sequence[Column], policy: LearnedPolicy, question: str, budget: float, path: Path) -> None:
    """Draws layers by tokens above, and the cost of each token below."""
    canvas = Figure(figsize=(11, 6.6), dpi=110, layout="constrained", facecolor="white")
    above, below = canvas.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3.2, 1]})
    title = f"“{_plain(question)}”, answered by {policy.name} at a compute budget of {budget:.3f}"
    above.set_title(title, loc="left", fontsize=11, pad=24, color=_INK)
    _draw_plans(above, columns, policy)
    _draw_costs(below, columns, policy, budget)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, metadata={"Software": None}, pil_kwargs={"optimize": True})


def _draw_plans(axis: Axes, columns: Sequence[Column], policy: LearnedPolicy) -> None:
    layers = range(policy.costs.num_layers)
    shades = [[column.plan[layer] - 1 for column in columns] for layer in layers]
    axis.pcolormesh(shades, cmap=ListedColormap(list(_COLOURS.values())), vmin=0, vmax=3, edgecolor="white", lw=0.4)
    axis.invert_yaxis()
    axis.set_ylabel("layer", color=_INK)
    ticks = sorted({0, *range(5, policy.costs.num_layers, 5), policy.costs.num_layers - 1})
    axis.set_yticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    for layer in policy.pinned:
        axis.text(len(columns) + 0.3, layer + 0.5, "pinned", va="center", fontsize=7, color=_INK)
    handles = [Patch(color=colour, label=action.name) for action, colour in _COLOURS.items()]
    axis.legend(handles=handles, ncols=4, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


def _draw_costs(axis: Axes, columns: Sequence[Column], policy: LearnedPolicy, budget: float) -> None:
    costs = [token_cost(policy, column) for column in columns]
    places = [place + 0.5 for place in range(len(columns))]
    axis.bar(places, costs, width=0.8, color="#7A7A7A")
    axis.axhline(budget, color="#D55E00", lw=1.2)
    axis.text(len(columns) + 0.3, budget, "budget", va="center", fontsize=8, color="#D55E00")
    axis.axhline(1, color=_INK, lw=1.2)
    axis.text(len(columns) + 0.3, 1, "full depth", va="center", fontsize=8, color=_INK)
    axis.set_ylim(0, 1.1)
    axis.set_ylabel("cost of the token", color=_INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, axis="y", color=_GRID, lw=0.7)
    axis.set_axisbelow(True)
    texts = [_plain(column.text.replace("\n", "⏎").strip() or "␣") for column in columns]
    axis.set_xticks(places, texts, rotation=90, fontsize=8)
    axis.set_xlim(0, len(columns))


def _plain(text: str) -> str:
    """Escapes what matplotlib would read as mathematics."""
    return text.replace("$", r"\$")


if __name__ == "__main__":
    main()
