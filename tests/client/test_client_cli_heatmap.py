"""dash-client heatmap: lines in a terminal, pictures, and files of earlier answers."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from command_runs import Terminal, run_command
from fake_dash_server import HELLO, FakeDashServer, delta, finished, started

from dash_client.cli import main

LINES = "               0\nHel            FFFF\n               F..F\nlo             F.4F\n"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_each_token_is_a_line_and_each_layer_a_column(
    server: FakeDashServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["heatmap", "x", "--mode", "adaptive"]) == 0
    out, err = capsys.readouterr()
    # The second token has no text of its own: the third completes it.
    assert out == LINES
    assert ". skip, 4 int4, 8 int8, F full" in err
    assert "mean cost 0.750" in err
    assert server.requests[0].parameters.output.return_decisions
    assert main(["heatmap", "x", "--quiet"]) == 0
    assert capsys.readouterr() == (LINES, "")


def test_lines_come_as_the_tokens_do(server: FakeDashServer) -> None:
    server.script = [*HELLO[:2], server.wait]
    with run_command("heatmap", "x", "--quiet") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "               0\n"
        assert process.stdout.readline() == "Hel            FFFF\n"
    assert server.cancelled.wait(30)


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_gets_colours_unless_no_color_is_set(server: FakeDashServer, no_color: str) -> None:
    with Terminal("heatmap", "x", NO_COLOR=no_color, COLORTERM="truecolor") as terminal:
        assert terminal.wait() == 0
    assert ("\x1b[48;2;240;148;58;30m..\x1b[48;2;35;85;143;97mF\x1b[0m" in terminal.text) is (no_color == "")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", terminal.text).replace("\r\n", "\n")
    assert LINES in plain
    assert ("\x1b" in terminal.text) is (no_color == "")


def test_a_model_cannot_steer_the_terminal_or_break_the_grid(
    server: FakeDashServer, capsys: pytest.CaptureFixture[str]
) -> None:
    row = [4, 1, 2, 3]
    texts = ["a\nb\tc", "\x1b[2J", "日本語日本語日本語", "e\u0301" * 20, "x" * 40]
    server.script = [started(), *(delta(text, [1], row) for text in texts), finished(len(texts))]
    assert main(["heatmap", "x", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line[-4:] for line in lines] == ["F.48"] * len(texts)
    assert lines[0].startswith("a\\nb\\tc ")
    assert lines[1].startswith("\ufffd[2J ")
    assert lines[2].startswith("日本語日本語日 ")  # two columns each
    assert lines[3].startswith("e\u0301" * 14 + " ")
    assert lines[4].startswith("x" * 14 + " ")


def test_json_is_what_from_reads(server: FakeDashServer, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["heatmap", "x", "--json"]) == 0
    saved = capsys.readouterr().out
    content = json.loads(saved)
    assert content["pieces"][2] == {"text": "lo", "token_count": 1}
    assert content["decisions"][2] == ["FULL", "SKIP", "INT4", "FULL"]
    (tmp_path / "kept.json").write_text(saved)
    server.stop()
    assert main(["heatmap", "--from", "kept.json", "--quiet"]) == 0
    assert capsys.readouterr().out == LINES
    assert main(["heatmap", "--from", "kept.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == content


def test_an_answer_of_generate_is_labelled_by_token_ids(
    server: FakeDashServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["generate", "x", "--json", "--show-depth"]) == 0
    saved = capsys.readouterr().out
    (tmp_path / "answer.json").write_text(saved)
    assert main(["heatmap", "--from", "answer.json", "--quiet"]) == 0
    lines = "               0\n10             FFFF\n11             F..F\n12             F.4F\n"
    assert capsys.readouterr().out == lines
    with run_command("heatmap", "--from", "-", "--quiet", stdin=subprocess.PIPE) as process:
        out, _ = process.communicate(saved, timeout=15)
    assert out == lines


ANSWER = {"text": "ab", "token_ids": [1, 2], "decisions": [["FULL", "SKIP"], ["FULL", "FULL"]]}
BAD_FILES = {
    "nothing": "",
    "no JSON": "hello",
    "a list": "[]",
    "no decisions": json.dumps(ANSWER | {"decisions": None}),
    "none of them": json.dumps(ANSWER | {"decisions": []}),
    "an unknown action": json.dumps(ANSWER | {"decisions": [["FULL", "JUMP"]] * 2}),
    "an action that is no text": json.dumps(ANSWER | {"decisions": [[["FULL"], 4]] * 2}),
    "uneven rows": json.dumps(ANSWER | {"decisions": [["FULL"], ["FULL", "FULL"]]}),
    "other tokens": json.dumps(ANSWER | {"token_ids": [1]}),
    "tokens that are no numbers": json.dumps(ANSWER | {"token_ids": ["\x1b[2J", 2]}),
    "other pieces": json.dumps(ANSWER | {"pieces": [{"text": "ab", "token_count": 3}]}),
    "negative pieces": json.dumps(ANSWER | {"pieces": [{"text": "a", "token_count": -1}]}),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_damaged_or_foreign_file_is_one_line_that_names_it(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert main(["heatmap", "--from", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"dash-client: {path}: ")
    assert err.count("\n") == 1
    assert err.rstrip("\n").isprintable()


@pytest.mark.parametrize("line", ["heatmap", "heatmap x --from kept.json", "heatmap --from no-such.json"])
def test_wrong_usage_exits_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_picture_has_a_cell_for_each_token_and_layer(
    server: FakeDashServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image")
    assert main(["heatmap", "x", "--png", "depth.png", "--quiet"]) == 0
    assert main(["heatmap", "x", "--json", "--png", "same.png"]) == 0
    assert "wrote same.png: 3 tokens, 4 layers" in capsys.readouterr().err
    assert (tmp_path / "depth.png").read_bytes() == (tmp_path / "same.png").read_bytes()
    with image.open(tmp_path / "depth.png") as picture:
        counts = {color: count for count, color in picture.getcolors(1 << 16)}
    cell = 15 * 15
    legend = 16 * 16
    assert counts[(240, 148, 58)] == 3 * cell + legend  # skip
    assert counts[(185, 214, 240)] == 1 * cell + legend  # int4
    assert counts[(107, 165, 217)] == legend  # int8
    assert counts[(35, 85, 143)] == 8 * cell + legend  # full


def test_a_long_answer_is_drawn_in_bands_up_to_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    sizes = []
    for count in (64, 65, 2000):
        answer = {"text": "", "token_ids": [7] * count, "decisions": [["FULL"] * 30] * count}
        (tmp_path / "long.json").write_text(json.dumps(answer))
        assert main(["heatmap", "--from", str(tmp_path / "long.json"), "--png", str(tmp_path / "long.png")]) == 0
        with image.open(tmp_path / "long.png") as picture:
            sizes.append(picture.size)
    assert sizes[0][0] == sizes[1][0] == sizes[2][0]
    assert sizes[0][1] < sizes[1][1] < sizes[2][1]
    assert "1024 tokens, the first of 2000" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_named(server: FakeDashServer, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    place = os.path.join("no", "such", "folder.png")
    assert main(["heatmap", "x", "--png", place, "--quiet"]) == 2
    assert capsys.readouterr().err == f"dash-client: {place}: cannot be written: No such file or directory\n"


def test_a_server_that_sends_no_decisions_is_an_error(
    server: FakeDashServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = [started(), delta("Hello", [1, 2]), finished(2)]
    assert main(["heatmap", "x", "--quiet"]) == 1
    assert "no decisions" in capsys.readouterr().err
