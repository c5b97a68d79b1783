"""`make soak`: proves the service under load and faults, on loopback; see docs/reliability.md.

`python -m benchmarks.soak --only streams deaths` runs parts of it. Exits with 1 if anything did not hold.
"""

import argparse
import sys

from benchmarks.soak import (
    chaos,
    connections,
    corrupt_files,
    deaths,
    draining,
    fuzz,
    other_clients,
    ray_faults,
    streams,
)
from benchmarks.soak.report import Part, run_parts

PARTS: dict[str, Part] = {
    "streams": ("64 streams at once for ten minutes", streams.run),
    "deaths": ("The worker killed ten times under load", deaths.run),
    "drain": ("SIGTERM with 32 streams", draining.run_drain),
    "chaos": ("Worker, disk, certificates and collector broken under load", chaos.run),
    "slow-reader": ("A reader that takes one message a second", draining.run_slow_reader),
    "fuzz": ("200,000 fuzzed requests", fuzz.run),
    "connections": ("10,000 connections, and pings", connections.run),
    "other-clients": ("Clients in other languages", other_clients.run),
    "corrupt-files": ("1,000 corrupted files", corrupt_files.run),
    "ray": ("Ten minutes of faults on a Ray cluster", ray_faults.run),
}


def main() -> int:
    """Runs the chosen parts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    only = parser.parse_args().only
    return run_parts({name: PARTS[name] for name in only})


if __name__ == "__main__":
    sys.exit(main())
