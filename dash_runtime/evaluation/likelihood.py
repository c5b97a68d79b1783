"""Log-likelihoods of given continuations under teacher forcing, along the path of a policy or a fixed plan.

As in serving, the given tokens run at full depth, so the first token after them is a full-depth one, unless a passage
or a runner says otherwise. Knows rollouts and token ids; knows no questions and no networks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, takewhile

import torch
from torch import Tensor

from dash_runtime.actions import Action, CostTable
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.errors import ConfigError
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Compensation
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy import FixedPlan, full_depth
from dash_runtime.rollout.choices import no_choice
from dash_runtime.rollout.rollout import Choose, roll_out

Encode = Callable[[str], Sequence[int]]
"""Encodes text to token ids, with the model's prefix (a BOS token) before it and nothing after it."""

_LOGIT_ROWS = 128
"""Rows whose logits are in memory at once."""


@dataclass(frozen=True, slots=True)
class Passage:
    """Token ids: the first `num_given` (at least one) are given, the others (at least one) are scored.

    The first `num_prompt` run at full depth; None: all that are given, as in serving. With fewer, the rest of the given
    ones runs as if the model had written them.
    """

    token_ids: Sequence[int]
    num_given: int
    num_prompt: int | None = None


@dataclass(frozen=True, slots=True)
class PassageScore:
    """The score of one passage."""

    log_probs: Tensor
    """float32 `[scored tokens]`."""
    is_greedy: bool
    """True if each scored token was the likeliest."""
    num_decided: int
    total_cost: float
    """Summed over the decided tokens."""


Run = Callable[[Sequence[Passage]], list[PassageScore]]
"""Scores passages under teacher forcing, in their order."""


TokenPath = Callable[[Sequence[Sequence[int]], Tensor], tuple[Tensor, Tensor]]
"""Runs sequences of token ids in which the rows of a bool `[rows]` are decided, and the others run in full. Returns the
last layer's outputs, `[rows, hidden_size]`, and the costs of the tokens, `[rows]`."""


def full_depth_runner(decoder: Decoder, costs: CostTable, *, context_length: int, max_rows: int = 1024) -> Run:
    """Returns a runner of full depth."""
    plan = full_depth(costs.num_layers)
    return plan_runner(decoder, plan, costs, context_length=context_length, max_rows=max_rows)


def plan_runner(
    decoder: Decoder,
    plan: FixedPlan,
    costs: CostTable,
    *,
    context_length: int,
    decides_first: bool = False,
    max_rows: int = 1024,
) -> Run:
    """Returns a runner of a fixed plan. Arguments and errors are those of `rollout_runner`."""
    return rollout_runner(
        decoder,
        PlanSpec.fixed(plan.plan, plan.head, costs),
        plan.compensation,
        no_choice,
        context_length=context_length,
        decides_first=decides_first,
        max_rows=max_rows,
    )


def rollout_runner(
    decoder: Decoder,
    spec: PlanSpec,
    compensation: Compensation,
    choose: Choose,
    *,
    context_length: int,
    decides_first: bool = False,
    max_rows: int = 1024,
    num_evaluations: int = 0,
) -> Run:
    """Returns a runner of the path that `choose` decides. It runs several passages in one rollout.

    Args:
        spec: its head applies to the decided tokens; the others have the full head.
        context_length: positions that the decoder was made for.
        decides_first: let `choose` also decide the last given token, which predicts the first scored one. Serving
            never does.
        max_rows: tokens in one rollout; a longer passage goes alone.
        num_evaluations: evaluations of a network by `choose` for one token, which count in its cost.

    Raises (the returned function):
        ConfigError: a passage does not fit the context.
    """
    rest = spec.costs.token_cost((), spec.head, num_evaluations)

    def path(sequences: Sequence[Sequence[int]], decided: Tensor) -> tuple[Tensor, Tensor]:
        rollout = roll_out(decoder, sequences, decided, spec, compensation, choose)
        return rollout.states[-1], rollout.cost_spent[-1].cpu() + rest

    return _runner(decoder, path, spec.head, context_length, decides_first, max_rows)


