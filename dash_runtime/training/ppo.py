"""PPO (Schulman et al. 2017) over layers: rewards, advantages, and the clipped update.

An episode is one token's way through the layers, undiscounted. Knows rollouts and the network; knows no files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.actions import Action, CostTable
from dash_runtime.decoder.compensation import Compensation
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.errors import DashRuntimeError
from dash_runtime.training.actor_critic import ActorCritic
from dash_runtime.training.rollout import Rollout, costs_by_action, divergences, full_path, roll_out


class TrainingDiverged(DashRuntimeError):
    """A loss is not a number; the last checkpoint is the last good one."""


@dataclass(frozen=True, slots=True)
class Task:
    """What does not change while a policy is trained. Layers below `lookahead` must be pinned."""

    decoder: Decoder
    actions: tuple[Action, ...]
    pinned: frozenset[int]
    lookahead: int
    head: Action
    compensation: Compensation
    costs: CostTable
    num_prompt_tokens: int

    @property
    def free_layers(self) -> list[int]:
        return [layer for layer in range(self.decoder.num_layers) if layer not in self.pinned]

    def decided_rows(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """bool `[rows]`: all but the prompts."""
        return torch.tensor([place >= self.num_prompt_tokens for ids in sequences for place in range(len(ids))])


@dataclass(frozen=True, slots=True)
class PpoSettings:
    """`price_range` bounds λ, the price of a whole token's cost; `shaping` is the reward's w."""

    price_range: tuple[float, float] = (0.2, 8.0)
    divergence_limit: float = 4.0
    shaping: float = 0.3
    gae_lambda: float = 0.95
    clip: float = 0.2
    epochs: int = 2
    minibatch_rows: int = 4096
    entropy_start: float = 0.02
    entropy_floor: float = 0.003
    value_weight: float = 0.5


@dataclass(frozen=True, slots=True)
class Experience:
    """Steps of decided rows at free layers, flattened to `[steps]` with layers outermost."""

    hidden: Tensor
    layers: Tensor
    last_actions: Tensor
    cost_spent: Tensor
    log_price: Tensor
    chosen: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """Means over the decided tokens of one rollout."""

    cost: float
    divergence: float
    agreement: float


def collect(
    task: Task, model: ActorCritic, sequences: Sequence[Sequence[int]], log_price: Tensor, settings: PpoSettings
) -> tuple[Experience, Outcome]:
    """Samples one path for every token at its row's price (`log_price` is `[rows]`) and scores it."""
    rows = task.decided_rows(sequences)
    full = full_path(task.decoder, sequences)
    steps: dict[int, tuple[Tensor, ...]] = {}
    numbers = torch.tensor([int(action) for action in task.actions])

    def choose(layer: int, hidden: Tensor, last_actions: Tensor, spent: Tensor) -> Tensor:
        layers = torch.full((len(hidden),), layer)
        scores, values = model(hidden, layers, last_actions, spent, log_price)
        log_probs = torch.log_softmax(scores, dim=-1)
        index = torch.distributions.Categorical(logits=scores).sample()
        taken = log_probs.gather(1, index.unsqueeze(1)).squeeze(1)
        steps[layer] = (hidden, layers, last_actions, spent, index, taken, values)
        return numbers[index]

    rollout = roll_out(
        task.decoder, sequences, rows, task.pinned, task.lookahead, task.compensation, task.costs, choose
    )
    kl, agree = divergences(task.decoder, full[-1][rows], rollout.states[-1][rows], task.head)
    price = log_price[rows].exp()
    rewards = _rewards(task, full, rollout, rows, price, kl, settings)
    values = torch.stack([steps[layer][6][rows] for layer in task.free_layers])
    advantages = _advantages(rewards, values, settings.gae_lambda)

    def flat(place: int) -> Tensor:
        return torch.cat([steps[layer][place][rows] for layer in task.free_layers])

    experience = Experience(
        hidden=flat(0),
        layers=flat(1),
        last_actions=flat(2),
        cost_spent=flat(3),
        log_price=log_price[rows].repeat(len(task.free_layers)),
        chosen=flat(4),
        log_probs=flat(5),
        advantages=advantages.flatten(),
        returns=(advantages + values).flatten(),
    )
    cost = token_costs(task, rollout)[rows].mean()
    return experience, Outcome(float(cost), float(kl.mean()), float(agree.float().mean()))


def token_costs(task: Task, rollout: Rollout) -> Tensor:
    """The cost of each token, head and the rest included, `[rows]`."""
    return rollout.cost_spent[-1] + task.costs.head[task.head] + task.costs.fixed


def _rewards(
    task: Task, full: list[Tensor], rollout: Rollout, rows: Tensor, price: Tensor, kl: Tensor, settings: PpoSettings
) -> Tensor:
    """`[free layers, rows]`: −λ·c − w·(D after − D before) for each decision, and at the last one the divergence.

    D is 1 − cosine to the full path's state; it enters as a potential that ends at 0 (Ng et al. 1999), so that
    it leads the way without moving the optimum. Divided by 0.3 + λ, so that prices weigh alike in the loss.
    """
    distance = torch.stack(
        [
            1 - functional.cosine_similarity(f[rows].float(), o[rows].float(), dim=-1)
            for f, o in zip(full, rollout.states, strict=True)
        ]
    )
    free = task.free_layers
    rewards = -price * costs_by_action(task.costs)[rollout.actions[free][:, rows]]
    ends = [*free[1:], None]
    for step, (layer, following) in enumerate(zip(free, ends, strict=True)):
        after = torch.zeros_like(price) if following is None else distance[following]
        rewards[step] -= settings.shaping * (after - distance[layer])
    rewards[-1] -= kl.clamp(max=settings.divergence_limit)
    return rewards / (0.3 + price)


def _advantages(rewards: Tensor, values: Tensor, gae_lambda: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016) with γ = 1, over `[steps, rows]`."""
    advantages = torch.zeros_like(rewards)
    following_value, following_advantage = torch.zeros_like(rewards[0]), torch.zeros_like(rewards[0])
    for step in reversed(range(len(rewards))):
        delta = rewards[step] + following_value - values[step]
        following_advantage = delta + gae_lambda * following_advantage
        advantages[step] = following_advantage
        following_value = values[step]
    return advantages


def update(
    model: ActorCritic,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    entropy_weight: float,
    settings: PpoSettings,
    generator: torch.Generator,
) -> None:
    """A few epochs of clipped policy steps over the experience.

    Raises:
        TrainingDiverged: the loss is not finite; the parameters are as before that step.
    """
    advantages = (experience.advantages - experience.advantages.mean()) / (experience.advantages.std() + 1e-6)
    inputs = (
        experience.hidden,
        experience.layers,
        experience.last_actions,
        experience.cost_spent,
        experience.log_price,
    )
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(advantages), generator=generator).split(settings.minibatch_rows):
            scores, values = model(*(tensor[rows] for tensor in inputs))
            log_probs = torch.log_softmax(scores, dim=-1)
            taken = log_probs.gather(1, experience.chosen[rows].unsqueeze(1)).squeeze(1)
            ratio = (taken - experience.log_probs[rows]).exp()
            clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
            gain = torch.minimum(ratio * advantages[rows], clipped * advantages[rows]).mean()
            entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
            value_loss = functional.mse_loss(values, experience.returns[rows])
            loss = settings.value_weight * value_loss - gain - entropy_weight * entropy
            if not loss.isfinite():
                raise TrainingDiverged("the loss is not a number; the last checkpoint is kept")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
