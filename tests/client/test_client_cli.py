"""The dash-client command: its output, its error output and its exit codes."""

import json
import signal
import subprocess
import sys

import grpc
import pytest
from command_runs import Command, Terminal, run_command
from fake_dash_server import HELLO, NOTE, FakeDashServer, delta, fail, finished, started

from dash_api.v1 import common_pb2
from dash_client.cli import main


def test_generate_streams_text_and_sums_up_on_stderr(server: FakeDashServer, command: Command) -> None:
    out, err = command("generate", "Say hello")
    assert out == "Hello\n"
    assert NOTE in err
    assert "20.0 tokens/s" in err
    assert "SKIP 2.0, FULL 2.0" in err
    assert "mean cost 0.750" in err
    messages = server.requests[0].parameters.chat.messages
    assert [(message.role, message.content) for message in messages] == [("user", "Say hello")]


def test_quiet_prints_the_text_alone(server: FakeDashServer, command: Command) -> None:
    assert command("generate x --quiet") == ("Hello\n", "")


def test_options_that_are_not_given_are_not_sent(server: FakeDashServer, command: Command) -> None:
    command("generate x --raw")
    parameters = server.requests[0].parameters
    assert parameters.text == "x"
    assert [field.name for field, _ in parameters.ListFields()] == ["text"]


def test_options_are_sent(server: FakeDashServer, command: Command) -> None:
    line = "generate x --temperature 0 --top-p 0.9 --top-k 0 --seed 0 --max-new-tokens 5 --stop a --stop b"
    command(line, "--mode", "adaptive", "--budget", "0.7")
    command("generate x --fixed-action int8")
    adaptive, fixed = (request.parameters for request in server.requests)
    for name in ("temperature", "top_k", "seed"):
        assert adaptive.sampling.HasField(name)
        assert getattr(adaptive.sampling, name) == 0
    assert list(adaptive.stopping.stop_strings) == ["a", "b"]
    assert adaptive.skip.compute_budget == 0.7
    assert fixed.skip.mode == common_pb2.MODE_FIXED
    assert fixed.skip.fixed_action == common_pb2.ACTION_INT8


def test_a_dash_reads_the_prompt_from_stdin(server: FakeDashServer) -> None:
    with run_command("generate", "-", "--raw", stdin=subprocess.PIPE) as process:
        out, _ = process.communicate("from a pipe", timeout=10)
    assert out == "Hello\n"
    assert server.requests[0].parameters.text == "from a pipe"


def test_json_is_one_object_with_everything(server: FakeDashServer, command: Command) -> None:
    out, err = command("generate x --json --show-depth")
    answer = json.loads(out)
    assert answer["text"] == "Hello"
    assert answer["finish_reason"] == "length"
    assert answer["decisions"][2] == ["FULL", "SKIP", "INT4", "FULL"]
    assert answer["depth"]["action_counts"] == {"SKIP": 4, "FULL": 4}
    assert answer["started"]["policy"] == "random"
    assert err == ""


def test_show_depth_annotates_where_there_are_no_colours(server: FakeDashServer, command: Command) -> None:
    out, err = command("generate x --show-depth")
    # "lo" completes two tokens, of 2 and 3 layers.
    assert out == "Hel[4]lo[2.5]\n"
    assert "of 4" in err
    assert server.requests[0].parameters.output.return_decisions


def test_show_depth_colours_when_told_to(
    server: FakeDashServer, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLORTERM", "truecolor")
    out, err = command("generate x --show-depth --color always")
    assert out.startswith("\x1b[48;2;253;231;37;30mHel\x1b[0m\x1b[48;2;")
    assert out.endswith("lo\x1b[0m\n")
    assert "\x1b[48;2;" in err


@pytest.mark.parametrize(("no_color", "expected"), [("", "\x1b[48;5;220;30mHel\x1b[0m"), ("1", "Hel[4]")])
def test_a_terminal_gets_colours_unless_no_color_is_set(server: FakeDashServer, no_color: str, expected: str) -> None:
    with Terminal("generate", "x", "--show-depth", NO_COLOR=no_color, COLORTERM="") as terminal:
        assert terminal.wait() == 0
    assert expected in terminal.text


def test_a_model_cannot_steer_the_terminal(server: FakeDashServer) -> None:
    server.script = [started(), delta("a\x1b]0;title\x07b", [1]), finished(1)]
    with Terminal("generate", "x") as terminal:
        assert terminal.wait() == 0
    assert "\x1b" not in terminal.text


def test_ctrl_c_cancels_on_the_server_and_exits_130(server: FakeDashServer) -> None:
    server.script = [*HELLO[:2], server.wait]
    with run_command("generate", "x") as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == "Hel"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert server.cancelled.wait(30)
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("line", "is_cancelled"),
    [
        ("generate x --quiet", True),
        ("heatmap x --quiet", True),
        ("chat --quiet", True),
        ("bench --requests 1", False),
        ("completion bash", False),
    ],
)
def test_a_closed_output_ends_a_command_with_141_and_cancels_on_the_server(
    server: FakeDashServer, line: str, is_cancelled: bool
) -> None:
    if is_cancelled:
        server.script = [*HELLO[:2], *[HELLO[2]] * 2000, server.wait]
    with run_command(*line.split(), stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write("a message of a chat\n")
        process.stdin.flush()
        assert process.wait(15) == 141
        assert process.stderr.read() == ""
    assert not is_cancelled or server.cancelled.wait(30)


@pytest.mark.parametrize(
    ("package", "line", "expected"),
    [("shtab", "completion bash", 2), ("PIL", "heatmap x --png depth.png", 2), ("PIL", "heatmap x", 0)],
)
def test_a_missing_package_is_one_line_that_says_what_to_install_before_anything_is_generated(
    server: FakeDashServer, package: str, line: str, expected: int
) -> None:
    code = f"import sys; sys.modules['{package}'] = None; from dash_client.cli import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True)
    assert result.returncode == expected
    if expected:
        assert (result.stdout, result.stderr.count("\n"), server.requests) == ("", 1, [])
        assert "pip install 'dash-llm[cli]'" in result.stderr


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.INTERNAL, 1),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 1),
        (grpc.StatusCode.INVALID_ARGUMENT, 2),
        (grpc.StatusCode.UNAVAILABLE, 3),
        (grpc.StatusCode.UNAUTHENTICATED, 4),
    ],
)
def test_server_errors_are_one_line_and_an_exit_code(
    server: FakeDashServer, command: Command, code: grpc.StatusCode, expected: int
) -> None:
    server.script = [fail(code, "it went wrong", pause_ms=-1)]
    out, err = command("generate x", code=expected)
    assert out == ""
    assert err.splitlines()[0].startswith("dash-client: ")
    assert "it went wrong" in err
    assert "Traceback" not in err
    error = json.loads(command("generate x --json", code=expected).out)["error"]
    assert error["code"] == code.name
    assert "it went wrong" in error["message"]


