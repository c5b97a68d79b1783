"""The network that learns: an actor in the form that serving runs, and a critic beside it.

Knows features and scores; knows no decoder and no rewards.
"""

import torch
from torch import Tensor, nn

from dash_runtime.actions import Action
from dash_runtime.policy.network import NUM_SCALAR_FEATURES, PolicyNetwork
from dash_runtime.policy.plan_spec import PlanSpec

WIDTH = 96
EMBEDDING_SIZE = 16
FULL_BIAS = 2.5


class _Network(nn.Module):
    """`PolicyNetwork`'s tensors as parameters; `outputs` is num_blocks, block_size, num_actions."""

    def __init__(self, hidden_size: int, outputs: tuple[int, int, int], generator: torch.Generator) -> None:
        super().__init__()
        num_features = hidden_size + 2 * EMBEDDING_SIZE + NUM_SCALAR_FEATURES

        def random(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * scale)

        self.block_embedding = random(outputs[0], EMBEDDING_SIZE, scale=0.5)
        self.action_embedding = random(len(Action), EMBEDDING_SIZE, scale=0.5)
        self.input_weight = random(WIDTH, num_features, scale=num_features**-0.5)
        self.input_bias = nn.Parameter(torch.zeros(WIDTH))
        self.output_weight = random(*outputs, WIDTH, scale=0.01)
        self.output_bias = nn.Parameter(torch.zeros(outputs))

    def view(self) -> PolicyNetwork:
        """Returns the same tensors as serving's network."""
        return PolicyNetwork(*(getattr(self, name) for name in PolicyNetwork.__slots__))


class ActorCritic(nn.Module):
    """Scores of the actions and the value of a state, from the same features.

    The scores start in favour of FULL, and the policy learns what it may leave out. With random decisions at the start,
    the effect of one of them on a token would drown in the noise of the others.
    """

    def __init__(self, spec: PlanSpec, hidden_size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        num_blocks = len(spec.decision_blocks)
        self.actor = _Network(hidden_size, (num_blocks, spec.block_size, len(spec.actions)), generator)
        self.critic = _Network(hidden_size, (num_blocks, 1, 1), generator)
        with torch.no_grad():
            self.actor.output_bias[..., spec.actions.index(Action.FULL)] = FULL_BIAS

    def forward(
        self, hidden: Tensor, last_actions: Tensor, cost_spent: Tensor, log_price: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns scores `[num_blocks, rows, block_size, num_actions]`, as `all_scores`, and values `[num_blocks,
        rows]`."""
        inputs = (hidden, last_actions, cost_spent, log_price)
        return self.actor.view().all_scores(*inputs), self.critic.view().all_scores(*inputs)[..., 0, 0]

    def network(self) -> PolicyNetwork:
        """Returns a copy of the actor for serving."""
        view = self.actor.view()
        return PolicyNetwork(*(getattr(view, name).detach().clone() for name in PolicyNetwork.__slots__))
