"""dash-client chat: a conversation from a pipe, and a session at a real terminal."""

import json
import os
import subprocess
import time

import grpc
import pytest
from command_runs import Terminal, run_command
from fake_dash_server import HELLO, NOTE, FakeDashServer, delta, fail, finished, started


def chat(typed: str, *arguments: str, code: int = 0) -> tuple[str, str]:
    """Runs a session with this text from a pipe; returns its standard output and error."""
    with run_command("chat", *arguments, stdin=subprocess.PIPE) as process:
        out, err = process.communicate(typed, timeout=20)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


def conversations(server: FakeDashServer) -> list[list[tuple[str, str]]]:
    """Returns the messages of each requested generation."""
    chats = [request.parameters.chat.messages for request in server.requests if hasattr(request, "parameters")]
    return [[(message.role, message.content) for message in messages] for messages in chats]


def say(terminal: Terminal, keys: str, expected: str = "") -> None:
    """Waits for the prompt, types, and waits for what comes of it."""
    terminal.read_until("> ")
    terminal.type(keys)
    terminal.read_until(expected)


def test_each_line_of_a_pipe_is_a_message_with_the_history_before_it(server: FakeDashServer) -> None:
    out, err = chat("one\n\n  two  \nthree")
    assert out == "Hello\nHello\nHello\n"
    first = [("user", "one")]
    second = [*first, ("assistant", "Hello"), ("user", "two")]
    third = [*second, ("assistant", "Hello"), ("user", "three")]
    assert conversations(server) == [first, second, third]
    assert err.count(NOTE) == 1


def test_an_empty_pipe_is_no_error_and_asks_for_nothing(server: FakeDashServer) -> None:
    assert chat("") == ("", "")
    assert server.requests == []


def test_json_is_one_object_per_answer(server: FakeDashServer) -> None:
    out, err = chat("one\ntwo\n", "--json")
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["Hello", "Hello"]
    assert err == ""


def test_options_go_with_every_message(server: FakeDashServer) -> None:
    out, _ = chat("one\ntwo\n", "--temperature", "0.5", "--show-depth", "--color", "never", "--max-new-tokens", "7")
    assert out == "Hel[4]lo[2.5]\nHel[4]lo[2.5]\n"
    for request in server.requests:
        assert request.parameters.sampling.temperature == 0.5
        assert request.parameters.stopping.max_new_tokens == 7
        assert request.parameters.output.return_decisions


def test_the_system_message_comes_first_and_outlives_a_reset(server: FakeDashServer) -> None:
    chat("one\n/reset\ntwo\n/system Be kind.\nthree\n/system\nfour\n", "--system", "Be brief.")
    brief, kind = ("system", "Be brief."), ("system", "Be kind.")
    answered = [("user", "two"), ("assistant", "Hello")]
    assert conversations(server) == [
        [brief, ("user", "one")],
        [brief, ("user", "two")],
        [kind, *answered, ("user", "three")],
        [*answered, ("user", "three"), ("assistant", "Hello"), ("user", "four")],
    ]


def test_quit_ends_it_and_two_slashes_send_one(server: FakeDashServer) -> None:
    out, err = chat("//etc is what?\n/help\n/stats\n/quit\nnever sent\n", "--quiet")
    assert out == "Hello\n"
    assert conversations(server) == [[("user", "/etc is what?")]]
    assert "/reset" in err
    assert "20.0 tokens/s" in err
    assert "mean cost         0.750" in err


def test_an_unknown_command_in_a_pipe_ends_it_and_is_not_sent(server: FakeDashServer) -> None:
    out, err = chat("/rest\nhello\n", code=2)
    assert out == ""
    assert err.startswith("dash-client: /rest: there is no such command")
    assert server.requests == []


def test_an_error_in_a_pipe_ends_it_with_its_exit_code(server: FakeDashServer) -> None:
    server.script = [*HELLO[:2], fail(grpc.StatusCode.INTERNAL, "it broke")]
    out, err = chat("one\ntwo\n", "--quiet", code=1)
    assert out == "Hel\n"
    assert "it broke" in err
    assert len(conversations(server)) == 1