def _runner(
    decoder: Decoder, path: TokenPath, head: Action, context_length: int, decides_first: bool, max_rows: int
) -> Run:
    @torch.no_grad()
    def run_together(passages: Sequence[Passage]) -> Iterator[PassageScore]:
        inputs = [passage.token_ids[:-1] for passage in passages]  # nothing follows the last token
        firsts = [passage.num_given - 1 for passage in passages]
        decided_from = [_first_decided(passage, decides_first) for passage in passages]
        decided = [place >= start for ids, start in zip(inputs, decided_from, strict=True) for place in range(len(ids))]
        outputs, token_costs = path(inputs, torch.tensor(decided))
        spans = list(pairwise(accumulate((len(ids) for ids in inputs), initial=0)))
        rows = [row for first, (start, end) in zip(firsts, spans, strict=True) for row in range(start + first, end)]
        targets = [token_id for passage in passages for token_id in passage.token_ids[passage.num_given :]]
        heads = [head if decided[row] else Action.FULL for row in rows]
        log_probs, is_best = _score_rows(decoder, outputs, rows, targets, heads)
        lengths = [len(passage.token_ids) - passage.num_given for passage in passages]
        parts = zip(log_probs.split(lengths), is_best.split(lengths), strict=True)
        for (own, best), (start, end), first in zip(parts, spans, decided_from, strict=True):
            paid = token_costs[start + first : end]
            yield PassageScore(own, bool(best.all()), len(paid), float(paid.sum()))

    def run(passages: Sequence[Passage]) -> list[PassageScore]:
        for passage in passages:
            if len(passage.token_ids) - 1 > context_length:
                raise ConfigError(
                    "context_length",
                    f"is {context_length}, but a prompt and its continuation have {len(passage.token_ids)} tokens",
                )
        return [score for together in _batches(passages, max_rows) for score in run_together(together)]

    return run


def _first_decided(passage: Passage, decides_first: bool) -> int:
    if passage.num_prompt is not None:
        return passage.num_prompt
    return passage.num_given - 1 if decides_first else passage.num_given


def _batches(passages: Sequence[Passage], max_rows: int) -> Iterator[list[Passage]]:
    batch: list[Passage] = []
    num_rows = 0
    for passage in passages:
        if batch and num_rows + len(passage.token_ids) > max_rows:
            yield batch
            batch, num_rows = [], 0
        batch.append(passage)
        num_rows += len(passage.token_ids)
    if batch:
        yield batch


def _score_rows(
    decoder: Decoder, hidden: Tensor, rows: list[int], targets: list[int], heads: list[Action]
) -> tuple[Tensor, Tensor]:
    """Returns the targets' log-probabilities, and True for those that are the likeliest token, on the CPU;
    `[len(rows)]` each."""
    log_probs, is_best = [], []
    for start in range(0, len(rows), _LOGIT_ROWS):
        part = slice(start, start + _LOGIT_ROWS)
        logits = decoder.logits(hidden[rows[part]], heads[part], PassKind.PREFILL)
        wanted = torch.tensor(targets[part], device=logits.device)
        own = logits.gather(1, wanted.unsqueeze(1)).squeeze(1)
        log_probs.append((own - logits.logsumexp(dim=-1)).cpu())
        is_best.append((logits.argmax(dim=-1) == wanted).cpu())
    return torch.cat(log_probs), torch.cat(is_best)


def passage_of(encode: Encode, prompt: str, continuation: str) -> Passage:
    """Returns the tokens of both texts together; those from the first difference to the prompt's own are scored.

    Raises:
        ConfigError: the prompt has no token of its own, or the continuation adds none.
    """
    given, together = encode(prompt), encode(prompt + continuation)
    # A tokenizer may join the prompt's end and the continuation's start in one token: it is scored.
    num_given = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(given, together, strict=False)))
    if not 0 < num_given < len(together):
        missing = "has no token of its own before" if num_given == 0 else "is not made longer by"
        raise ConfigError("tasks", f"the prompt {prompt!r:.80} {missing} {continuation!r:.80}")
    return Passage(together, num_given)
