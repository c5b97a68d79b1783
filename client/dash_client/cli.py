"""The `dash-client` command: arguments, output and exit codes. What it says comes from the client."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, NoReturn, TextIO

from dash_client.client import DashClient, GenerationStream
from dash_client.errors import DashError, InvalidArgumentError, UnavailableError
from dash_client.heatmap import ColorDepth, DepthPainter, without_control_characters
from dash_client.types import (
    Action,
    ChatMessage,
    Decisions,
    Generation,
    GenerationOptions,
    HealthStatus,
    Mode,
    Prompt,
)


class ExitCode(IntEnum):
    """What the process returns; explained in `_EPILOG`."""

    OK = 0
    SERVER_ERROR = 1
    USAGE = 2
    UNAVAILABLE = 3
    INTERRUPTED = 130
    OUTPUT_CLOSED = 141


_EPILOG = """\
exit codes:
  0    ok
  1    the server reported an error, or the timeout passed
  2    wrong usage, or an argument that the server refuses
  3    no server at the target, or it is not serving
  130  interrupted (Ctrl-C); the request is cancelled on the server
  141  whoever read the output went away; the request is cancelled on the server
"""


_TRACE = """\
Writes a page that shows what was decided for each token and layer, and when: open it in a browser. The server answers
only the caller that made the request, and only for its latest ones; `generate` prints a request's id when it is done.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code (argparse's own exits are `SystemExit`)."""
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        with DashClient(arguments.target, timeout=arguments.timeout) as client:
            code: ExitCode = arguments.run(client, arguments)
            sys.stdout.flush()
            return code
    except DashError as error:
        return _report(error)
    except KeyboardInterrupt:
        print("\ncancelled", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more on its way out, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OUTPUT_CLOSED


def _report(error: DashError) -> ExitCode:
    sys.stdout.flush()
    print(f"dash-client: {error.message}", file=sys.stderr)
    if error.retry_after_seconds is not None:
        print(f"dash-client: try again in {error.retry_after_seconds:g} s", file=sys.stderr)
    if error.request_id:
        print(f"dash-client: the server's name for the request is {error.request_id}", file=sys.stderr)
    if isinstance(error, InvalidArgumentError):
        return ExitCode.USAGE
    return ExitCode.UNAVAILABLE if isinstance(error, UnavailableError) else ExitCode.SERVER_ERROR


def _run_generate(client: DashClient, arguments: argparse.Namespace) -> ExitCode:
    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    prompt: Prompt = text if arguments.raw else [ChatMessage(role="user", content=text)]
    with client.stream(prompt, **_options(arguments)) as stream:
        if arguments.json:
            print(json.dumps(_as_json(stream.final()), ensure_ascii=False))
            return ExitCode.OK
        _print_stream(stream, arguments)
    if not arguments.quiet:
        print(_summary(stream.final()), file=sys.stderr)
    return ExitCode.OK


def _options(arguments: argparse.Namespace) -> GenerationOptions:
    # `--fixed-action` means nothing in any other mode.
    mode = arguments.mode or (Mode.FIXED if arguments.fixed_action else None)
    return GenerationOptions(
        mode=mode,
        compute_budget=arguments.budget,
        policy_name=arguments.policy,
        fixed_action=arguments.fixed_action,
        draft_length=arguments.draft_length,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        stop=arguments.stop,
        ignore_eos=True if arguments.ignore_eos else None,
        return_decisions=True if arguments.show_depth else None,
        trace=True if arguments.trace else None,
    )


def _print_stream(stream: GenerationStream, arguments: argparse.Namespace) -> None:
    started = stream.started
    if started.policy_note and not arguments.quiet:
        print(f"note: {started.policy_note}", file=sys.stderr, flush=True)
    painter = None
    if arguments.show_depth:
        painter = DepthPainter(started.layer_count, _color_depth(arguments.color, sys.stdout))
        print(painter.legend(), file=sys.stderr, flush=True)
    is_terminal = sys.stdout.isatty()
    ends_line = False
    for delta in stream:
        if is_terminal:
            delta = replace(delta, text=without_control_characters(delta.text))
        if delta.text:
            ends_line = delta.text.endswith("\n")
        print(painter.paint(delta) if painter else delta.text, end="", flush=True)
    if not ends_line or painter:
        print()


def _color_depth(choice: str, stream: TextIO) -> ColorDepth:
    if choice == "always":
        return ColorDepth.for_terminal(os.environ)
    return ColorDepth.NONE if choice == "never" else ColorDepth.of(stream, os.environ)


def _summary(generation: Generation) -> str:
    usage, depth = generation.usage, generation.depth
    speed = usage.decode_tokens_per_second
    parts = [
        f"{usage.output_token_count} tokens ({generation.finish_reason})",
        f"{speed:.1f} tokens/s" if speed is not None else "no decode speed",
        f"policy {generation.started.policy or 'none'}",
    ]
    if depth.mean_layers:
        layers = (f"{action.name} {mean:.1f}" for action, mean in depth.mean_layers.items() if mean)
        parts.append(f"layers per token: {', '.join(layers)}")
    if drafts := usage.speculation:
        parts.append(
            f"{drafts.drafted_token_count} drafted, {drafts.accepted_token_count} accepted "
            f"in {drafts.verification_count} verifications"
        )
    if depth.mean_cost is not None:
        parts.append(f"mean cost {depth.mean_cost:.3f} of full depth")
    parts.append(f"request {generation.started.request_id}")
    return "; ".join(parts)


def _as_json(value: Any) -> Any:
    """Dataclasses as objects, enums by name, decisions as one list of action names per token."""
    if isinstance(value, Decisions):
        return [[action.name for action in row] for row in value]
    if is_dataclass(value):
        return {field.name: _as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Action):
        return value.name
    if isinstance(value, dict):
        return {_as_json(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return value


def _run_info(client: DashClient, arguments: argparse.Namespace) -> ExitCode:
    facts = {"model": _as_json(client.model_info()), "policy": _as_json(client.policy_info(arguments.policy))}
    if arguments.json:
        print(json.dumps(facts, ensure_ascii=False))
        return ExitCode.OK
    for title, section in facts.items():
        print(title)
        for name, value in section.items():
            print(f"  {name:<24}{_in_words(value)}")
    return ExitCode.OK


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item:.3f}" for key, item in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _run_health(client: DashClient, arguments: argparse.Namespace) -> ExitCode:
    if arguments.wait is not None:
        client.wait_until_ready(arguments.wait)
    status = client.health()
    print(status.name)
    return ExitCode.OK if status is HealthStatus.SERVING else ExitCode.UNAVAILABLE


def _run_trace(client: DashClient, arguments: argparse.Namespace) -> ExitCode:
    # No other command should wait for the import of what draws the page.
    from dash_client.trace_command import write_trace

    print(write_trace(client, arguments.source, page=arguments.output, save=arguments.save))
    return ExitCode.OK


class _Parser(argparse.ArgumentParser):
    """Explains the exit codes under every command."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epilog = _EPILOG
        self.formatter_class = argparse.RawDescriptionHelpFormatter

    def error(self, message: str) -> NoReturn:
        self.exit(ExitCode.USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("--target", help="host:port (default: DASH_TARGET, else localhost:50051)")
    common.add_argument("--timeout", type=float, metavar="SECONDS", help="deadline of the call")
    parser = _Parser(prog="dash-client", description="Talks to a dash server.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", parents=[common], help="generate text")
    generate.set_defaults(run=_run_generate)
    _add_generate_arguments(generate)

    info = commands.add_parser("info", parents=[common], help="the model, its limits, and a policy")
    info.set_defaults(run=_run_info)
    info.add_argument("--policy", metavar="NAME", help="which policy (default: the server's default)")
    info.add_argument("--json", action="store_true", help="as one JSON object")

    trace = commands.add_parser("trace", parents=[common], help="a page of a request's decisions", description=_TRACE)
    trace.set_defaults(run=_run_trace)
    trace.add_argument("source", metavar="REQUEST_ID_OR_FILE", help="which request, or a file that --save wrote")
    trace.add_argument("--output", type=Path, metavar="PAGE", help="the page (default: trace-REQUEST_ID.html)")
    trace.add_argument("--save", type=Path, metavar="FILE", help="also keep what was recorded, as JSON")

    health = commands.add_parser("health", parents=[common], help="whether the server is serving")
    health.set_defaults(run=_run_health)
    health.add_argument("--wait", type=float, metavar="SECONDS", help="wait this long for it to serve")
    return parser


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="the prompt; - reads it from standard input")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--chat", action="store_true", help="send it as one user message (the default)")
    kind.add_argument("--raw", action="store_true", help="send it as plain text, without the chat template")

    depth = parser.add_argument_group("depth")
    depth.add_argument("--mode", choices=[mode.value for mode in Mode], help="how layers are chosen")
    depth.add_argument("--budget", type=float, help="upper bound on the mean cost, in (0, 1]")
    depth.add_argument("--policy", metavar="NAME", help="which policy decides")
    depth.add_argument(
        "--fixed-action", choices=[action.name.lower() for action in Action], help="implies --mode fixed"
    )
    depth.add_argument("--draft-length", type=int, metavar="N", help="with --mode exact: most tokens per draft")
    depth.add_argument("--show-depth", action="store_true", help="mark the text by how many layers ran")
    depth.add_argument("--color", choices=["auto", "always", "never"], default="auto", help="for --show-depth")
    depth.add_argument("--trace", action="store_true", help="trace the decisions of this request")

    sampling = parser.add_argument_group("sampling and stopping")
    sampling.add_argument("--temperature", type=float, help="0 is greedy")
    sampling.add_argument("--top-p", type=float)
    sampling.add_argument("--top-k", type=int)
    sampling.add_argument("--min-p", type=float)
    sampling.add_argument("--repetition-penalty", type=float)
    sampling.add_argument("--seed", type=int)
    sampling.add_argument("--max-new-tokens", type=int, metavar="N")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="may be given several times")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on past the end of sequence")

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object when it is complete")
    output.add_argument("--quiet", action="store_true", help="no note and no summary on standard error")


if __name__ == "__main__":
    sys.exit(main())
