"""`dash-client heatmap`: shows the action of each layer for each token, in the terminal, as a picture and as JSON."""

import argparse
import sys
from collections.abc import Iterable, Iterator

from dash_client.commands.answer_printer import say_note, summary
from dash_client.commands.client_arguments import connect, generation_options
from dash_client.commands.exit_codes import ExitCode
from dash_client.commands.heatmap_file import SavedHeatmap, load_heatmap
from dash_client.commands.heatmap_rows import Row, RowPainter, rows_of_piece
from dash_client.commands.output import as_json, color_depth, print_json, say
from dash_client.commands.prompts import prompt_of
from dash_client.errors import ServerError, invalid_argument
from dash_client.types import StreamDelta


def run(arguments: argparse.Namespace) -> ExitCode:
    """Runs the command."""
    if (arguments.prompt is None) == (arguments.file is None):
        raise invalid_argument("heatmap", "give either a prompt or --from FILE")
    if arguments.png is not None:
        # Fails before an answer is generated that could not be drawn.
        from dash_client.commands.heatmap_picture import require_pillow

        require_pillow()
    return _show_file(arguments) if arguments.file is not None else _show_answer(arguments)


def _show_file(arguments: argparse.Namespace) -> ExitCode:
    saved = load_heatmap(arguments.file)
    if arguments.json:
        print_json(saved.content)
    else:
        _print_lines(saved.rows, saved.layer_count, arguments)
    _draw(saved.rows, arguments, saved.title)
    return ExitCode.OK


def _show_answer(arguments: argparse.Namespace) -> ExitCode:
    options = generation_options(arguments)
    options["return_decisions"] = True
    rows: list[Row] = []
    pieces: list[tuple[str, int]] = []
    with connect(arguments) as client, client.stream(prompt_of(arguments), **options) as stream:
        started = stream.started
        if not arguments.quiet and not arguments.json:
            say_note(started)
        noted = _noted(stream, rows, pieces)
        if arguments.json:
            for _ in noted:
                pass
        else:
            _print_lines(noted, started.layer_count, arguments)
        answer = stream.final()
    if len(rows) != len(answer.token_ids):
        raise ServerError(f"{client.target} sent no decisions for some of the tokens", code="INTERNAL")
    if arguments.json:
        listed = [{"text": text, "token_count": count} for text, count in pieces]
        print_json(as_json(answer) | {"pieces": listed})
    elif not arguments.quiet:
        say(summary(answer))
    _draw(rows, arguments, SavedHeatmap.title_of(started.model, started.mode.value, answer.depth.mean_cost))
    return ExitCode.OK


def _noted(deltas: Iterable[StreamDelta], rows: list[Row], pieces: list[tuple[str, int]]) -> Iterator[Row]:
    for delta in deltas:
        new = rows_of_piece(delta.text, delta.decisions or ())
        rows += new
        pieces.append((delta.text, len(delta.token_ids)))
        yield from new


def _print_lines(rows: Iterable[Row], layer_count: int, arguments: argparse.Namespace) -> None:
    painter = RowPainter(layer_count, color_depth(arguments, sys.stdout))
    if not arguments.quiet:
        # Not through `say`: its colours are escape sequences, and it contains no text of the model.
        print(painter.legend(), file=sys.stderr, flush=True)
    print(painter.ruler(), flush=True)
    for row in rows:
        print(painter.line(row), flush=True)


def _draw(rows: list[Row], arguments: argparse.Namespace, title: str) -> None:
    if arguments.png is None:
        return
    from dash_client.commands.heatmap_picture import write_picture

    note = write_picture(rows, arguments.png, title)
    if not arguments.quiet:
        say(note)
