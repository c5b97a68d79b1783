"""Prints an answer as it comes, and summarises it. Knows no client: it takes any iterable of deltas."""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace

from dash_client.commands.depth_painter import DepthPainter
from dash_client.commands.output import color_depth, printable, say
from dash_client.errors import DashError
from dash_client.types import Generation, GenerationStarted, StreamDelta


def say_note(started: GenerationStarted) -> None:
    """Prints the policy's note for callers, if there is one."""
    if started.policy_note:
        say(f"note: {started.policy_note}")


class AnswerPrinter:
    """Prints answers on standard output, marked by depth with `--show-depth`."""

    def __init__(self, arguments: argparse.Namespace, layer_count: int) -> None:
        self._painter = DepthPainter(layer_count, color_depth(arguments, sys.stdout)) if arguments.show_depth else None
        if self._painter is not None:
            # Not through `say`: its colours are escape sequences, and it contains no text of the model.
            print(self._painter.legend(), file=sys.stderr, flush=True)

    def print(self, deltas: Iterable[StreamDelta]) -> None:
        """Prints the pieces as they come. Ends the last line, so that an error message starts on a new one."""
        ends_line = True
        try:
            for delta in deltas:
                piece = replace(delta, text=printable(delta.text, sys.stdout))
                if piece.text:
                    ends_line = piece.text.endswith("\n")
                print(self._painter.paint(piece) if self._painter else piece.text, end="", flush=True)
        except DashError:
            if not ends_line:
                print(flush=True)
            raise
        if not ends_line or self._painter:
            print(flush=True)


def summary(generation: Generation) -> str:
    """Returns one line about an answer: its length, speed and depth."""
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
    if mean := depth.mean_speculative_layers:
        parts.append(f"{mean:.1f} more for drafts and wrong guesses")
    if drafts := usage.speculation:
        parts.append(
            f"{drafts.drafted_token_count} drafted ({drafts.text_drafted_token_count} from the text), "
            f"{drafts.accepted_token_count} accepted "
            f"in {drafts.verification_count} verifications"
        )
    if depth.mean_cost is not None:
        parts.append(f"mean cost {depth.mean_cost:.3f} of full depth")
    parts.append(f"request {generation.started.request_id}")
    return "; ".join(parts)
