"""Draws a report as PNG files. Knows figures, and matplotlib, which nothing else needs; measures nothing."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures import Figure, Report
from benchmarks.rounds import progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI = 150
_INK = "#333333"
_OURS, _OTHERS, _MISSED = "#0072B2", "#999999", "#D55E00"
_RIVALS = ("transformers", "transformers_compiled", "llama_cpp_bf16", "llama_cpp_q8_0", "llama_cpp_q4_0")
_CONTENDERS = (*_RIVALS, "full_depth", "int8", "int4", "adaptive_default", "adaptive")
_STREAMS = (1, 4, 8, 16)


def write_plots(report: Report, folder: Path) -> None:
    """Draws every picture that the report has figures for. Adds a note if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        progress("no plots: matplotlib is not installed")
        return
    figures = {figure.name: figure for figure in report.figures}
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Any, Mapping[str, Figure]], bool]] = {
        "speed": _draw_speed,
        "targets": _draw_targets,
        "streams": _draw_streams,
    }
    for name, draw in pictures.items():
        with report.attempt(f"plot {name}"):
            canvas = Canvas(figsize=(8, 4.5), dpi=_DPI, layout="constrained", facecolor="white")
            if draw(canvas.subplots(), figures):
                canvas.savefig(folder / f"{name}.png", metadata={"Software": None})


def _draw_speed(axis: "Axes", figures: Mapping[str, Figure]) -> bool:
    named = [
        (name, figures[f"{name}_tokens_per_second"]) for name in _CONTENDERS if f"{name}_tokens_per_second" in figures
    ]
    if not named:
        return False
    _plain(axis, "One stream: median, lowest and highest round", "decoded tokens per second")
    colours = [_OTHERS if name in _RIVALS else _OURS for name, _ in named]
    values = [figure.value for _, figure in named]
    axis.barh(range(len(named)), values, color=colours, xerr=_spread([figure for _, figure in named]), ecolor=_INK)
    axis.set_yticks(range(len(named)), [name.replace("_", " ") for name, _ in named])
    axis.invert_yaxis()
    return True


def _draw_targets(axis: "Axes", figures: Mapping[str, Figure]) -> bool:
    """Draws every figure that has a target, as a multiple of it, so that all fit one axis."""
    aimed = [(figure, figure.bound) for figure in figures.values() if figure.bound is not None]
    if not aimed:
        return False
    _plain(axis, "Figures over their targets: at least (›) or at most (‹) 1 is asked for", "value over target")
    for place, (figure, bound) in enumerate(aimed):
        colour = _OURS if figure.is_met else _MISSED
        marker = ">" if str(figure.target).startswith("≥") else "<"
        axis.plot([figure.low / bound, figure.high / bound], [place, place], color=colour, linewidth=2)
        axis.plot([figure.value / bound], [place], color=colour, marker=marker, markersize=9)
    axis.axvline(1, color=_INK, linewidth=1)
    axis.set_yticks(range(len(aimed)), [f"{figure.name}  {figure.target}" for figure, _ in aimed], fontsize=8)
    axis.invert_yaxis()
    return True


def _draw_streams(axis: "Axes", figures: Mapping[str, Figure]) -> bool:
    lines = {
        "ADAPTIVE": ("tokens_per_second_{}", _OURS, "o"),
        "ADAPTIVE, planner off": ("throughput_{}_planner_off", "#56B4E9", "s"),
        "ADAPTIVE, through gRPC": ("served_tokens_per_second_{}", "#009E73", "^"),
        "transformers": ("transformers_tokens_per_second_{}", _OTHERS, "D"),
    }
    is_drawn = False
    for label, (pattern, colour, marker) in lines.items():
        points = [(count, figures[pattern.format(count)]) for count in _STREAMS if pattern.format(count) in figures]
        if points:
            own = [figure for _, figure in points]
            counts, values = [count for count, _ in points], [figure.value for figure in own]
            axis.errorbar(counts, values, yerr=_spread(own), label=label, color=colour, marker=marker, capsize=3)
            is_drawn = True
    if is_drawn:
        _plain(axis, "All streams together: median, lowest and highest round", "streams")
        axis.set_ylabel("decoded tokens per second", color=_INK)
        axis.set_xticks(_STREAMS)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    return is_drawn


def _plain(axis: "Axes", title: str, x_label: str) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.set_title(title, loc="left", color=_INK)
    axis.set_xlabel(x_label, color=_INK)


def _spread(figures: Sequence[Figure]) -> list[list[float]]:
    return [[own.value - own.low for own in figures], [own.high - own.value for own in figures]]
