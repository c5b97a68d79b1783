"""dash-client heatmap: lines in a terminal, pictures, and files of earlier answers."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from command_runs import Command, Terminal, run_command
from fake_dash_server import HELLO, FakeDashServer, delta, finished, started

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")

LINES = "               0\nHel            FFFF\n               F..F\nlo             F.4F\n"


def test_each_token_is_a_line_and_each_layer_a_column(server: FakeDashServer, command: Command) -> None:
    out, err = command("heatmap x --mode adaptive")
    # The second token has no text of its own: the third completes it.
    assert out == LINES
    assert ". skip, 3 int3, 4 int4, 8 int8, F full" in err
    assert "mean cost 0.750" in err
    assert server.requests[0].parameters.output.return_decisions
    assert command("heatmap x --quiet") == (LINES, "")


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


def test_a_model_cannot_steer_the_terminal_or_break_the_grid(server: FakeDashServer, command: Command) -> None:
    row = [4, 1, 2, 3]
    texts = ["a\nb\tc", "\x1b[2J", "日本語日本語日本語", "e\u0301" * 20, "x" * 40]
    server.script = [started(), *(delta(text, [1], row) for text in texts), finished(len(texts))]
    lines = command("heatmap x --quiet").out.splitlines()[1:]
    assert [line[-4:] for line in lines] == ["F.48"] * len(texts)
    assert lines[0].startswith("a\\nb\\tc ")
    assert lines[1].startswith("\ufffd[2J ")
    assert lines[2].startswith("日本語日本語日 ")  # two columns each
    assert lines[3].startswith("e\u0301" * 14 + " ")
    assert lines[4].startswith("x" * 14 + " ")


def test_json_is_what_from_reads(server: FakeDashServer, command: Command, tmp_path: Path) -> None:
    saved = command("heatmap x --json").out
    content = json.loads(saved)
    assert content["pieces"][2] == {"text": "lo", "token_count": 1}
    assert content["decisions"][2] == ["FULL", "SKIP", "INT4", "FULL"]
    (tmp_path / "kept.json").write_text(saved)
    server.stop()
    assert command("heatmap --from kept.json --quiet").out == LINES
    assert json.loads(command("heatmap --from kept.json --json").out) == content


def test_an_answer_of_generate_is_labelled_by_token_ids(
    server: FakeDashServer, tmp_path: Path, command: Command
) -> None:
    saved = command("generate x --json --show-depth").out
    (tmp_path / "answer.json").write_text(saved)
    lines = "               0\n10             FFFF\n11             F..F\n12             F.4F\n"
    assert command("heatmap --from answer.json --quiet").out == lines
    with run_command("heatmap", "--from", "-", "--quiet", stdin=subprocess.PIPE) as process:
        out, _ = process.communicate(saved, timeout=15)
    assert out == lines


@pytest.mark.parametrize("line", ["heatmap", "heatmap x --from kept.json", "heatmap --from no-such.json"])
def test_wrong_usage_exits_2(line: str, command: Command) -> None:
    assert command(line, code=2).err.count("\n") == 1


def test_a_picture_has_a_cell_for_each_token_and_layer(
    server: FakeDashServer, command: Command, tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image")
    command("heatmap x --png depth.png --quiet")
    assert "wrote same.png: 3 tokens, 4 layers" in command("heatmap x --json --png same.png").err
    assert (tmp_path / "depth.png").read_bytes() == (tmp_path / "same.png").read_bytes()
    with image.open(tmp_path / "depth.png") as picture:
        counts = {color: count for count, color in picture.getcolors(1 << 16)}
    cell = 15 * 15
    legend = 16 * 16
    assert counts[(240, 148, 58)] == 3 * cell + legend  # skip
    assert counts[(185, 214, 240)] == 1 * cell + legend  # int4
    assert counts[(107, 165, 217)] == legend  # int8
    assert counts[(35, 85, 143)] == 8 * cell + legend  # full


def test_a_long_answer_is_drawn_in_bands_up_to_a_limit(tmp_path: Path, command: Command) -> None:
    image = pytest.importorskip("PIL.Image")
    sizes = []
    for count in (64, 65, 2000):
        answer = {"text": "", "token_ids": [7] * count, "decisions": [["FULL"] * 4] * count}
        (tmp_path / "long.json").write_text(json.dumps(answer))
        told = command("heatmap --from long.json --png long.png").err
        with image.open(tmp_path / "long.png") as picture:
            sizes.append(picture.size)
    assert sizes[0][0] == sizes[1][0] == sizes[2][0]
    assert sizes[0][1] < sizes[1][1] < sizes[2][1]
    assert "1024 tokens, the first of 2000" in told


def test_a_server_that_sends_no_decisions_is_an_error(server: FakeDashServer, command: Command) -> None:
    server.script = [started(), delta("Hello", [1, 2]), finished(2)]
    assert "no decisions" in command("heatmap x --quiet", code=1).err
