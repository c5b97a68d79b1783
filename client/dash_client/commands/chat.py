"""`dash-client chat`: a conversation, at a terminal or from a pipe. `Conversation` holds its history."""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterable, Iterator

from dash_client.client import DashClient
from dash_client.commands.answer_printer import AnswerPrinter, say_note
from dash_client.commands.client_arguments import connect, generation_options
from dash_client.commands.conversation import Conversation
from dash_client.commands.exit_codes import ExitCode
from dash_client.commands.interrupts import Interrupts
from dash_client.commands.output import print_json, report_error, say
from dash_client.commands.prompts import read_lines
from dash_client.errors import DashError, invalid_argument
from dash_client.streams import GenerationStream
from dash_client.types import StreamDelta

HELP = """\
/system TEXT  set the system message; without TEXT, remove it
/reset        forget the conversation; the system message stays
/stats        tokens, speed and depth of this session
/help         this list
/quit         end the session, as Ctrl-D does
//TEXT        send a message that begins with a slash
Ctrl-C cancels an answer; twice at the prompt, it ends the session. A cancelled answer stays in the conversation as far
as it came; one that failed does not, and neither does its message."""

_PROMPT = "> "


def run(arguments: argparse.Namespace) -> ExitCode:
    """Runs the command."""
    with connect(arguments) as client:
        interrupts = Interrupts()
        session = _Session(client, arguments, interrupts)
        if sys.stdin is not None and sys.stdin.isatty():
            return _at_terminal(session, interrupts, client, arguments)
        # Without a terminal, Ctrl-C ends the program, as in other commands.
        for line in read_lines():
            if not session.take(line):
                break
    return ExitCode.OK


def _at_terminal(
    session: "_Session", interrupts: Interrupts, client: DashClient, arguments: argparse.Namespace
) -> ExitCode:
    # Checks the server before the first prompt, so that nobody types a message in vain.
    model = client.model_info().name
    if not arguments.quiet:
        say(f"{model} at {client.target}; /help for help, Ctrl-D to end")
    with contextlib.suppress(ImportError):
        # The import gives `input` a history and line editing.
        import readline  # noqa: F401
    presses = 0
    with interrupts:
        while presses < 2:
            try:
                line = interrupts.while_reading(_read_line)
                presses = 0
                if not session.take(line):
                    return ExitCode.OK
            except EOFError:
                print(file=sys.stderr)
                return ExitCode.OK
            except KeyboardInterrupt:
                presses += 1
                print(file=sys.stderr)
                if presses == 1:
                    say("(Ctrl-C again, or Ctrl-D, ends the session)")
            except DashError as error:
                # An error with one message does not end the session.
                report_error(error, json=arguments.json)
    return ExitCode.INTERRUPTED


def _read_line() -> str:
    if sys.stdout.isatty():
        try:
            return input(_PROMPT)
        except UnicodeDecodeError:
            raise invalid_argument("the message", "is no text in the terminal's encoding") from None
    # `input` would write its prompt to stdout, among the answers.
    print(_PROMPT, end="", file=sys.stderr, flush=True)
    for line in read_lines():
        return line
    raise EOFError


class _Session:
    """Answers messages and runs slash commands, one line at a time."""

    def __init__(self, client: DashClient, arguments: argparse.Namespace, interrupts: Interrupts) -> None:
        self._interrupts = interrupts
        self._client = client
        self._arguments = arguments
        self._options = generation_options(arguments)
        self._options["return_decisions"] = True if arguments.show_depth else None
        self._conversation = Conversation(arguments.system)
        self._printer: AnswerPrinter | None = None

    def take(self, line: str) -> bool:
        """Handles one line; returns False if it ends the session.

        Raises:
            DashError: the answer failed, or the command does not exist.
        """
        message = line.strip()
        if message.startswith("//"):
            self._answer(message[1:])
        elif message.startswith("/"):
            return self._run_command(message)
        elif message:
            self._answer(message)
        return True

    def _run_command(self, message: str) -> bool:
        name, _, text = message.partition(" ")
        match name:
            case "/quit":
                return False
            case "/help":
                say(HELP)
            case "/stats":
                say(self._conversation.describe())
            case "/reset":
                self._conversation.reset()
                say("(the conversation is forgotten)")
            case "/system":
                self._conversation.system = text.strip() or None
                say("(the system message is set)" if text.strip() else "(there is no system message)")
            case _:
                raise invalid_argument(name, "there is no such command; /help lists them, // sends a slash")
        return True

    def _answer(self, message: str) -> None:
        prompt = self._conversation.prompt_with(message)
        pieces: list[str] = []
        sent = time.monotonic()
        with self._interrupts.cancelling() as set_answer, self._client.stream(prompt, **self._options) as stream:
            set_answer(stream)
            try:
                self._show(stream, self._noted(stream, pieces, sent))
                answer = stream.final()
            except DashError:
                if not self._interrupts.was_pressed:
                    raise
                self._conversation.add_cut(message, "".join(pieces))
                say("(cancelled)")
                return
        self._conversation.add(message, answer)
        if self._arguments.json:
            print_json(answer)

    def _noted(self, deltas: Iterable[StreamDelta], pieces: list[str], sent: float) -> Iterator[StreamDelta]:
        for delta in deltas:
            if delta.text and not pieces:
                self._conversation.seconds_to_first_token = time.monotonic() - sent
            pieces.append(delta.text)
            yield delta

    def _show(self, stream: GenerationStream, deltas: Iterable[StreamDelta]) -> None:
        if self._arguments.json:
            for _ in deltas:
                pass
            return
        if self._printer is None:
            if not self._arguments.quiet:
                say_note(stream.started)
            self._printer = AnswerPrinter(self._arguments, stream.started.layer_count)
        self._printer.print(deltas)
