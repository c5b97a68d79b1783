"""Reads the numbers of a server's Prometheus endpoint."""

import asyncio
import urllib.request
from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

from tests.server.server_harness import RunningServer

REQUESTS = "gen_ai_server_request_duration_seconds"
OURS = ("dash_mode", "error_type", "dash_token_type", "dash_layer", "dash_action", "gen_ai_operation_name")


class Scrape:
    """One scrape: sums over the series that have the labels asked for; "" matches a missing label."""

    def __init__(self, text: str) -> None:
        self.series = defaultdict[str, list[tuple[dict[str, str], float]]](list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self.series[sample.name].append((sample.labels, sample.value))

    def value(self, name: str, **labels: str) -> float:
        assert name in self.series, f"{name} is not exported"
        return sum(
            value
            for given, value in self.series[name]
            if all(given.get(label, "") == wanted for label, wanted in labels.items())
        )

    def kinds(self, name: str) -> set[tuple[tuple[str, str], ...]]:
        """Returns the label sets of a metric, without the library's labels."""
        return {tuple((label, given[label]) for label in OURS if given.get(label)) for given, _ in self.series[name]}


async def scrape(server: RunningServer) -> Scrape:
    assert server.server.metrics is not None
    return Scrape(await asyncio.to_thread(read, server.server.metrics.port))


def read(port: int | None) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        return str(response.read().decode())
