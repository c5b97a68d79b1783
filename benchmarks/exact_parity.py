"""`python -m benchmarks.exact_parity`: compares EXACT's greedy tokens with full depth's, prompt by prompt.

It drafts even where that does not pay. At the first difference it prints how far apart the two tokens are at full
depth. Exits with 1 if any token differs in float32, where rounding is no excuse.
"""

import argparse
import os
from pathlib import Path

from benchmarks.exact import generate
from benchmarks.prompts import Prompts
from benchmarks.rounds import progress
from benchmarks.setting import FULL_DEPTH
from dash_runtime.checkpoints import default_cache_folder, resolve_checkpoint, tokenizer_file
from dash_runtime.config import EngineConfig, GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.engine.engine import Engine
from dash_runtime.events import TokenProduced
from dash_runtime.startup.build import BuildOptions, build_engine

_NUM_PROMPTS = 60
_CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exact_parity", description=__doc__)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--policy", help="what drafts; default: the default drafter, or the first policy")
    parser.add_argument("--budget", type=float, help="of the drafts")
    parser.add_argument("--prompts", type=int, default=_NUM_PROMPTS)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    cache_folder = default_cache_folder(os.environ)
    folder = resolve_checkpoint("embedded", None, cache_folder)
    engine = build_engine(
        folder, cache_folder, BuildOptions(["cpu"], options.precision, least_drafting_gain=0), EngineConfig(), progress
    )
    skip = SkipOptions(Mode.EXACT, options.budget, options.policy)
    prompts = _prompts(tokenizer_file(folder))[: options.prompts]
    num_equal, num_drafted, num_accepted = 0, 0, 0
    for number, prompt in enumerate(prompts):
        full = generate(engine, prompt, FULL_DEPTH, options.tokens)
        exact = generate(engine, prompt, skip, options.tokens)
        assert exact.speculation is not None
        num_drafted += exact.speculation.num_drafted
        num_accepted += exact.speculation.num_accepted
        if exact.token_ids == full.token_ids:
            num_equal += 1
            continue
        place = next(i for i, (a, b) in enumerate(zip(full.token_ids, exact.token_ids, strict=True)) if a != b)
        gap = _logprob_gap(engine, [*prompt, *full.token_ids[:place]], full.token_ids[place], exact.token_ids[place])
        progress(f"prompt {number} differs from token {place} on: the two are {gap:.4f} nats apart at full depth")
    progress(
        f"{options.precision}: {num_equal} of {len(prompts)} prompts have all {options.tokens} tokens of full depth; "
        f"{num_drafted} tokens drafted, {num_accepted} accepted"
    )
    raise SystemExit(int(options.precision == "float32" and num_equal < len(prompts)))


def _prompts(tokenizer: Path) -> list[list[int]]:
    """Returns the benchmark's own prompts, then those of the policies' training text."""
    own = Prompts(tokenizer)
    texts = (Path(__file__).parent.parent / "dash_runtime/training/prompts.txt").read_text().splitlines()
    return [*own.exact, *(own.encode(_CHAT.format(text)) for text in texts)]


def _logprob_gap(engine: Engine, prompt: list[int], preferred: int, other: int) -> float:
    """Returns by how many nats full depth prefers one next token to another, as far as its 20 best tokens tell."""
    engine.submit(GenerationRequest("gap", prompt, StoppingParameters(1), logprobs=20))
    events = []
    while engine.has_work:
        events += engine.step()
    (logprobs,) = (event.logprobs for event in events if isinstance(event, TokenProduced))
    assert logprobs is not None
    ranks = dict(logprobs.top)
    return ranks.get(preferred, min(ranks.values())) - ranks.get(other, min(ranks.values()))


if __name__ == "__main__":
    main()
