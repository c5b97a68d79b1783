"""The engine's events: what a server without torch can read from a socket."""

import subprocess
import sys

from dash_runtime.events import DepthStatistics


def test_importing_the_events_imports_no_torch() -> None:
    program = "import sys, dash_runtime.events; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_means_are_those_of_full_depth_where_nothing_was_decoded() -> None:
    depth = DepthStatistics(0, [], {}, 0.0, 0)
    assert (depth.mean_cost, depth.mean_exposed_seconds) == (1, 0)
    depth = DepthStatistics(4, [], {}, 3.0, 2_000_000_000)
    assert (depth.mean_cost, depth.mean_exposed_seconds) == (0.75, 0.5)
