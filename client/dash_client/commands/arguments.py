"""Defines the command line of `dash-client`: commands, options and help. Imports no command."""

import argparse
import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from dash_client.commands.exit_codes import EXPLANATION, ExitCode
from dash_client.constraint import LarkGrammar
from dash_client.types import Action, Mode, Priority

_CHAT = """\
Talks to the model: one message per line, the answers as they come, with the conversation so far. Ctrl-C cancels the
answer and keeps the session; Ctrl-D, or Ctrl-C twice at the prompt, ends it. Type /help for more. From a pipe, each
line is a message.
"""

_HEATMAP = """\
Shows what was done with each layer for each token of an answer: a line for each token as it comes, a column for each
layer, coloured or lettered by action.
"""

_TRACE = """\
Writes a page that shows what was decided for each token and layer, and when: open it in a browser. The server answers
only the caller that made the request, and only for its latest ones; `generate` prints a request's id when it is done.
"""

_AUDIT = """\
Prints how one of your latest answers in mode adaptive compares with full depth. The server compares them when nothing
else is to do, so this may take its time on a busy one.
"""

_COMPLETION = """\
Prints a script that completes commands and options in a shell: source it, or put it where the shell looks for such.
"""

_NO_TOKEN = """\
a token on the command line can be read by every user of this machine while the command runs; put it in DASH_TOKEN, \
or in a file and name that with --token-file"""


# An option of the library's own: None unless it is given, so that the library's default holds.
_FLAG: dict[str, Any] = {"action": "store_const", "const": True}


