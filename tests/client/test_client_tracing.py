"""The caller's trace continues at the server if the program uses OpenTelemetry, and costs nothing otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from client_colours import drain, generate
from fake_dash_server import FakeDashServer

from dash_client import DashClient

BARE = """
import sys
from fake_dash_server import FakeDashServer
from dash_client import DashClient
with FakeDashServer() as server, DashClient(server.target) as client:
    client.generate("x")
    client.stream("x").final()
assert not [key for metadata in server.metadata for key in metadata if key == "traceparent"]
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""


def test_the_span_in_use_is_the_servers_parent(server: FakeDashServer, client: DashClient) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    with sdk.TracerProvider().get_tracer("test").start_as_current_span("caller") as span:
        generate(client)
        drain(client)
    assert trace.get_current_span() is trace.INVALID_SPAN
    generate(client)
    context = span.get_span_context()
    expected = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    assert [metadata.get("traceparent") for metadata in server.metadata] == [expected, expected, None]


def test_nothing_is_imported_where_the_program_does_not() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", BARE], check=True, env=environment, timeout=60)
