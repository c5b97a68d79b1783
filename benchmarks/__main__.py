"""`make bench`: measures everything in one run, prints it, and keeps it in `benchmarks/results/latest.json`.

Run it alone on the machine: two threads that meet at barriers stall on any busy neighbour.
"""

import argparse
import os

from benchmarks.decode import measure_decode
from benchmarks.figures import machine, write_results
from benchmarks.service import measure_service
from dash_runtime.checkpoints import default_cache_folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and tokens; wider spread")
    quick = parser.parse_args().quick
    cache_folder = default_cache_folder(os.environ)
    # The service first: the models that decoding loads would stay in this process's memory beside it.
    service, service_notes = measure_service(starts=1 if quick else 3)
    decode, decode_notes = measure_decode(cache_folder, num_tokens=32 if quick else 128, rounds=3 if quick else 7)
    figures, notes = [*decode, *service], [*decode_notes, *service_notes]
    print(f"\n{machine()}\n")
    for figure in figures:
        print(figure.line())
    print()
    for note in notes:
        print(f"- {note}")
    write_results(figures, notes)


if __name__ == "__main__":
    main()
