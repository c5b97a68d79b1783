"""Plots training and evaluation to PNG files: the curve, cost against quality, actions by layer.

Knows matplotlib, imported only to draw, and figures that were computed elsewhere; knows no models and no torch.
"""

import importlib.util
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dash_runtime.errors import ConfigError
from dash_runtime.training.curve import CurveRow, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 150
_INK = "#333333"
_GRID = "#dddddd"
_TEXT_SIZE = 10.5
_LEGEND_WIDTH = 24
# Okabe and Ito's palette, which any colour vision can tell apart, without the yellow that is too pale on white.
_LEARNED_COLOURS = ("#D55E00", "#0072B2")
_OTHER_COLOURS = ("#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
_MARKERS = ("s", "^", "D", "v", "<", ">", "p")
_LINES = ("--", ":", "-.")
# Skipping stands out; the others darken with their work, so that lightness alone tells them apart.
_ACTION_COLOURS = {"SKIP": "#E69F00", "INT3": "#D5E8F4", "INT4": "#A6CFE8", "INT8": "#3F8FC4", "FULL": "#0B3C6B"}


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """One measurement of `name`: its cost as a share of the full-depth token, and the value plotted against it.

    `value` is a divergence in nats per token, unless the plot's `y_label` says otherwise. `learned` marks the policy
    that the plot is about.
    """

    name: str
    cost_share: float
    value: float
    learned: bool = False


def has_matplotlib() -> bool:
    """Returns True if matplotlib is installed, without importing it."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_curve(rows: Sequence[CurveRow], path: Path) -> None:
    """Plots cost and loss of each round at a low, a middle and a high price.

    Raises:
        ConfigError: matplotlib is missing, there are no rows, or the file cannot be written.
    """
    if not rows:
        raise ConfigError("plot", "the training curve has no rows yet")
    figure = _new_figure(7.5, 5.5)
    rounds = [row.iteration + 1 for row in rows]
    losses = [[row.loss_low, row.loss_middle, row.loss_high] for row in rows]
    costs = [[row.cost_low, row.cost_middle, row.cost_high] for row in rows]
    axes: list[Axes] = list(figure.subplots(2, 1, sharex=True))
    names = ("low price", "middle price", "high price")
    panels = (("cost\n(share of full depth)", costs), ("loss\n(nats per token)", losses))
    for axis, (label, values) in zip(axes, panels, strict=True):
        _plain(axis)
        lines = [
            axis.plot(rounds, own, color=colour, linewidth=2, marker="o")[0]
            for own, colour in zip(zip(*values, strict=True), (*_LEARNED_COLOURS, _OTHER_COLOURS[0]), strict=True)
        ]
        axis.set_ylabel(label, color=_INK, fontsize=_TEXT_SIZE)
    _log_scale(axes[1], [value for own in losses for value in own])
    _whole_numbers(axes[-1])
    axes[-1].set_xlabel("round", color=_INK, fontsize=_TEXT_SIZE)
    _legend(figure, lines, names)
    figure.align_ylabels(axes)
    _save(figure, path)


def plot_pareto(
    rows: Sequence[ParetoPoint], path: Path, title: str, y_label: str = "divergence (nats per token)", log: bool = True
) -> None:
    """Plots a value against the cost share: one line per name in the given order, the learned ones on top.

    Points that are not finite are left out. On a log axis, values of 0 and below lie on a line marked 0.

    Raises:
        ConfigError: matplotlib is missing, there is no point to draw, or the file cannot be written.
    """
    rows = [row for row in rows if math.isfinite(row.cost_share) and math.isfinite(row.value)]
    if not rows:
        raise ConfigError("plot", "there are no points to draw")
    names = list(dict.fromkeys(row.name for row in rows))
    legend_lines = sum(max(1, math.ceil(len(name) / (_LEGEND_WIDTH - 6))) for name in names)
    figure = _new_figure(9.0, max(5.0, 0.6 + 0.22 * legend_lines))
    axis = figure.subplots()
    _plain(axis)
    learned_colours, other_colours = cycle(_LEARNED_COLOURS), cycle(_OTHER_COLOURS)
    markers, styles = cycle(_MARKERS), cycle(_LINES)
    handles: list[Any] = []
    for name in names:
        points = sorted((row for row in rows if row.name == name), key=lambda row: row.cost_share)
        x = [point.cost_share for point in points]
        y = [max(point.value, 0.0) if log else point.value for point in points]
        if any(point.learned for point in points):
            look: dict[str, Any] = {
                "color": next(learned_colours), "marker": "o", "markersize": 9.5, "linewidth": 2.8, "zorder": 4,
            }  # fmt: skip
        else:
            look = {
                "color": next(other_colours), "marker": next(markers), "linestyle": next(styles),
                "markersize": 7.5, "linewidth": 1.4, "zorder": 3,
            }  # fmt: skip
        if len(points) == 1:
            look["linestyle"] = "none"
        # A white edge keeps overlapping markers apart.
        handles += axis.plot(x, y, markeredgecolor="white", markeredgewidth=0.8, **look)
    if log:
        _log_scale(axis, [row.value for row in rows])
    axis.set_xlabel("cost (share of the full-depth token)", color=_INK, fontsize=_TEXT_SIZE)
    axis.set_ylabel(y_label, color=_INK, fontsize=_TEXT_SIZE)
    # A name is no formula, whatever dollar signs it has.
    axis.set_title(title, loc="left", color=_INK, fontsize=_TEXT_SIZE + 1.5).set_parse_math(False)
    _legend(figure, handles, names)
    _save(figure, path)


def plot_action_rates(rates: Sequence[Sequence[float]], action_names: Sequence[str], path: Path) -> None:
    """Plots the share of tokens of each action, as one stacked bar per layer. `rates` is `[num_layers][num_actions]`.

    Raises:
        ConfigError: matplotlib is missing, there are no layers, or the file cannot be written.
        ValueError: a layer has not one rate per action, or its rates do not add up to 1.
    """
    if not rates:
        raise ConfigError("plot", "there are no layers to draw")
    for layer, row in enumerate(rates):
        if len(row) != len(action_names) or min(row) < 0 or not 0.99 < sum(row) < 1.01:
            raise ValueError(f"layer {layer} has rates {list(row)} for {len(action_names)} actions")
    figure = _new_figure(min(16.0, max(7.0, 2.5 + 0.2 * len(rates))), 4.2)
    axis = figure.subplots()
    _plain(axis)
    axis.grid(False)
    others = cycle(_OTHER_COLOURS)
    below = [0.0] * len(rates)
    bars: list[Any] = []
    for index, name in enumerate(action_names):
        heights = [row[index] for row in rates]
        colour = _ACTION_COLOURS.get(name) or next(others)
        bars.append(axis.bar(range(len(rates)), heights, bottom=below, width=0.86, color=colour))
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axis.set_xlim(-0.6, len(rates) - 0.4)
    axis.set_ylim(0, 1)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axis.tick_params(axis="x", length=0)
    _whole_numbers(axis)
    axis.set_xlabel("layer", color=_INK, fontsize=_TEXT_SIZE)
    axis.set_ylabel("tokens", color=_INK, fontsize=_TEXT_SIZE)
    # The legend has the order of the bars, from top to bottom.
    _legend(figure, bars[::-1], list(action_names)[::-1])
    _save(figure, path)


def _new_figure(width: float, height: float) -> "Figure":
    """Returns an empty figure of that many inches. Raises ConfigError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plot", "needs matplotlib: pip install 'dash-llm[train]'") from None
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")


def _plain(axis: "Axes") -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#999999")
    axis.tick_params(colors=_INK, labelsize=_TEXT_SIZE - 1, which="both", color="#999999")
    axis.grid(True, color=_GRID, linewidth=0.7)
    axis.set_axisbelow(True)


def _log_scale(axis: "Axes", values: Sequence[float]) -> None:
    """Sets a log axis that can also show 0, such as the divergence of full depth."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if not positive:
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, SymmetricalLogLocator

    # With few decades, one label each is too few.
    steps = (1.0, 2.0, 5.0) if max(positive) < 100 * min(positive) else (1.0,)
    if all(value > 0 for value in values if math.isfinite(value)):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=steps))
    else:
        threshold = 10.0 ** math.floor(math.log10(min(positive)))
        axis.set_yscale("symlog", linthresh=threshold, linscale=0.4)
        axis.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=threshold, subs=steps))
        axis.set_ylim(bottom=-threshold / 10)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _whole_numbers(axis: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))


def _legend(figure: "Figure", handles: Sequence[Any], names: Sequence[str]) -> None:
    labels = [textwrap.fill(name, _LEGEND_WIDTH) for name in names]
    legend = figure.legend(
        handles, labels, loc="outside right upper", frameon=False, fontsize=_TEXT_SIZE - 0.5, handlelength=2.6
    )
    for text in legend.get_texts():
        text.set_color(_INK)
        text.set_parse_math(False)


def _save(figure: "Figure", path: Path) -> None:
    picture = BytesIO()
    # PNG selects Agg for this call only, not for the process. Without the version, the same data gives the same bytes.
    figure.savefig(picture, format="png", dpi=_DPI, metadata={"Software": None})
    write_whole(path, picture.getvalue())
