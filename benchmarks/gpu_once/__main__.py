"""`python -m benchmarks.gpu_once FOLDER`: proves and measures the CUDA worker in one run of under 8 minutes.

It needs Python and torch, with the Triton that torch brings, and nothing else: no network, no checkpoint, no other
library. Models and policies have random weights from a seed, in the shapes of SmolLM2-135M and Llama-3.1-8B. Each risky
piece, each model and the tests run in a process of their own, with a folder inside FOLDER: figures are printed, and
written to its `gpu_once.json` as soon as they are measured; traces and all output lie beside it. In the end
`gpu_once.json` in FOLDER has all figures, and `gpu_once.tar.gz.0` and so on all files, in at most 8 pieces of 16 MiB.
Exits with 1 if a parity does not hold or could not be checked, and with 2 without a CUDA device. Has not been run on a
GPU.
"""

import argparse
import faulthandler
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu_once.archive import archive
from benchmarks.gpu_once.live_report import LiveReport
from benchmarks.gpu_once.processes import run_units
from benchmarks.gpu_once.random_models import SHAPES
from benchmarks.gpu_once.run import FULL, QUICK, run_unit, units_of

SECONDS = 480.0
_HANGS_SECONDS = 60.0
"""A unit that goes on so long after its time tells where it is, and ends."""
_USUAL_SHAPES = {"cuda": ["135m", "8b"], "cpu": ["tiny"]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_once", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for the results; made if it is not there")
    parser.add_argument("--quick", action="store_true", help="fewer rows, tokens and rounds")
    parser.add_argument("--device", choices=list(_USUAL_SHAPES), default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="models, smallest first")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after these the rest is left out")
    parser.add_argument("--only", metavar="UNIT", help="runs one unit, in this process")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return 2
    shapes = given.shapes or _USUAL_SHAPES[given.device]
    if given.only is None:
        passed_on = ["--device", given.device, "--shapes", *shapes, *(["--quick"] if given.quick else [])]
        broken = run_units(given.folder, units_of(shapes), given.seconds, passed_on)
        pieces, left_out = archive(given.folder)
        print(f"\n{len(pieces)} pieces of {pieces[0]}" + "".join(f"\n- left out: {name}" for name in left_out))
        return _tell(broken)
    faulthandler.dump_traceback_later(given.seconds + _HANGS_SECONDS, exit=True)
    with warnings.catch_warnings():  # the function that came after it is not in all versions
        warnings.simplefilter("ignore")
        torch.set_float32_matmul_precision("highest")  # some images allow TF32 by an environment variable
    report = LiveReport(given.folder, given.seconds)
    run_unit(report, given.only, shapes, torch.device(given.device), QUICK if given.quick else FULL)
    faulthandler.cancel_dump_traceback_later()
    return 1 if report.broken_parities else 0


def _tell(broken: Sequence[str]) -> int:
    print(f"\nbroken: {', '.join(broken)}" if broken else "\nall parities hold")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
