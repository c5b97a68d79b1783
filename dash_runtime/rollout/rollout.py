"""Rollouts: run many tokens at once through the layers, under teacher forcing, as serving would.

They use the same `run_layer`, key-value rule and lookahead state as `engine/step.py`; a test holds the two together. An
episode is one token's way through the layers. Knows the decoder and scores; knows no learning.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dash_runtime.actions import Action, CostTable
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.full_path import sequence_rows
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Compensation
from dash_runtime.policy.plan_spec import PlanSpec

Choose = Callable[[tuple[int, ...], Tensor, Tensor, Tensor], Tensor]
"""Maps `(layers of a block, hidden, last actions, cost spent)`, tensors with a row per token, to the actions of those
layers as int64 numbers, `[layers, rows]`."""

_LOGIT_ROWS = 128


@dataclass(frozen=True, slots=True)
class Rollout:
    """One path of every token. Rows follow one another sequence by sequence."""

    states: list[Tensor]
    """Each layer's input, and the last layer's output."""
    actions: Tensor
    """int64 `[num_layers, rows]`, as Action's numbers."""
    cost_spent: Tensor
    """float32 `[num_layers, rows]`: up to and including each layer."""


def costs_by_action(costs: CostTable) -> Tensor:
    """Returns the cost of one layer, float32, indexed by Action's number."""
    return torch.tensor([0.0, *(costs.layer.get(action, 0.0) for action in Action)])


@torch.no_grad()
def roll_out(
    decoder: Decoder,
    sequences: Sequence[Sequence[int]],
    decided_rows: Tensor,
    spec: PlanSpec,
    compensation: Compensation,
    choose: Choose,
    known: Sequence[Tensor] = (),
) -> Rollout:
    """Runs the tokens with the actions that `choose` takes for the rows of `decided_rows` (bool `[rows]`).

    The other rows (prompts and first tokens) run in full.

    Args:
        known: the first layers' inputs, if an earlier path with the same actions before them has them. Only the layers
            from the last of them on are run.
    """
    batch = sequence_rows(decoder, sequences, compensation, spec.kv_action)
    full = torch.full((batch.num_rows,), int(decoder.highest))
    layer_costs = costs_by_action(spec.costs)
    observed = {block[0] - spec.lookahead: block for block in spec.decision_blocks}
    decided: dict[int, Tensor] = {}
    states = list(known) or [decoder.embed([token_id for ids in sequences for token_id in ids])]
    spent = torch.zeros(batch.num_rows)
    all_actions, all_spent = [], []
    for layer in range(decoder.num_layers):
        pinned = spec.pinned.get(layer)
        actions = decided.pop(layer) if pinned is None else torch.where(decided_rows, int(pinned), full)
        spent = spent + layer_costs[actions]
        if layer in observed:
            block = observed[layer]
            chosen = torch.where(decided_rows, choose(block, states[layer], actions, spent), full)
            decided.update(zip(block, chosen, strict=True))
        if layer == len(states) - 1:
            states.append(decoder.run_layer(layer, [Action(number) for number in actions.tolist()], states[-1], batch))
        all_actions.append(actions)
        all_spent.append(spent)
    return Rollout(states, torch.stack(all_actions), torch.stack(all_spent))


@dataclass(frozen=True, slots=True)
class Judged:
    """The distance of paths from full depth, by row."""

    divergence: Tensor
    """KL(full-depth distribution ‖ theirs) in nats."""
    agrees: Tensor
    """True if both prefer the same token."""
    acceptance: Tensor
    """Probability that full depth accepts a token drawn from theirs: Σ min(p, q) (Leviathan et al. 2023, theorem
    3.5)."""

    @classmethod
    def joined(cls, parts: Sequence["Judged"]) -> "Judged":
        """Returns the rows of all parts, in order."""
        return cls(*(torch.cat([getattr(part, own.name) for part in parts]) for own in fields(cls)))


@torch.no_grad()
def divergences(decoder: Decoder, full: Tensor, ours: Tensor, head: Action) -> Judged:
    """Judges last-layer outputs, `[rows, hidden_size]`. The full path uses the full head, ours `head`.

    `ours` may hold several paths of the same rows, one after another.
    """
    paths = ours.view(-1, *full.shape)
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(full), _LOGIT_ROWS):
        rows = slice(start, start + _LOGIT_ROWS)
        count = len(full[rows])
        reference = torch.log_softmax(
            decoder.logits(full[rows], (decoder.finest_head,) * count, PassKind.PREFILL), dim=-1
        )
        probabilities, best = reference.exp(), reference.argmax(-1)
        entropy = -torch.linalg.vecdot(probabilities, reference)
        by_path: list[tuple[Tensor, ...]] = []
        for path in paths:
            logits = decoder.logits(path[rows], (head,) * count, PassKind.PREFILL)
            # Σ p · (log p − log q), without a table of log q: Σ p · log q = Σ p · logits − logsumexp(logits).
            cross = logits.logsumexp(-1) - torch.linalg.vecdot(probabilities, logits)
            acceptance = torch.minimum(probabilities, logits.softmax(-1)).sum(-1)
            by_path.append((cross - entropy, logits.argmax(-1) == best, acceptance))
        parts.append(tuple(torch.stack(values) for values in zip(*by_path, strict=True)))
    return Judged(*(torch.cat(tensors, dim=-1).flatten() for tensors in zip(*parts, strict=True)))
