"""The `dash-policy` command: makes, fits, trains, evaluates, calibrates and describes policies, searches fixed plans,
rounds weights, and says what actions cost.

Exit codes: 0 done, 2 something that the user can mend, 130 interrupted (training goes on from its last checkpoint).
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dash_runtime.actions import Action
from dash_runtime.checkpoints import default_cache_folder
from dash_runtime.commands.costs import run_costs
from dash_runtime.commands.evaluate import run_calibrate, run_evaluate, run_inspect
from dash_runtime.commands.make import run_make
from dash_runtime.commands.quantize import run_quantize
from dash_runtime.commands.search import run_search
from dash_runtime.commands.train import run_fit, run_train
from dash_runtime.devices.triton import leave_triton_out
from dash_runtime.errors import DashRuntimeError
from dash_runtime.training.loaded_model import ModelOptions


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    leave_triton_out()
    try:
        _run(options)
    except DashRuntimeError as error:
        print(f"dash-policy: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dash-policy: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    options.model_options = ModelOptions(
        options.model, options.revision, options.device, options.cache_folder, options.data
    )
    options.run(options)


def parse_actions(text: str) -> tuple[Action, ...]:
    """Returns the actions of a list like `skip,full`, in ascending order.

    Raises:
        ArgumentTypeError: one is unknown, or FULL is missing.
    """
    try:
        actions = tuple(sorted({Action[name.strip().upper()] for name in text.split(",")}))
    except KeyError as error:
        known = ", ".join(action.name for action in Action)
        raise argparse.ArgumentTypeError(f"{error.args[0]!r} is not one of {known}") from None
    if Action.FULL not in actions or len(actions) < 2:
        raise argparse.ArgumentTypeError("must hold FULL and one more")
    return actions


def parse_rounded(text: str) -> list[Action]:
    """Returns the actions of a list like `int4,int3`, without FULL, SKIP and INT8.

    Raises:
        ArgumentTypeError: one is another.
    """
    known = {action.name.lower(): action for action in (Action.INT4, Action.INT3)}
    names = [name.strip().lower() for name in text.split(",")]
    if not set(names) <= set(known):
        raise argparse.ArgumentTypeError(f"must be among {', '.join(known)}, got {text!r}")
    return [action for name, action in known.items() if name in names]


def parse_budgets(text: str) -> list[float]:
    """Returns the budgets of a list like `0.9,0.8`.

    Raises:
        ArgumentTypeError: one is not a number in (0, 1].
    """
    try:
        budgets = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers, got {text!r}") from None
    if not all(0 < budget <= 1 for budget in budgets):
        raise argparse.ArgumentTypeError(f"must lie in (0, 1], got {text!r}")
    return budgets


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _positive_number(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return number


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dash-policy", description=__doc__)
    what = "embedded, a folder, a GGUF file or a hub id"
    of_any = argparse.ArgumentParser(add_help=False)
    of_any.add_argument("--revision", help="of a hub model")
    of_any.add_argument("--device", default="auto")
    of_any.add_argument("--cache-folder", type=Path, default=default_cache_folder(os.environ))
    of_any.add_argument(
        "--data",
        type=Path,
        help=".txt or .jsonl file, or a folder of them; default: Python's own help and answers that the model writes",
    )
    common = argparse.ArgumentParser(add_help=False, parents=[of_any])
    common.add_argument("--model", default="embedded", help=what)
    common.add_argument(
        "--prompt-tokens", type=_positive, default=16, help="tokens of each sequence that run in full (default 16)"
    )
    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument("--policy", type=Path, action="append", help="may be repeated; default: the shipped ones")
    chosen.add_argument("--actions", type=parse_actions, help="only the shipped ones with these actions")
    chosen.add_argument("--costs", type=Path, help="a cost table as .json; default: each policy's own")
    heads = [action.name for action in Action if action not in (Action.SKIP, Action.INT3)]
    subparsers = parser.add_subparsers(required=True)

    making = subparsers.add_parser(
        "make", parents=[of_any], help="round weights, train a policy, judge it and write a card, or go on with that"
    )
    making.add_argument("model", help=what)
    making.add_argument("--out", type=Path, required=True, help="folder for the policy, its table and its card")
    making.add_argument("--name", default="learned")
    making.add_argument("--held-out", type=Path, help="text to judge it on, like --data; default: some of --data")
    making.add_argument("--rounds", type=_positive, default=12, help="of training (default 12)")
    making.add_argument("--batches", type=_positive, default=24, help="of 8 sequences in a round (default 24)")
    making.set_defaults(run=partial(run_make, run=lambda arguments: _run(_parser().parse_args(arguments))))

    fit = subparsers.add_parser("fit", parents=[common], help="fit compensation and show what each kind costs and buys")
    fit.add_argument("--out", type=Path, required=True, help="folder for the compensation and the table")
    fit.add_argument("--ranks", type=_positive, nargs="+", default=[16, 48, 96], metavar="RANK")
    fit.add_argument("--block-size", type=_positive, default=1, help=argparse.SUPPRESS)
    fit.add_argument("--lookahead", type=_positive, default=1, help=argparse.SUPPRESS)
    fit.add_argument("--seed", type=int, default=0)
    fit.set_defaults(run=run_fit)

    training = subparsers.add_parser("train", parents=[common], help="train a policy, or go on with a stopped run")
    training.add_argument("--out", type=Path, required=True, help="folder for checkpoint, curve and policy")
    training.add_argument("--name", default="learned")
    training.add_argument(
        "--actions", type=parse_actions, help="default: skip,int4,int8,full, and int3 if it was quantized"
    )
    training.add_argument("--rounds", type=_positive, default=10, help="with a checkpoint after each (default 10)")
    training.add_argument("--batches", type=_positive, default=24, help="of 8 sequences in a round (default 24)")
    training.add_argument("--block-size", type=_positive, default=1, help="layers decided together (default 1)")
    training.add_argument(
        "--lookahead", type=_positive, default=1, help="layers between a decision and the state it sees (default 1)"
    )
    training.add_argument("--rank", type=_positive, default=96, help="of the compensation (default 96)")
    training.add_argument(
        "--tail", type=_positive_number, default=math.inf, metavar="NATS",
        help="a damage of so many counts twice, a larger one more (default: each counts as it is)",
    )  # fmt: skip
    training.add_argument("--compensation", type=Path, help="to start from: a file of fit, or a policy")
    training.add_argument("--drafter", action="store_true", help="a policy that drafts, for mode EXACT")
    training.add_argument(
        "--pinned-action",
        choices=("int3", "int4", "int8", "full"),
        default="full",
        help="of pinned layers (default full)",
    )
    narrow = "SKIP is the narrow head, whose map is fitted to the text"
    training.add_argument(
        "--head",
        choices=(*heads, Action.SKIP.name),
        default=Action.FULL.name,
        help=f"the head's precision (default FULL); {narrow}",
    )
    training.add_argument("--costs", type=Path, help="a cost table as .json; default: measured here")
    training.add_argument("--seed", type=int, default=0)
    training.set_defaults(run=run_train)

    search = subparsers.add_parser("search", parents=[common], help="find the best fixed plans at each cost")
    search.add_argument("--sequences", type=_positive, default=16, help="text to search on (default 16)")
    search.add_argument("--head", choices=heads, help="only plans with this precision of the head")
    search.add_argument(
        "--compensation", type=Path, help="of skipped layers: a file of fit, or a policy; default: affine"
    )
    search.add_argument("--costs", type=Path, help="a cost table as .json; default: measured here")
    search.add_argument("--json", type=Path, help="write the plans and the cost table there")
    search.set_defaults(run=run_search)

    evaluation = subparsers.add_parser(
        "evaluate", parents=[common, chosen], help="compare policies with their controls"
    )
    evaluation.add_argument("--budgets", type=parse_budgets, default=[0.9, 0.8, 0.7])
    evaluation.add_argument("--sequences", type=_positive, default=24)
    evaluation.add_argument(
        "--tasks", type=Path, help="questions as .jsonl, or a folder, to show accuracy at each budget"
    )
    evaluation.add_argument(
        "--last-words", type=Path, help="text with a paragraph a line, to show how often its last words are predicted"
    )
    evaluation.add_argument(
        "--refit-controls", type=_not_negative, default=0, metavar="STEPS", help="refit fixed plans with skips too"
    )
    evaluation.add_argument("--no-table", action="store_true", help="only --tasks and --last-words")
    evaluation.add_argument("--no-serving", action="store_true", help="leave out own text and speed")
    evaluation.add_argument("--json", type=Path, help="write the rows there")
    evaluation.add_argument("--plots", type=Path, help="folder for plots")
    evaluation.set_defaults(run=run_evaluate)

    calibration = subparsers.add_parser("calibrate", parents=[common, chosen], help="fit budgets anew to your text")
    calibration.add_argument("--out", type=Path, required=True, help="the file to write")
    calibration.add_argument("--sequences", type=_positive, default=24)
    calibration.add_argument(
        "--head",
        choices=(*heads, Action.SKIP.name),
        help=f"the head's precision from now on; default: as it was. {narrow} behind those sequences",
    )
    calibration.set_defaults(run=run_calibrate)

    inspection = subparsers.add_parser("inspect", parents=[common, chosen], help="show what policy files hold")
    inspection.set_defaults(run=run_inspect)

    quantization = subparsers.add_parser(
        "quantize", parents=[common], help="round weights by the inputs that they get, for later starts"
    )
    quantization.add_argument("--sequences", type=_positive, default=128, help="text to round by (default 128)")
    quantization.add_argument(
        "--actions", type=parse_rounded, default=[Action.INT4, Action.INT3], help="default: int4,int3"
    )
    quantization.set_defaults(run=run_quantize)

    costs = subparsers.add_parser("costs", parents=[common], help="show what each action costs on this device")
    costs.add_argument("--measure", action="store_true", help="measure again first, and keep that for later starts")
    costs.set_defaults(run=run_costs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
