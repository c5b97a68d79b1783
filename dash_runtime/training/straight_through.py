"""Trains a router by straight-through gates (Bengio et al. 2013; Maddison et al. 2017): the control for PPO.

The gate of a layer is drawn and runs hard, 0 or 1, and passes its gradient as if it were soft. The loss is the price
of the cost plus the divergence, differentiated through the frozen model. Knows SKIP and FULL, blocks and costs; knows
no network (a Protocol stands for it) and no files.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dash_runtime.actions import Action, CostTable
from dash_runtime.errors import ConfigError
from dash_runtime.training.differentiable_decoder import (
    Compensate,
    DifferentiableDecoder,
    all_full,
    pass_on,
    row_divergences,
    token_batch,
)
from dash_runtime.training.ppo import TrainingDiverged, scheduled


class Router(Protocol):
    """Scores SKIP and FULL for blocks of layers that are decided together."""

    decision_blocks: Sequence[tuple[int, ...]]
    """Free layers, ascending; the layers in no block run in full."""

    def scores(self, block: int, hidden: Tensor, last_actions: Tensor, cost_spent: Tensor, log_price: Tensor) -> Tensor:
        """Returns float32 `[rows, len(decision_blocks[block]), 2]`, SKIP first.

        `hidden` `[rows, hidden_size]` is the input of the observed layer, `lookahead` before the block's first one. The
        rest is `[rows]`: the observed layer's Action numbers (int64), the cost up to and including it, log λ.
        """

    def parameters(self) -> Iterable[nn.Parameter]:
        """Returns the parameters to train."""


@dataclass(frozen=True, slots=True)
class StraightThroughSettings:
    """`price_range` bounds λ, the price of a whole token's cost, drawn log-uniformly for each sequence.

    The soft gate's temperature goes from `temperature_start` to `temperature_end`. `is_state_detached` stops gradients
    from a block's scores into the layers before it: the state is then an observation, as in PPO.
    """

    iterations: int = 240
    sequences_per_iteration: int = 8
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    seed: int = 0
    num_prompt_tokens: int = 16
    lookahead: int = 1
    price_range: tuple[float, float] = (0.2, 8.0)
    temperature_start: float = 1.0
    temperature_end: float = 0.5
    gradient_limit: float = 0.5
    is_state_detached: bool = True

    def __post_init__(self) -> None:
        for name in ("iterations", "sequences_per_iteration", "lookahead"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "temperature_start", "temperature_end", "gradient_limit"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(name, f"must be above 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.final_learning_rate < math.inf:
            raise ConfigError("final_learning_rate", f"must be finite and not negative, got {self.final_learning_rate}")
        low, high = self.price_range
        if not 0 < low <= high < math.inf:
            raise ConfigError("price_range", f"must be two ascending prices above 0, got {self.price_range}")
        if self.num_prompt_tokens < 0:
            raise ConfigError("num_prompt_tokens", f"must not be negative, got {self.num_prompt_tokens}")


RouterProgress = Callable[[int, float, float, float], None]
"""Called with the iteration and the means over its decided tokens: λ, cost, divergence in nats."""


def train_router(
    decoder: DifferentiableDecoder,
    router: Router,
    sequences: Sequence[Sequence[int]],
    compensate: Compensate,
    costs: CostTable,
    settings: StraightThroughSettings,
    progress: RouterProgress,
) -> None:
    """Trains the router's parameters in place, on sequences that are all of one length.

    The loss of a sequence is the mean of `λ · cost + divergence` over its decided tokens, divided by 0.3 + λ, so that
    prices weigh alike. A token's cost covers its layers, the full head and the rest, as a share of full depth. The same
    router, sequences and seed give the same result.

    Raises:
        ConfigError: the sequences or the router's blocks are unusable, or the costs have none for SKIP.
        TrainingDiverged: the loss or its gradient is not a number; the parameters are as before that iteration.
    """
    num_prompt_tokens = settings.num_prompt_tokens
    token_batch(sequences, num_prompt_tokens)
    parameters = list(router.parameters())
    optimizer = torch.optim.Adam(parameters, settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    low, high = (math.log(price) for price in settings.price_range)
    for iteration in range(settings.iterations):
        share = iteration / settings.iterations
        for group in optimizer.param_groups:
            group["lr"] = scheduled(settings.learning_rate, settings.final_learning_rate, share)
        temperature = scheduled(settings.temperature_start, settings.temperature_end, share)
        picked = torch.randperm(len(sequences), generator=generator)[: settings.sequences_per_iteration].tolist()
        token_ids = token_batch([sequences[index] for index in picked], num_prompt_tokens)
        log_price = torch.empty(len(picked)).uniform_(low, high, generator=generator).to(decoder.device)
        draw = Draw(temperature, generator)
        gates = RouterGates(
            router, costs, log_price, num_prompt_tokens, settings.lookahead, decoder.num_layers, draw,
            is_state_detached=settings.is_state_detached,
        )  # fmt: skip
        with torch.no_grad():
            full = decoder.run(token_ids, all_full, pass_on)[:, num_prompt_tokens:]
        ours = decoder.run(token_ids, gates, compensate)[:, num_prompt_tokens:]
        divergence = row_divergences(decoder, full.flatten(0, 1), ours.flatten(0, 1)).view(gates.spent.shape)
        cost = gates.spent + costs.head[Action.FULL] + costs.fixed
        price = log_price.exp()
        loss = ((price * cost.mean(dim=1) + divergence.mean(dim=1)) / (0.3 + price)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_limit)
        if not (loss.isfinite() and norm.isfinite()):
            raise TrainingDiverged(f"the loss in iteration {iteration} of the router is not a number")
        optimizer.step()
        progress(iteration, *(float(part.detach().mean()) for part in (price, cost, divergence)))


@dataclass(frozen=True, slots=True)
class Draw:
    """Draws hard gates from margins: FULL with the probability `sigmoid(margin)`, as a categorical actor does.

    Without a generator there is no noise, and the better score wins.
    """

    temperature: float
    generator: torch.Generator | None = None

    def __call__(self, margins: Tensor) -> Tensor:
        """Returns zeros and ones in `margins`' shape, with the slope of `sigmoid((margin + noise) / temperature)`."""
        noisy = margins
        if self.generator is not None:
            uniform = torch.rand(margins.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6)
            noisy = margins + torch.logit(uniform).to(margins.device)
        soft = torch.sigmoid(noisy / self.temperature)
        # The bracket is an exact 0: the gate is 0 or 1, as in serving.
        return (noisy > 0).to(soft.dtype) + (soft - soft.detach())


