"""Plots are whole PNG files, drawn without global state, whatever the names and figures."""

import math
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dash_runtime.errors import ConfigError
from dash_runtime.evaluation.plots import ParetoPoint, has_matplotlib, plot_action_rates, plot_curve, plot_pareto
from dash_runtime.training.curve import CurveRow

needs_matplotlib = pytest.mark.skipif(not has_matplotlib(), reason="needs matplotlib")

CURVE = [CurveRow(i, 1.0, 0.9, 0.1 * 0.9**i, 0.8, 0.2 * 0.9**i, 0.7, 0.9**i, 2.5 * (i + 1)) for i in range(30)]
POINTS = [
    ParetoPoint(name, cost, value * scale, name == "learned")
    for name, scale in (("learned", 1.0), ("random, same rates", 3.0), ("even skips on INT4", 7.0))
    for cost, value in ((0.9, 0.01), (0.8, 0.03), (0.7, 0.2))
]
RATES = [[0.0, 0.0, 1.0], [0.2, 0.5, 0.3], [0.6, 0.4, 0.0], [0.0, 0.0, 1.0]]
ACTIONS = ["SKIP", "INT4", "FULL"]


def picture_size(path: Path) -> tuple[int, int]:
    """Returns the width and height in pixels of a whole PNG file."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_matplotlib
def test_each_plot_is_a_whole_png_of_150_dots_per_inch_and_nothing_else_stays(tmp_path: Path) -> None:
    plot_curve(CURVE, tmp_path / "curve.png")
    plot_pareto(POINTS, tmp_path / "pareto.png", "divergence against cost")
    plot_action_rates(RATES, ACTIONS, tmp_path / "rates.png")
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["curve.png", "pareto.png", "rates.png"]
    for file in files:
        assert min(picture_size(file)) >= 4 * 150
        place = file.read_bytes().index(b"pHYs") + 4
        assert round(struct.unpack(">I", file.read_bytes()[place : place + 4])[0] * 0.0254) == 150


@needs_matplotlib
def test_the_same_data_give_the_same_bytes_and_other_data_others(tmp_path: Path) -> None:
    one, same, other = (tmp_path / f"{name}.png" for name in ("one", "same", "other"))
    plot_curve(CURVE, one)
    plot_curve(CURVE, same)
    plot_curve([replace(row, cost_low=0.5) for row in CURVE], other)
    assert one.read_bytes() == same.read_bytes() != other.read_bytes()


@needs_matplotlib
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_curve_of_few_rows_is_drawn(tmp_path: Path, count: int) -> None:
    plot_curve(CURVE[:count], tmp_path / "curve.png")
    picture_size(tmp_path / "curve.png")


@needs_matplotlib
@pytest.mark.parametrize("divergence", [0.0, -1e-9, math.nan, math.inf])
def test_a_divergence_that_a_log_axis_cannot_show_is_no_error(tmp_path: Path, divergence: float) -> None:
    path = tmp_path / "plot.png"
    plot_curve([*CURVE[:5], replace(CURVE[5], loss_low=divergence)], path)
    plot_curve([replace(row, loss_low=divergence) for row in CURVE], path)
    plot_pareto([*POINTS, ParetoPoint("full depth", 1.0, divergence)], path, "with full depth")
    picture_size(path)


@needs_matplotlib
@pytest.mark.parametrize("name", ["$x^", "_hidden", "", "a name that is long " * 10])
def test_any_name_is_shown_as_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / "pareto.png"
    plot_pareto([*POINTS, ParetoPoint(name, 0.7, 0.05), ParetoPoint(name, 0.8, 0.04)], path, name)
    picture_size(path)


@needs_matplotlib
def test_the_learned_policy_is_marked_and_accuracy_has_a_linear_axis_with_its_own_label(tmp_path: Path) -> None:
    plot_pareto(POINTS, tmp_path / "marked.png", "cost")
    plot_pareto([replace(point, learned=False) for point in POINTS], tmp_path / "unmarked.png", "cost")
    plot_pareto(POINTS, tmp_path / "labelled.png", "cost", y_label="accuracy")
    plot_pareto(POINTS, tmp_path / "linear.png", "cost", y_label="accuracy", log=False)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 4


@needs_matplotlib
def test_many_names_and_many_layers_have_room(tmp_path: Path) -> None:
    plot_pareto([ParetoPoint(f"policy {n}", 0.5 + 0.01 * n, 1.0 + n) for n in range(40)], tmp_path / "many.png", "cost")
    plot_action_rates([[0.25, 0.25, 0.5]] * 120, ACTIONS, tmp_path / "layers.png")
    assert picture_size(tmp_path / "many.png")[1] > 5 * 150
    assert picture_size(tmp_path / "layers.png")[0] == 16 * 150


@needs_matplotlib
def test_nothing_to_draw_is_said_and_no_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    with pytest.raises(ConfigError, match="no rows yet"):
        plot_curve([], path)
    with pytest.raises(ConfigError, match="no points"):
        plot_pareto([ParetoPoint("learned", 0.8, math.nan)], path, "cost")
    with pytest.raises(ConfigError, match="no layers"):
        plot_action_rates([], ACTIONS, path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rates", [[0.5, 0.5], [0.5, 0.4, 0.0], [1.5, -0.5, 0.0], [math.nan, 0.5, 0.5], []])
def test_rates_that_are_no_shares_are_refused(tmp_path: Path, rates: list[float]) -> None:
    with pytest.raises(ValueError, match="layer 1 has rates"):
        plot_action_rates([[0.2, 0.3, 0.5], rates], ACTIONS, tmp_path / "rates.png")


@needs_matplotlib
def test_a_place_that_cannot_be_written_is_named_and_an_old_plot_stays(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"curve\.png cannot be written"):
        plot_curve(CURVE, tmp_path / "none" / "curve.png")
    folder = tmp_path / "plot.png"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"plot\.png cannot be written"):
        plot_curve(CURVE, folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_importing_the_plots_imports_neither_matplotlib_nor_torch() -> None:
    code = (
        "import sys, dash_runtime.evaluation.plots as plots; plots.has_matplotlib();"
        "print([name for name in ('matplotlib', 'torch') if name in sys.modules])"
    )
    assert run_python(code) == "[]"


@needs_matplotlib
def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dash_runtime.evaluation.plots import plot_action_rates;"
        "plot_action_rates([[1.0]], ['FULL'], Path(sys.argv[1])); print('matplotlib.pyplot' in sys.modules)"
    )
    assert run_python(code, str(tmp_path / "rates.png")) == "False"


def test_without_matplotlib_a_plot_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path\n"
        "from dash_runtime.errors import ConfigError\n"
        "from dash_runtime.evaluation.plots import has_matplotlib, plot_action_rates\n"
        "try:\n"
        "    plot_action_rates([[1.0]], ['FULL'], Path(sys.argv[1]))\n"
        "except ConfigError as error:\n"
        "    print(has_matplotlib(), error)\n"
    )
    expected = "False plot: needs matplotlib: pip install 'dash-llm[train]'"
    assert run_python(code, str(tmp_path / "rates.png")) == expected
    assert list(tmp_path.iterdir()) == []
