"""`dash-client trace`: fetches or reads recorded decisions, and writes them as a page. Prints nothing."""

import os
import re
from pathlib import Path

from dash_client.client import DashClient
from dash_client.recorded import RecordedDecisions
from dash_client.recorded_files import load_recorded, save_recorded, write_text
from dash_client.trace_page import trace_page


def write_trace(client: DashClient, source: str, *, page: Path | None, save: Path | None) -> Path:
    """Writes the page of a request; returns where it is.

    Args:
        client: whom to ask for it.
        source: a request id, or a file that an earlier `save` wrote.
        page: where to. Unset: a file in the working folder, named after the request.
        save: a file for what was recorded. Unset: none.

    Raises:
        DashError: the server does not have the decisions, or a file cannot be read or written.
    """
    decisions = _recorded(client, source)
    if save is not None:
        save_recorded(decisions, save)
    page = page or _default_page(decisions)
    write_text(page, trace_page(decisions))
    return page


def _recorded(client: DashClient, source: str) -> RecordedDecisions:
    path = Path(source)
    # A request id has neither of these; a wrong file name should not be sent to a server.
    is_file = os.path.exists(path) or len(path.parts) > 1 or path.suffix != ""
    return load_recorded(path) if is_file else client.decisions(source)


def _default_page(decisions: RecordedDecisions) -> Path:
    """A name in the working folder, whatever the request is called."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", decisions.request_id)[:80]
    return Path(f"trace-{name}.html")
