"""Files that the command reads and writes: damaged ones, foreign ones, and places that are none."""

import json
from pathlib import Path

import pytest
import trace_samples as samples
from command_runs import Command
from fake_dash_server import FakeDashServer
from google.protobuf import json_format

from dash_client import InvalidArgumentError
from dash_client.trace.decision_trace_files import load_decisions

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")

ANSWER = {"text": "ab", "token_ids": [1, 2], "decisions": [["FULL", "SKIP"], ["FULL", "FULL"]]}
BAD_HEATMAPS: dict[str, str | bytes] = {
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
WHOLE = json_format.MessageToJson(samples.small()).encode()
BAD_TRACES: dict[str, str | bytes] = {
    "empty": b"",
    "truncated": WHOLE[: len(WHOLE) // 2],
    "not text": b"\x93\xff\x00" * 9,
    "a page": b"<!doctype html>\n<html>",
    "another object": b'{"a": 1}',
    "an empty object": b"{}",
    "a list": b"[1, 2]",
    "a number": b"7",
    "a name with control characters": b'{"\\u001b[2J": 1}',
    "a lone surrogate": b'{"requestId": "\\ud800"}',
    "deep": b"[" * 100_000,
    "a huge number": b'{"layerCount": ' + b"9" * 5_000 + b"}",
    "a negative number": WHOLE.replace(b'"layerCount": 4', b'"layerCount": -4'),
    "a wrong type": WHOLE.replace(b'"layerCount": 4', b'"layerCount": "four"'),
    "other layers": WHOLE.replace(b'"layerCount": 4', b'"layerCount": 5'),
    "more actions": WHOLE.replace(b'"actions": "', b'"actions": "BBBB'),
    "half a byte": WHOLE.replace(b'"actions": "', b'"actions": "B'),
}


BAD_FILES = {("heatmap --from bad.json", name): content for name, content in BAD_HEATMAPS.items()}
BAD_FILES |= {("trace bad.json", name): content for name, content in BAD_TRACES.items()}


@pytest.mark.parametrize(("line", "name"), BAD_FILES)
def test_a_damaged_or_foreign_file_is_one_line_that_names_it(
    server: FakeDashServer, tmp_path: Path, command: Command, line: str, name: str
) -> None:
    content = BAD_FILES[line, name]
    assert content != WHOLE
    (tmp_path / "bad.json").write_bytes(content.encode() if isinstance(content, str) else content)
    out, err = command(line, code=2)
    assert out == ""
    assert err.startswith("dash-client: bad.json: ")
    assert err.count("\n") == 1
    assert err.rstrip("\n").isprintable()
    assert not list(tmp_path.glob("*.html"))
    assert server.requests == []


def test_a_file_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)  # takes no room
    with pytest.raises(InvalidArgumentError, match="larger than 64 MiB"):
        load_decisions(path)


@pytest.mark.parametrize("line", ["trace r-1 --output", "trace r-1 --save", "heatmap x --quiet --png"])
def test_a_place_that_cannot_be_written_is_named(server: FakeDashServer, command: Command, line: str) -> None:
    if "--png" in line:
        pytest.importorskip("PIL")
    server.decisions["r-1"] = samples.small()
    place = str(Path("no", "such", "folder.png"))
    told = command(line, place, code=2).err
    assert told == f"dash-client: {place}: cannot be written: No such file or directory\n"