def test_no_server_exits_3_before_a_message_is_typed(gone: FakeDashServer) -> None:
    with Terminal("chat", "--target", gone.target) as terminal:
        assert terminal.wait() == 3
    assert "make serve" in terminal.text
    assert "> " not in terminal.text


def test_text_that_is_not_utf8_is_one_line_and_exits_2(server: FakeDashServer) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    with run_command("chat", stdin=subprocess.PIPE, text=False, env=environment) as process:
        out, err = process.communicate(b"caf\xe9\n", timeout=20)
    assert process.returncode == 2
    assert out == b""
    assert err.startswith(b"dash-client: standard input: is not utf-8 text")


def test_ctrl_c_cancels_the_answer_and_not_the_session(server: FakeDashServer) -> None:
    server.script = [*HELLO[:2], server.wait]
    with Terminal("chat") as terminal:
        terminal.read_until("fake-model at ")
        say(terminal, "first\n", "Hel")
        terminal.press_ctrl_c()
        terminal.read_until("(cancelled)")
        terminal.read_until("> ")
        assert server.cancelled.wait(30)
        server.script = HELLO
        terminal.type("second\n")
        terminal.read_until("Hello")
        say(terminal, "\x04")
        assert terminal.wait() == 0
    # The part of the answer that the user has read is in the conversation.
    assert conversations(server)[1] == [("user", "first"), ("assistant", "Hel"), ("user", "second")]


def test_an_answer_cancelled_before_its_first_word_leaves_no_trace(server: FakeDashServer) -> None:
    server.script = [server.wait]
    with Terminal("chat") as terminal:
        say(terminal, "first\n")
        while len(server.requests) < 2:
            time.sleep(0.01)
        terminal.press_ctrl_c()
        terminal.read_until("(cancelled)")
        server.script = HELLO
        say(terminal, "second\n/quit\n")
        assert terminal.wait() == 0
    assert conversations(server)[1] == [("user", "second")]


def test_an_error_at_a_terminal_is_told_and_the_session_goes_on(server: FakeDashServer) -> None:
    server.script = [*HELLO[:2], fail(grpc.StatusCode.INTERNAL, "it broke")]
    with Terminal("chat") as terminal:
        say(terminal, "first\n", "it broke")
        server.script = HELLO
        say(terminal, "/nonsense\nsecond\n/quit\n")
        assert terminal.wait() == 0
    assert "no such command" in terminal.text
    assert conversations(server)[1] == [("user", "second")]


def test_a_second_ctrl_c_at_the_prompt_ends_the_session(server: FakeDashServer) -> None:
    with Terminal("chat") as terminal:
        say(terminal, "half a mess", "half a mess")
        terminal.press_ctrl_c()
        terminal.read_until("Ctrl-C again")
        say(terminal, "hello\n", "Hello")
        terminal.read_until("> ")
        # After a message in between, counting starts from one again.
        terminal.press_ctrl_c()
        terminal.read_until("Ctrl-C again")
        terminal.read_until("> ")
        terminal.press_ctrl_c()
        assert terminal.wait() == 130
    assert conversations(server) == [[("user", "hello")]]
    assert "Traceback" not in terminal.text


def test_a_model_cannot_steer_the_terminal(server: FakeDashServer) -> None:
    server.script = [started(), delta("a\x1b]0;title\x07b\x9b2J", [1]), finished(1)]
    with Terminal("chat", "--quiet") as terminal:
        say(terminal, "hello\n", "b\ufffd2J")
        terminal.type("/quit\n")
        assert terminal.wait() == 0
    assert "\x1b]" not in terminal.text
    assert "\x9b" not in terminal.text


def test_line_editing_recalls_earlier_messages(server: FakeDashServer) -> None:
    pytest.importorskip("readline")
    with Terminal("chat") as terminal:
        say(terminal, "remember me\n", "Hello")
        terminal.read_until("> ")
        terminal.type("\x10\n")  # Ctrl-P: the previous message
        terminal.read_until("Hello")
        say(terminal, "\x04")
        assert terminal.wait() == 0
    assert [messages[-1] for messages in conversations(server)] == [("user", "remember me")] * 2
