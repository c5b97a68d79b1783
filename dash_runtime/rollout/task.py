"""What paths are judged on: a model, the terms of a policy, and the outcome over some text.

Knows rollouts; knows no learning and no tables of results.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.full_path import full_outputs, parts_of
from dash_runtime.layers.compensation import Compensation
from dash_runtime.policy.network import PolicyNetwork
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.rollout.choices import greedy_choice, no_choice
from dash_runtime.rollout.rollout import Choose, Judged, Rollout, divergences, roll_out


@dataclass(frozen=True, slots=True)
class Task:
    """The model and the terms that a policy is trained or judged on."""

    decoder: Decoder
    spec: PlanSpec
    compensation: Compensation
    num_prompt_tokens: int

    def decided_rows(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Returns bool `[rows]`: False for the prompts."""
        return torch.tensor([place >= self.num_prompt_tokens for ids in sequences for place in range(len(ids))])

    def fixed(self, plan: Sequence[Action], head: Action) -> "Task":
        """Returns the task of a fixed plan at the same costs; `no_choice` rolls it out."""
        return replace(self, spec=PlanSpec.fixed(plan, head, self.spec.costs))

    def roll_out(
        self, sequences: Sequence[Sequence[int]], choose: Choose = no_choice, known: Sequence[Tensor] = ()
    ) -> Rollout:
        """Runs all rows; `choose` decides those after the prompts. `known` is as in `roll_out`."""
        rows = self.decided_rows(sequences)
        return roll_out(self.decoder, sequences, rows, self.spec, self.compensation, choose, known)

    def token_costs(self, rollout: Rollout, num_evaluations: int = 0) -> Tensor:
        """Returns the cost of each token `[rows]`, with the head, the rest and so many evaluations of a network."""
        return rollout.cost_spent[-1] + self.spec.costs.token_cost((), self.spec.head, num_evaluations)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Means over the decided tokens of one rollout."""

    cost: float
    divergence: float
    agreement: float
    acceptance: float


def outcome_of(judged: Judged, cost: Tensor) -> Outcome:
    """Returns the means; `cost` is by row, or already a mean."""
    means = (cost, judged.divergence, judged.agrees.float(), judged.acceptance)
    return Outcome(*(float(values.mean()) for values in means))


@torch.no_grad()
def path_outcome(
    task: Task,
    sequences: Sequence[Sequence[int]],
    choose: Choose = no_choice,
    full: Tensor | None = None,
    num_evaluations: int = 0,
) -> tuple[Outcome, Tensor]:
    """Returns the outcome of the paths that `choose` takes, and its actions `[num_layers, decided rows]`.

    Args:
        full: the `full_outputs` of the same sequences; None to compute them.
        num_evaluations: evaluations of a network by `choose` for one token.
    """
    if full is None:
        full = full_outputs(task.decoder, sequences)
    judged, costs, actions = [], [], []
    for part in parts_of(sequences):
        rows = task.decided_rows(part)
        rollout = task.roll_out(part, choose)
        own, full = full[: len(rows)], full[len(rows) :]
        judged.append(divergences(task.decoder, own[rows], rollout.states[-1][rows], task.spec.head))
        costs.append(task.token_costs(rollout, num_evaluations)[rows])
        actions.append(rollout.actions[:, rows])
    return outcome_of(Judged.joined(judged), torch.cat(costs)), torch.cat(actions, dim=1)


def greedy_outcome(
    task: Task,
    network: PolicyNetwork,
    sequences: Sequence[Sequence[int]],
    price: float,
    full: Tensor | None = None,
) -> tuple[Outcome, Tensor]:
    """Returns `path_outcome` of the policy that always takes its best action."""
    choose = greedy_choice(task.spec, network, torch.tensor(math.log(price)))
    return path_outcome(task, sequences, choose, full, task.spec.num_evaluations)
