"""The straight-through control as a policy: the same network as PPO's actor, trained by `straight_through.py`.

Knows the network and the task; knows no files.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from dash_runtime.actions import Action
from dash_runtime.errors import ConfigError
from dash_runtime.layers.compensation import LowRank
from dash_runtime.rollout.task import Task
from dash_runtime.training.actor_critic import ActorCritic
from dash_runtime.training.differentiable_decoder import DifferentiableDecoder
from dash_runtime.training.ppo import PpoSettings
from dash_runtime.training.progress_display import ProgressDisplay
from dash_runtime.training.straight_through import StraightThroughSettings, train_router
from dash_runtime.training.train import Trained


class ActorRouter:
    """PPO's actor as a `Router`."""

    def __init__(self, model: ActorCritic, blocks: Sequence[tuple[int, ...]]) -> None:
        self.decision_blocks = blocks
        self._model = model

    def scores(self, block: int, hidden: Tensor, last_actions: Tensor, cost_spent: Tensor, log_price: Tensor) -> Tensor:
        network = self._model.actor.view()
        scores = network.scores(block, hidden, last_actions, cost_spent, log_price)
        return scores[:, : len(self.decision_blocks[block])]

    def parameters(self) -> Iterable[nn.Parameter]:
        return self._model.actor.parameters()


def train_straight_through(
    task: Task,
    compensation: LowRank,
    decoder: DifferentiableDecoder,
    sequences: Sequence[Sequence[int]],
    iterations: int,
    seed: int,
) -> Trained:
    """Trains the control on the task; the compensation does not change.

    Raises:
        ConfigError: the task has other actions than SKIP and FULL.
        TrainingDiverged: the loss is not a number.
    """
    spec = task.spec
    if spec.actions != (Action.SKIP, Action.FULL):
        raise ConfigError("actions", "must be skip,full for the straight-through learner")
    hidden_size = task.decoder.config.hidden_size
    model = ActorCritic(spec, hidden_size, seed)
    settings = StraightThroughSettings(
        iterations,
        seed=seed,
        num_prompt_tokens=task.num_prompt_tokens,
        lookahead=spec.lookahead,
        price_range=PpoSettings().price_range,
    )
    with ProgressDisplay(iterations) as display:

        def progress(iteration: int, price: float, cost: float, divergence: float) -> None:
            display.update(iteration, price, cost, divergence, float("nan"))

        router = ActorRouter(model, spec.decision_blocks)
        train_router(decoder, router, sequences, compensation, spec.costs, settings, progress)
    return Trained(model.network(), compensation)