class RouterGates:
    """The gates of one pass: each block is decided from an earlier layer's input, as in `rollout.roll_out`.

    Prompt tokens and the layers outside the blocks run in full. After the pass `spent` is the cost of all layers,
    float32 `[batch, decided tokens]`, differentiable; `gates` holds each free layer's 0s and 1s in that shape.

    Args:
        log_price: log λ of each sequence, `[batch]`.
    """

    def __init__(
        self,
        router: Router,
        costs: CostTable,
        log_price: Tensor,
        num_prompt_tokens: int,
        lookahead: int,
        num_layers: int,
        draw: Draw,
        *,
        is_state_detached: bool = True,
    ) -> None:
        _check_blocks(router.decision_blocks, lookahead, num_layers)
        if Action.SKIP not in costs.layer:
            raise ConfigError("cost_table.layer", "has no cost for SKIP")
        self._router = router
        self._skip_cost, self._full_cost = costs.layer[Action.SKIP], costs.layer[Action.FULL]
        self._log_price = log_price
        self._num_prompt_tokens = num_prompt_tokens
        self._draw = draw
        self._is_state_detached = is_state_detached
        self._block_seen_at = {block[0] - lookahead: number for number, block in enumerate(router.decision_blocks)}
        self.gates: dict[int, Tensor] = {}
        self.spent = torch.zeros(0)

    def __call__(self, layer: int, hidden: Tensor) -> Tensor | None:
        batch, length, hidden_size = hidden.shape
        decided = length - self._num_prompt_tokens
        if layer == 0:
            self.gates = {}
            self.spent = torch.zeros((batch, decided), device=hidden.device)
        gate = self.gates.get(layer)
        share = torch.ones((batch, decided), device=hidden.device) if gate is None else gate
        self.spent = self.spent + self._skip_cost + share * (self._full_cost - self._skip_cost)
        number = self._block_seen_at.get(layer)
        if number is not None:
            state, spent = hidden[:, self._num_prompt_tokens :].reshape(-1, hidden_size), self.spent.flatten()
            if self._is_state_detached:
                state, spent = state.detach(), spent.detach()
            actions = torch.where(share.flatten() > 0.5, int(Action.FULL), int(Action.SKIP))
            scores = self._router.scores(number, state, actions, spent, self._log_price.repeat_interleave(decided))
            drawn = self._draw(scores[..., 1] - scores[..., 0]).view(batch, decided, -1)
            self.gates |= {own: drawn[..., place] for place, own in enumerate(self._router.decision_blocks[number])}
        if gate is None:
            return None
        prompts = torch.ones((batch, self._num_prompt_tokens), dtype=gate.dtype, device=gate.device)
        return torch.cat((prompts, gate), dim=1).unsqueeze(-1)


def _check_blocks(blocks: Sequence[tuple[int, ...]], lookahead: int, num_layers: int) -> None:
    layers = [layer for block in blocks for layer in block]
    if not all(blocks) or not layers or layers != sorted(set(layers)):
        raise ConfigError("blocks", f"must be ascending layers without repeats, got {list(blocks)}")
    if layers[0] < lookahead or layers[-1] >= num_layers:
        raise ConfigError("blocks", f"must lie within layers {lookahead} to {num_layers - 1}, got {list(blocks)}")