def test_a_timeout_exits_1(server: FakeDashServer, command: Command) -> None:
    server.script = [*HELLO[:2], server.wait]
    assert "raise the timeout" in command("generate x --timeout 0.2", code=1).err


def test_no_server_exits_3(gone: FakeDashServer, command: Command) -> None:
    for line in ("generate x", "info", "health", "health --wait 0.2", "trace r-1", "bench"):
        assert "make serve" in command(line, "--target", gone.target, code=3).err


@pytest.mark.parametrize(
    "line",
    [
        "",
        "generate",
        "generate x --mode fast",
        "generate x --top-k many",
        "generate x --chat --raw",
        "generate x --max 3",  # no abbreviations
        "bench --requests 0",
        "bench --concurrency many",
        "bench --warm-up -1",
        "completion",
        "completion tcsh",
        "health --token secret",
        "chat hello",
    ],
)
def test_wrong_usage_exits_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "--help" in err
    assert err.count("\n") == 1
    assert "secret" not in err


def test_help_documents_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    commands = ("generate", "chat", "heatmap", "trace", "audit", "bench", "info", "health", "tokenize", "completion")
    for line in ("--help", *(f"{command} --help" for command in commands)):
        with pytest.raises(SystemExit) as caught:
            main(line.split())
        assert caught.value.code == 0
        assert "130  interrupted" in capsys.readouterr().out


def test_info_tells_the_model_and_its_policy(server: FakeDashServer, command: Command) -> None:
    out = command("info").out
    assert "fake-model" in out
    assert "SKIP, INT4, FULL" in out
    assert NOTE in out
    facts = json.loads(command("info --json").out)
    assert facts["policy"]["action_costs"] == {"SKIP": 0.1, "FULL": 1.0}


def test_audit_tells_how_an_answer_compares_with_full_depth(server: FakeDashServer, command: Command) -> None:
    assert "agreement                 0.7500\n" in command("audit audited").out
    assert json.loads(command("audit audited --json").out)["divergence"] == 0.125
    assert "no audit" in command("audit another", code=1).err


def test_health_is_an_exit_code(server: FakeDashServer, command: Command) -> None:
    assert command("health").out == "SERVING\n"
    server.set_serving(False)
    assert command("health", code=3).out == "NOT_SERVING\n"
    server.loading = "compiling 7 of 26"
    assert command("health", code=3).out == "NOT_SERVING: compiling 7 of 26\n"
    server.set_serving(True)
    assert json.loads(command("health --json").out) == {"target": server.target, "status": "SERVING"}


def test_tokenize_sends_what_generate_would(server: FakeDashServer, command: Command) -> None:
    assert command("tokenize Hello").out == "1 2 3\n"
    assert json.loads(command("tokenize Hello --raw --json").out) == {"token_ids": [1, 2, 3]}
    chat, raw = server.requests
    assert chat.chat.messages[0].content == "Hello"
    assert raw.text == "Hello"


def test_json_cannot_steer_a_terminal_and_keeps_every_character(server: FakeDashServer, command: Command) -> None:
    text = "a\x1b]0;title\x07b\x9b2J\x7fé"
    server.script = [started(), delta(text, [1]), finished(1)]
    out = command("generate x --json").out
    assert out.rstrip("\n").isprintable()
    assert "é" in out
    assert json.loads(out)["text"] == text


def test_what_a_server_says_of_itself_cannot_steer_the_terminal(server: FakeDashServer, command: Command) -> None:
    server.script = [started(policy_note="a\x1b[2Jb"), fail(grpc.StatusCode.INTERNAL, "c\x1b[2Jd")]
    err = command("generate x", code=1).err
    assert "a\ufffd[2Jb" in err
    assert "c\ufffd[2Jd" in err


def test_the_command_starts_without_what_only_some_commands_need() -> None:
    heavy = ("asyncio", "readline", "PIL", "shtab", "numpy", "matplotlib")
    code = (
        "import sys, dash_client\n"
        "before = set(sys.modules)\n"
        "import dash_client.cli\n"
        "dash_client.cli.parser()\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = result.stdout.split()
    assert not {name.partition(".")[0] for name in loaded} & set(heavy)
    ours = {name.rpartition(".")[2] for name in loaded if name.startswith("dash_client.commands.")}
    assert ours == {"arguments", "exit_codes", "output"}
