"""Fits a policy's network to measured damages, by regression on their mean.

Damages are very skewed: most tokens lose next to nothing, a few lose nats, and a single measurement is off by a factor.
Gamma deviance fits the mean of such data and minds a factor as much where damages are small, which is where skips are.
Knows labels and the network; knows no model and no text.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dash_runtime.actions import Action
from dash_runtime.policy.network import MAX_LOG_DAMAGE, PolicyNetwork
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.training.labels import Labels
from dash_runtime.training.loss import TrainingDiverged

_NOTHING = -20.0
"""Log damage of the most precise action, by which the others are judged."""
_FIRST_LOG_DAMAGE = {Action.SKIP: -3.0, Action.INT3: -5.0, Action.INT4: -7.0, Action.INT8: -8.0}
_LARGEST = 3.0
"""Nats at which a label is cut: a few tokens would outweigh all others."""
_LEAST_OUTPUT = -12.0


@dataclass(frozen=True, slots=True)
class FitSettings:
    """Settings of the regression: each batch of labels is fitted in `steps` steps of `rows_per_step` of its rows.

    `tail` is in nats: a damage of as many counts twice (`harm`).
    """

    width: int = 64
    inner_width: int = 32
    steps: int = 6
    rows_per_step: int = 4096
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.01
    tail: float = math.inf


class DamageModel(nn.Module):
    """The trainable form of a `PolicyNetwork`."""

    def __init__(self, spec: PlanSpec, hidden_size: int, settings: FitSettings) -> None:
        super().__init__()
        blocks, actions = len(spec.decision_blocks), len(spec.actions)
        width, inner_width = settings.width, settings.inner_width
        shapes = PolicyNetwork.shapes(blocks, spec.block_size, actions, hidden_size, len(Action), width, inner_width)
        self.hidden_weight = nn.Parameter(torch.randn(shapes["hidden_weight"]) * 0.5 * hidden_size**-0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(shapes["hidden_bias"]))
        self.fact_weight = nn.Parameter(torch.randn(shapes["fact_weight"]) * 0.05)
        self.inner_weight = nn.Parameter(torch.randn(shapes["inner_weight"]) * width**-0.5)
        self.inner_bias = nn.Parameter(torch.zeros(shapes["inner_bias"]))
        first = torch.randn(actions, inner_width) * 0.5 * inner_width**-0.5
        self.output_weight = nn.Parameter(first.expand(shapes["output_weight"]).clone())
        bias = torch.tensor([_FIRST_LOG_DAMAGE.get(action, _NOTHING) for action in spec.actions])
        self.output_bias = nn.Parameter(bias.expand(shapes["output_bias"]).clone())
        self._precise = spec.actions.index(max(spec.actions))

    def forward(self, labels: Labels) -> Tensor:
        """Returns log damages, `[rows, num_actions]`."""
        state = labels.hidden.float()
        state = functional.rms_norm(state, state.shape[-1:], eps=1e-12)
        known = self.hidden_bias[labels.block] + torch.einsum(
            "rf,rfw->rw", labels.facts, self.fact_weight[labels.block]
        )
        features = functional.silu(known + functional.linear(state, self.hidden_weight))
        inner = functional.silu(functional.linear(features, self.inner_weight) + self.inner_bias[labels.block])
        weight = self.output_weight[labels.block, labels.layer_place]
        outputs = torch.einsum("rw,raw->ra", inner, weight) + self.output_bias[labels.block, labels.layer_place]
        outputs = outputs.clamp(_LEAST_OUTPUT, MAX_LOG_DAMAGE)
        is_precise = torch.arange(outputs.shape[1]) == self._precise
        return outputs.masked_fill(is_precise, _NOTHING)

    @torch.no_grad()
    def network(self) -> PolicyNetwork:
        """Returns a copy of the network."""
        weight, bias = self.output_weight.clone(), self.output_bias.clone()
        weight[:, :, self._precise], bias[:, :, self._precise] = 0.0, _NOTHING
        own = {name: parameter.clone() for name, parameter in self.named_parameters()}
        return PolicyNetwork(**(own | {"output_weight": weight, "output_bias": bias}))


def harm(damage: Tensor, tail: float) -> Tensor:
    """Returns what damages count, in nats: more than their size, the larger they are.

    Many tokens that are a little off leave an answer as it was. One that is far off may spoil all of it, though both
    are as many nats in the mean.
    """
    kept = damage.clamp(max=_LARGEST)
    return kept * (1 + kept / tail)


def harm_slope(damage: Tensor, tail: float) -> Tensor:
    """Returns the slope of `harm`. Where that is cut, it is the one at the cut: such tokens go on to count."""
    return 1 + 2 * damage.clamp(max=_LARGEST) / tail


def deviance(outputs: Tensor, labels: Labels, tail: float) -> Tensor:
    """Returns the mean gamma deviance of the predicted log damages, up to a constant."""
    predicted = outputs.gather(1, labels.action.unsqueeze(1)).squeeze(1)
    return (harm(labels.damage, tail) * (-predicted).exp() + predicted).mean()


class DamageFit:
    """A regression that goes on with every batch of labels."""

    def __init__(self, model: DamageModel, settings: FitSettings) -> None:
        self.model = model
        self._settings = settings
        self.optimizer = torch.optim.AdamW(
            model.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
        )

    def add(self, labels: Labels, rate: float, generator: torch.Generator) -> None:
        """Fits a batch, at this share of the learning rate.

        Raises:
            TrainingDiverged: the deviance is not a number.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * rate
        num_rows = len(labels.damage)
        for _ in range(self._settings.steps):
            picked = torch.randint(num_rows, (min(self._settings.rows_per_step, num_rows),), generator=generator)
            batch = labels.rows(picked)
            loss = deviance(self.model(batch), batch, self._settings.tail)
            if not loss.isfinite():
                raise TrainingDiverged("the deviance of the predicted damages is not a number")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
