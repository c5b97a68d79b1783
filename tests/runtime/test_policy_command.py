"""The `dash-policy` command from text to table, on a tiny model, and its messages for bad input."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors import safe_open

from dash_runtime.commands.cli import main
from dash_runtime.commands.costs import table_of
from dash_runtime.files.tensor_file import CHECKSUM
from tests.runtime.cost_samples import TRUE, measured
from tests.runtime.native_model import SIZES
from tests.runtime.support import policy_arguments
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.usefixtures("short_measurements")


@pytest.fixture(scope="module")
def common(tiny_folder: Path, text: Path) -> list[str]:
    return policy_arguments(tiny_folder, text)


@pytest.fixture(scope="module")
def fitted(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fits") / "mine"
    assert main(["fit", *common, "--out", str(out), "--ranks", "2", "4"]) == 0
    return out


@pytest.fixture(scope="module")
def train_arguments(common: list[str], fitted: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run that begins with what was fitted."""
    small = ["--rounds", "3", "--batches", "1", "--actions", "skip,full"]
    start = ["--compensation", str(fitted / "compensation.safetensors")]
    return ["train", *common, "--out", str(tmp_path_factory.mktemp("runs") / "mine"), *small, *start]


@pytest.fixture(scope="module")
def trained(train_arguments: list[str]) -> Path:
    assert main(train_arguments) == 0
    return Path(train_arguments[train_arguments.index("--out") + 1])


def contents(path: Path) -> str:
    """Returns the checksum of the file's contents, which does not depend on their order."""
    with safe_open(path, "pt") as file:
        return str(file.metadata()[CHECKSUM])


