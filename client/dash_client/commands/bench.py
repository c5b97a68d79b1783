"""`dash-client bench`: puts load on a server and prints how fast it answered. `bench_figures` computes the figures.

All streams run in one event loop on one connection: with a thread each, this process would be the bottleneck.
"""

import argparse
import asyncio
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from dash_client.aio import AsyncDashClient
from dash_client.aio_session import AsyncSession
from dash_client.commands.bench_figures import (
    BAR_CHARACTERS,
    Figures,
    Percentiles,
    Sample,
    figures,
    first_token_times,
    histogram,
    inter_token_times,
)
from dash_client.commands.client_arguments import connection_options, generation_options
from dash_client.commands.exit_codes import ExitCode, exit_code_of
from dash_client.commands.output import as_json, can_show, print_json, printable, say
from dash_client.commands.prompts import prompt_of
from dash_client.errors import DashError
from dash_client.options import GenerationOptions, Prompt
from dash_client.types import SpeculationUsage


@dataclass(slots=True)
class _Load:
    """One run: the requests to send, and their results so far."""

    prompt: Prompt
    options: GenerationOptions
    request_count: int
    model: str = ""
    target: str = ""
    sent_count: int = 0
    samples: list[Sample] = field(default_factory=list)
    last_error: DashError | None = None


def run(arguments: argparse.Namespace) -> ExitCode:
    """Runs the command."""
    load = _Load(prompt_of(arguments), generation_options(arguments), arguments.requests)
    code = ExitCode.OK
    try:
        asyncio.run(_run(load, arguments))
    except KeyboardInterrupt:
        if not load.samples:
            raise
        code = ExitCode.INTERRUPTED
    if sys.stderr.isatty():
        print(file=sys.stderr)
    result = figures(load.samples)
    if arguments.json:
        setting = {"target": load.target, "model": load.model, "concurrency": arguments.concurrency}
        print_json(setting | {"requests": load.request_count} | as_json(result))
    else:
        _print(result, load, arguments)
    if code is ExitCode.INTERRUPTED:
        say(f"interrupted after {len(load.samples)} of {load.request_count} requests; the others are cancelled")
    elif load.last_error is not None:
        code = exit_code_of(load.last_error)
    return code


async def _run(load: _Load, arguments: argparse.Namespace) -> None:
    options = connection_options(arguments)
    # Refusals under load are part of the measurement.
    async with AsyncDashClient(**options, retries=False) as client, client.session() as session:
        load.target = client.target
        load.model = (await client.model_info()).name
        for _ in range(arguments.warm_up):
            # An error here, such as a wrong option, ends the command: every request would fail with it.
            async with client.stream(load.prompt, **load.options) as stream:
                await stream.final()
        asked = session if arguments.session else client
        async with asyncio.TaskGroup() as group:
            for _ in range(min(arguments.concurrency, load.request_count)):
                group.create_task(_send_one_after_another(asked, load))


async def _send_one_after_another(asked: AsyncDashClient | AsyncSession, load: _Load) -> None:
    while load.sent_count < load.request_count:
        load.sent_count += 1
        load.samples.append(await _measure(asked, load))
        if sys.stderr.isatty():
            print(f"\r{len(load.samples)} of {load.request_count}", end="", file=sys.stderr, flush=True)


async def _measure(asked: AsyncDashClient | AsyncSession, load: _Load) -> Sample:
    arrivals: list[tuple[float, int]] = []
    error, drafts = None, None
    sent = time.perf_counter()
    try:
        async with asked.stream(load.prompt, **load.options) as stream:
            async for delta in stream:
                if delta.token_ids:
                    arrivals.append((time.perf_counter(), len(delta.token_ids)))
            drafts = (await stream.final()).usage.speculation
    except DashError as failure:
        load.last_error = failure
        error = failure.code if failure.reason in (None, failure.code) else f"{failure.code} ({failure.reason})"
    return Sample(sent, time.perf_counter(), tuple(arrivals), error, drafts)


def _print(result: Figures, load: _Load, arguments: argparse.Namespace) -> None:
    concurrency = min(arguments.concurrency, load.request_count)
    print(
        printable(f"{load.model} at {load.target}: {load.request_count} requests, {concurrency} at a time", sys.stdout)
    )
    print()
    print(f"complete             {result.completed} in {result.wall_seconds:.2f} s, {result.output_token_count} tokens")
    for kind, count in result.errors.items():
        print(printable(f"failed               {count} with {kind}", sys.stdout))
    if result.tokens_per_second is not None:
        print(f"tokens/s, total      {result.tokens_per_second:.1f}")
    print(f"{'':20} {'p50':>9} {'p90':>9} {'p99':>9}")
    _print_row("tokens/s per stream", result.stream_tokens_per_second, 1)
    _print_row("first token, ms", result.time_to_first_token_seconds, 1000)
    _print_row("between tokens, ms", result.inter_token_seconds, 1000)
    if (drafts := result.drafts) is not None:
        _print_drafts(drafts)
    complete = [sample for sample in load.samples if sample.error is None]
    unicode = can_show(BAR_CHARACTERS + "…", sys.stdout)
    for title, values in (
        ("time to first token", first_token_times(complete)),
        ("time between tokens", inter_token_times(complete)),
    ):
        if values:
            print(f"\n{title}, {len(values)} measured")
            print("\n".join(histogram(values, unicode=unicode)))


def _print_drafts(drafts: SpeculationUsage) -> None:
    print(
        f"drafted              {drafts.drafted_token_count}, {drafts.accepted_token_count} accepted; of these from the "
        f"text {drafts.text_drafted_token_count}, {drafts.text_accepted_token_count} accepted"
    )
    by_length = ", ".join(f"{length}: {count}" for length, count in enumerate(drafts.accepted_length_counts) if count)
    print(f"accepted at a time   {by_length}")


def _print_row(name: str, values: Percentiles | None, factor: float) -> None:
    cells: list[Any] = [None] * 3 if values is None else [values.p50, values.p90, values.p99]
    print(f"{name:20}", *(f"{'-' if cell is None else f'{factor * cell:.1f}':>9}" for cell in cells))
