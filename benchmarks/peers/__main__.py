"""`make peers`: installs the peers of the benchmark, each in an environment of its own."""

import argparse
from pathlib import Path

from benchmarks.peers.install import DEFAULT_FOLDER, RECIPES, install


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER, help="default %(default)s")
    parser.add_argument("--only", choices=RECIPES, help="one peer")
    options = parser.parse_args()
    for name in RECIPES if options.only is None else [options.only]:
        install(name, options.folder)


if __name__ == "__main__":
    main()