class _Parser(argparse.ArgumentParser):
    """Explains the exit codes under every command, and takes no abbreviated options."""

    def __init__(self, **kwargs: Any) -> None:
        # A new option could change the meaning of an abbreviation, or make it ambiguous.
        super().__init__(allow_abbrev=False, **kwargs)
        self.epilog = EXPLANATION
        self.formatter_class = argparse.RawDescriptionHelpFormatter

    def error(self, message: str) -> NoReturn:
        self.exit(ExitCode.USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _RefuseToken(argparse.Action):
    """Refuses a token on the command line, without repeating it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        parser.error(_NO_TOKEN)


def parser() -> argparse.ArgumentParser:
    """Returns the parser. The parsed arguments have `load()`, which imports the command and returns its function."""
    root = _Parser(prog="dash-client", description="Talks to a dash server.")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: str, brief: str, description: str | None = None) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=brief, description=description or brief)
        command.set_defaults(load=lambda: _load(function))
        return command

    _add_generate(add("generate", "generate.run", "generate text"))
    _add_chat(add("chat", "chat.run", "an interactive conversation", _CHAT))
    _add_heatmap(add("heatmap", "heatmap.run", "tokens and layers of an answer, by what was done", _HEATMAP))
    _add_trace(add("trace", "trace.run", "a page of a request's decisions", _TRACE))
    audit = add("audit", "facts.run_audit", "how an answer compares with full depth", _AUDIT)
    audit.add_argument("request_id", metavar="REQUEST_ID", help="which request; `generate` prints its id")
    _add_connection_and_output(audit)
    _add_bench(add("bench", "bench.run", "measure speed and latency under load"))
    info = add("info", "facts.run_info", "the model, its limits, and a policy")
    info.add_argument("--policy", metavar="NAME", help="which policy (default: the server's default)")
    _add_connection_and_output(info)
    health = add("health", "facts.run_health", "whether the server is serving")
    health.add_argument("--wait", type=float, metavar="SECONDS", help="wait this long for it to serve")
    _add_connection_and_output(health)
    tokenize = add("tokenize", "facts.run_tokenize", "the token ids of a prompt, as generate would send it")
    _add_prompt(tokenize)
    _add_connection_and_output(tokenize)
    completion = add("completion", "completion.run", "a completion script for a shell", _COMPLETION)
    completion.add_argument("shell", choices=["bash", "zsh", "fish"])
    completion.set_defaults(json=False)
    return root


def _load(function: str) -> Callable[[argparse.Namespace], ExitCode]:
    module, _, name = function.partition(".")
    run: Callable[[argparse.Namespace], ExitCode] = getattr(import_module(f"dash_client.commands.{module}"), name)
    return run


def _add_generate(command: argparse.ArgumentParser) -> None:
    _add_prompt(command)
    depth = _add_depth(command)
    _add_show_depth(depth)
    depth.add_argument("--trace", **_FLAG, help="trace the decisions of this request")
    _add_sampling(command)
    quiet = "no note and no summary on standard error"
    _add_connection_and_output(command, "print one JSON object when it is complete", quiet)


def _add_chat(command: argparse.ArgumentParser) -> None:
    command.add_argument("--system", metavar="TEXT", help="the system message that the conversation begins with")
    _add_show_depth(_add_depth(command))
    _add_sampling(command)
    quiet = "no greeting and no notes on standard error"
    _add_connection_and_output(command, "print one JSON object per answer, each on a line", quiet)


def _add_heatmap(command: argparse.ArgumentParser) -> None:
    _add_prompt(command, nargs="?")
    command.add_argument(
        "--from", dest="file", type=Path, metavar="FILE", help="show what heatmap --json printed before; no server"
    )
    command.add_argument("--png", type=Path, metavar="FILE", help="also write a picture; needs Pillow (dash-llm[cli])")
    _add_color(_add_depth(command))
    _add_sampling(command)
    quiet = "no note, legend and summary on standard error"
    _add_connection_and_output(command, "print one JSON object when it is complete, for --from", quiet)


def _add_trace(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="REQUEST_ID_OR_FILE", help="which request, or a file that --save wrote")
    command.add_argument("--output", type=Path, metavar="PAGE", help="the page (default: trace-REQUEST_ID.html)")
    command.add_argument("--save", type=Path, metavar="FILE", help="also keep what was recorded, as JSON")
    _add_connection_and_output(command, "print where the files are as one JSON object")


def _add_bench(command: argparse.ArgumentParser) -> None:
    command.add_argument("--requests", type=_count, default=32, metavar="N", help="how many (default: 32)")
    command.add_argument("--concurrency", type=_count, default=4, metavar="N", help="at a time (default: 4)")
    command.add_argument(
        "--session", action="store_true", help="all on one stream, as programs with many may send them"
    )
    command.add_argument("--warm-up", type=_count_or_none, default=1, metavar="N", help="uncounted before (default: 1)")
    command.add_argument("--prompt", default="Tell me about the sea.", help="the same for all; - reads standard input")
    command.add_argument("--raw", action="store_true", help="send it as plain text, without the chat template")
    _add_depth(command)
    _add_sampling(command)
    _add_connection_and_output(command)


def _add_prompt(command: argparse.ArgumentParser, nargs: str | None = None) -> None:
    command.add_argument("prompt", nargs=nargs, help="the prompt; - reads it from standard input")
    kind = command.add_mutually_exclusive_group()
    kind.add_argument("--chat", action="store_true", help="send it as one user message (the default)")
    kind.add_argument("--raw", action="store_true", help="send it as plain text, without the chat template")


def _add_depth(command: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = command.add_argument_group("depth")
    group.add_argument("--mode", choices=[mode.value for mode in Mode], help="how layers are chosen")
    budget = "upper bound on the mean cost, in (0, 1]"
    group.add_argument("--budget", type=float, dest="compute_budget", metavar="BUDGET", help=budget)
    group.add_argument("--policy", dest="policy_name", metavar="NAME", help="which policy decides")
    group.add_argument(
        "--fixed-action", choices=[action.name.lower() for action in Action], help="implies --mode fixed"
    )
    group.add_argument("--draft-length", type=int, metavar="N", help="with --mode exact: most tokens per draft")
    return group


def _add_show_depth(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--show-depth", action="store_true", help="mark the text by how many layers ran")
    _add_color(group)


def _add_color(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--color",
        choices=["auto", "always", "never"],
        default="auto",
        help="auto: on a terminal, unless NO_COLOR is set",
    )


def _add_sampling(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("sampling and stopping")
    group.add_argument("--temperature", type=float, help="0 is greedy")
    group.add_argument("--top-p", type=float)
    group.add_argument("--top-k", type=int)
    group.add_argument("--min-p", type=float)
    group.add_argument("--repetition-penalty", type=float)
    group.add_argument("--seed", type=int)
    group.add_argument("--max-new-tokens", type=int, metavar="N")
    group.add_argument("--stop", action="append", metavar="TEXT", help="may be given several times")
    group.add_argument("--ignore-eos", **_FLAG, help="go on past the end of sequence")
    group.add_argument("--priority", choices=[priority.value for priority in Priority], help="class in the queue")
    constraint = command.add_argument_group("what the text has to be").add_mutually_exclusive_group()
    for name, kind, metavar, brief in (
        ("--json-schema", _schema, "FILE", "JSON by the schema in this file"),
        ("--regex", _regex, "PATTERN", "text that this pattern matches as a whole"),
        ("--grammar", _grammar, "FILE", "text by the Lark grammar in this file"),
    ):
        constraint.add_argument(name, dest="constraint", type=kind, metavar=metavar, help=brief)
    constraint.add_argument(
        "--choice", dest="constraint", action="append", metavar="TEXT", help="one of these; given several times"
    )


def _add_connection_and_output(
    command: argparse.ArgumentParser, as_json: str = "print one JSON object", quiet: str | None = None
) -> None:
    """Adds what every command has that asks a server; `as_json` and `quiet` are the help of these options."""
    group = command.add_argument_group("connection")
    group.add_argument("--target", help="host:port (default: DASH_TARGET, else localhost:50051)")
    group.add_argument("--timeout", type=float, metavar="SECONDS", help="deadline of each call")
    group.add_argument("--tls", **_FLAG, help="encrypt, and check the server's certificate")
    group.add_argument("--ca-file", type=Path, metavar="FILE", help="who signs the server's certificate; implies --tls")
    group.add_argument("--certificate-file", type=Path, metavar="FILE", help="this client's own certificate")
    group.add_argument("--key-file", type=Path, metavar="FILE", help="the key of that certificate")
    group.add_argument("--server-name", metavar="NAME", help="the name in the server's certificate")
    group.add_argument("--token-file", type=Path, metavar="FILE", help="holds the token (default: DASH_TOKEN)")
    group.add_argument("--allow-insecure-token", **_FLAG, help="send it to another machine without TLS")
    group.add_argument("--token", nargs="?", action=_RefuseToken, help=argparse.SUPPRESS)
    group = command.add_argument_group("output")
    group.add_argument("--json", action="store_true", help=as_json)
    if quiet is not None:
        group.add_argument("--quiet", action="store_true", help=quiet)


def _schema(path: str) -> dict[str, Any]:
    try:
        schema = json.loads(_content(path))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{path} is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise argparse.ArgumentTypeError(f"{path} holds no JSON object")
    return schema


def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"is not a pattern: {error}") from None


def _grammar(path: str) -> LarkGrammar:
    return LarkGrammar(_content(path))


def _content(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {reason}") from None


def _count(text: str, least: int = 1) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}")
    return number


def _count_or_none(text: str) -> int:
    return _count(text, least=0)