def test_a_run_leaves_policy_curve_and_plot_and_goes_on_where_it_was(
    trained: Path, train_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"policy.safetensors", "checkpoint.safetensors", "training.jsonl", "curve.json", "costs.json"} <= names
    rows = [json.loads(line) for line in (trained / "training.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    before = contents(trained / "policy.safetensors")
    assert main(train_arguments) == 0
    assert contents(trained / "policy.safetensors") == before
    assert main([*train_arguments, "--seed", "1"]) == 2
    assert "another run" in capsys.readouterr().err


def test_evaluation_shows_policy_and_controls_in_the_table_and_in_json(
    trained: Path, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"question": "Which?", "choices": ["this", "that one"], "answer": 1}\n')
    arguments = ["--policy", str(trained / "policy.safetensors"), "--budgets", "1.0,0.99", "--sequences", "4"]
    more = ["--refit-controls", "1", "--tasks", str(tasks), "--json", str(tmp_path / "rows.json")]
    assert main(["evaluate", *common, *arguments, *more]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    table = [row for row in rows if "divergence" in row]
    keys = {"name", "kind", "actions", "budget", "cost_share", "divergence", "agreement", "tokens", "dominated"}
    assert keys <= set(table[0])
    by_name = {row["name"]: row for row in table}
    for name in ("fixed-int4", "fixed-int8", "full-depth"):
        assert by_name[name]["kind"] == "fixed"
    for name, kind in (
        ("learned", "policy"),
        ("random, same rates", "random"),
        ("best plan of its actions", "static"),
        ("evenly spaced skips", "static"),
        ("early exit", "early_exit"),
    ):
        assert [row["kind"] for row in table if row["name"] == name] == [kind] * 2
    assert not by_name["full-depth"]["dominated"]
    accuracies = [row for row in rows if "metric" in row]
    assert [row["budget"] for row in accuracies[::2]] == [None, None, None, 1.0, 0.99]
    kinds = ["full_depth", "fixed", "fixed", "policy", "policy"]
    assert [row["kind"] for row in accuracies[::2]] == [row["kind"] for row in accuracies[1::2]] == kinds
    assert [row["changed"] for row in accuracies[:2]] == [None, None]
    assert all(0 <= row["changed"] <= 1 for row in accuracies[2:])
    for row in table:
        assert row["name"] in printed


def test_tasks_can_be_all_that_is_evaluated(
    trained: Path, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, questions = tmp_path / "words.txt", tmp_path / "questions.jsonl"
    words.write_text("".join(f"{'It says this of line ' * 5}{number}, and it is a line.\n" for number in range(3)))
    questions.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    arguments = ["evaluate", *common, "--policy", str(trained / "policy.safetensors"), "--no-table"]
    more = ["--budgets", "1.0", "--json", str(tmp_path / "rows.json")]
    assert main([*arguments, *more, "--last-words", str(words), "--tasks", str(questions)]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["metric"] for row in rows] == ["last_word", "exact_match"] * 4
    assert [row["count"] for row in rows] == [3, 1] * 4
    assert all((row["log_likelihood"] is None) == (row["metric"] == "exact_match") for row in rows)
    capsys.readouterr()
    assert main(arguments) == 2
    assert "no-table" in capsys.readouterr().err


def test_the_ladder_has_every_rung_and_its_last_low_rank_one_can_be_trained_from(fitted: Path, trained: Path) -> None:
    rungs = json.loads((fitted / "ladder.json").read_text())
    names = ["identity", "scale", "affine", "low rank 2", "low rank 4", "dense"]
    assert [rung["name"] for rung in rungs] == names
    with safe_open(trained / "policy.safetensors", "pt") as policy:
        assert policy.get_slice("compensation.down").get_shape()[1] == 4


def test_another_cost_table_is_used_if_it_fits_the_policy(
    trained: Path, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = json.loads((trained / "costs.json").read_text())
    own, other = tmp_path / "own.json", tmp_path / "other.json"
    own.write_text(json.dumps(costs | {"evaluation": 0.5}))
    other.write_text(json.dumps(costs | {"layer": {"FULL": costs["layer"]["FULL"]}}))
    out = tmp_path / "calibrated.safetensors"
    chosen = ["--policy", str(trained / "policy.safetensors"), "--out", str(out), "--sequences", "4"]
    arguments = ["calibrate", *common, *chosen, "--costs"]
    assert main([*arguments, str(own)]) == 0
    assert "calibrating: price 5 of 5, 4 sequences" in capsys.readouterr().err
    with safe_open(out, "pt") as file:
        assert "0.5" in json.dumps(file.metadata())
    assert main([*arguments, str(other)]) == 2
    assert "costs: do not fit learned" in capsys.readouterr().err


def test_calibrating_writes_another_file_with_its_own_budgets(trained: Path, common: list[str]) -> None:
    out = trained.parent / "calibrated.safetensors"
    arguments = ["--policy", str(trained / "policy.safetensors"), "--out", str(out), "--sequences", "4"]
    assert main(["calibrate", *common, *arguments]) == 0
    assert out.stat().st_size == pytest.approx((trained / "policy.safetensors").stat().st_size, rel=0.05)


@pytest.mark.long
def test_one_command_makes_weights_policy_table_and_card_and_makes_nothing_twice(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_model(tmp_path / "model", "llama", **SIZES)
    long = tmp_path / "text.txt"
    long.write_text(text.read_text() * 3)
    places = ["--data", str(long), "--device", "cpu", "--cache-folder", str(tmp_path / "cache")]
    out = tmp_path / "made"
    arguments = ["make", str(model), *places, "--out", str(out), "--rounds", "1", "--batches", "1"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "INT3 everywhere is" in first
    assert f"DASH_POLICY_FILE={out / 'policy.safetensors'}" in first
    card = (out / "README.md").read_text()
    assert "SKIP, INT3, INT4, INT8, FULL" in card
    assert re.search(r"^\| learned.* \| \d\.\d+ \| \d+\.\d+ \|$", card, re.MULTILINE)
    made = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("already") == 3
    assert {path.name: path.read_bytes() for path in out.iterdir()} == made


def test_a_search_shows_the_frontier_of_fixed_plans(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plans.json"
    assert main(["search", *common, "--sequences", "2", "--json", str(out)]) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert {"fixed-int4", "fixed-int8", "full-depth"} <= {plan["name"] for plan in found["plans"]}
    best = [plan for plan in found["plans"] if not plan["dominated"]]
    assert all(b["cost_share"] > a["cost_share"] and b["divergence"] < a["divergence"] for a, b in pairwise(best))
    assert all(plan["name"] in printed for plan in found["plans"])
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps(found["costs"]))
    again = ["--costs", str(costs), "--head", "FULL", "--sequences", "1"]
    assert main(["search", *common, *again]) == 0
    assert "INT8  " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train", "--out", "{tmp}/x", "--data", "{tmp}/nowhere.txt"], "data"),
        (["train", "--out", "{tmp}/x", "--data", "{tmp}/short.txt"], "data"),
        (["evaluate", "--policy", "{tmp}/nowhere.safetensors"], "nowhere.safetensors"),
        (["evaluate", "--policy", "{tmp}/broken.safetensors"], "broken.safetensors"),
        (["evaluate"], "none is shipped"),
        (["search", "--costs", "{tmp}/short.txt"], "no cost table"),
        (["search", "--prompt-tokens", "500"], "no sequence longer"),
        (["train", "--out", "{tmp}/x", "--compensation", "{tmp}/broken.safetensors"], "broken.safetensors"),
    ],
)
def test_unusable_input_is_named_in_one_line(
    command: list[str], words: str, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "broken.safetensors").write_bytes(b"not a tensor file")
    filled = [part.format(tmp=tmp_path) for part in command]
    assert main([filled[0], *common, *filled[1:]]) == 2
    *progress, line = capsys.readouterr().err.splitlines()
    assert all(re.fullmatch(r" *\d+ s  .+", own) for own in progress)
    assert line.startswith("dash-policy: ")
    assert words in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--actions", "skip"],
        ["--actions", "skip,none"],
        ["--iterations", "0"],
        ["--refit-steps", "-1"],
        ["--tail", "0"],
    ],
)
def test_options_out_of_range_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "--out", "nowhere", *arguments])
    assert end.value.code == 2
    assert arguments[0].lstrip("-").split("-")[0] in capsys.readouterr().err


def test_the_table_shows_cost_spread_and_age() -> None:
    lines = table_of(measured(TRUE), 1.0 + 2 * 86400 + 5).splitlines()
    rows = {line[:28].strip(): [float(part) for part in line[28:].split()] for line in lines[1:-1]}
    assert list(rows) == [
        "layer SKIP", "layer INT3", "layer INT4", "layer INT8", "layer FULL", "head INT8", "head FULL",
        "rest of a token", "policy evaluation",
    ]  # fmt: skip
    assert rows["layer FULL"] == [0.08, 0.0144]
    assert lines[-1] == "from 8 rounds, 1970-01-01 00:00 UTC, 2 days ago"
    served = replace(measured(TRUE), num_rounds=0)
    assert table_of(served, 1.0).splitlines()[-1] == "from served steps, 1970-01-01 00:00 UTC, less than a minute ago"


def test_costs_are_kept_until_they_are_measured_again(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["costs", "--model", str(tiny_folder), "--device", "cpu", "--cache-folder", str(tmp_path)]
    shown: list[str] = []
    for more in (*[[]] * 4, ["--measure"]):  # what was measured on a busy machine is measured again, once
        assert main([*arguments, *more]) == 0
        shown.append(capsys.readouterr().out)
    *_, kept, shown_again, measured_again = (text.splitlines()[:-1] for text in shown)
    assert kept == shown_again != measured_again
    assert "tiny" in kept[0] or "CPU" in kept[0]
