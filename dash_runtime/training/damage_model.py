"""Fits a policy's network to measured damages, by regression on their mean.

Damages are very skewed: most tokens lose next to nothing, a few lose nats. Poisson deviance fits the mean of such data
and never predicts a negative one. Knows labels and the network; knows no model and no text.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dash_runtime.actions import Action
from dash_runtime.policy.network import PolicyNetwork
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.training.labels import Labels
from dash_runtime.training.loss import TrainingDiverged

_NOTHING = -20.0
"""Log damage of the most precise action, by which the others are judged."""
_FIRST_LOG_DAMAGE = {Action.SKIP: -3.0, Action.INT4: -7.0, Action.INT8: -8.0}
_LIMITS = (-1.0, 4.0)
"""A label beyond them is cut: a few tokens would outweigh all others."""
_LEAST_OUTPUT = -12.0


@dataclass(frozen=True, slots=True)
class FitSettings:
    """Settings of the regression; `dropout` leaves out channels of the state."""

    width: int = 128
    inner_width: int = 64
    epochs: float = 6.0
    rows_per_step: int = 4096
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.1


class DamageModel(nn.Module):
    """The trainable form of a `PolicyNetwork`."""

    def __init__(self, spec: PlanSpec, hidden_size: int, settings: FitSettings) -> None:
        super().__init__()
        self._settings = settings
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
        state = functional.dropout(state, self._settings.dropout, self.training)
        known = self.hidden_bias[labels.block] + torch.einsum(
            "rf,rfw->rw", labels.facts, self.fact_weight[labels.block]
        )
        features = functional.silu(known + functional.linear(state, self.hidden_weight))
        inner = functional.silu(functional.linear(features, self.inner_weight) + self.inner_bias[labels.block])
        weight = self.output_weight[labels.block, labels.layer_place]
        outputs = torch.einsum("rw,raw->ra", inner, weight) + self.output_bias[labels.block, labels.layer_place]
        outputs = outputs.clamp(_LEAST_OUTPUT, _LIMITS[1])
        is_precise = torch.arange(outputs.shape[1]) == self._precise
        return outputs.masked_fill(is_precise, _NOTHING)

    @torch.no_grad()
    def network(self, factors: Tensor) -> PolicyNetwork:
        """Returns the network, each layer's damages multiplied by its factor, `[num_blocks, block_size]`."""
        weight, bias = self.output_weight.clone(), self.output_bias + factors.log().unsqueeze(-1)
        weight[:, :, self._precise], bias[:, :, self._precise] = 0.0, _NOTHING
        return PolicyNetwork(
            hidden_weight=self.hidden_weight.detach().clone(),
            hidden_bias=self.hidden_bias.detach().clone(),
            fact_weight=self.fact_weight.detach().clone(),
            inner_weight=self.inner_weight.detach().clone(),
            inner_bias=self.inner_bias.detach().clone(),
            output_weight=weight,
            output_bias=bias,
        )


def deviance(outputs: Tensor, labels: Labels) -> Tensor:
    """Returns the mean Poisson deviance of the coarser actions' log damages, up to a constant."""
    predicted = outputs.gather(1, labels.coarse.unsqueeze(1)).squeeze(1)
    base = outputs.detach().gather(1, labels.precise.unsqueeze(1)).squeeze(1).exp()
    target = (labels.damage + base).clamp(*_LIMITS)
    return (predicted.exp() - target * predicted).mean()


def fit_damages(spec: PlanSpec, labels: Labels, settings: FitSettings, seed: int) -> DamageModel:
    """Fits a new model to all labels. The same seed and labels give the same model.

    Raises:
        TrainingDiverged: the deviance is not a number.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DamageModel(spec, labels.hidden.shape[1], settings)
        optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
        num_rows = len(labels.damage)
        steps = max(2, round(settings.epochs * num_rows / settings.rows_per_step))
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule(step / steps)
            rows = torch.randint(num_rows, (min(settings.rows_per_step, num_rows),))
            batch = Labels(*(tensor[rows] for tensor in labels.tensors().values()))
            loss = deviance(model(batch), batch)
            if not loss.isfinite():
                raise TrainingDiverged("the deviance of the predicted damages is not a number")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval()


def _schedule(share: float) -> float:
    """Returns the share of the learning rate after that share of the steps: up within a tenth, then down a cosine."""
    return min(1.0, 0.05 + 10 * share) * (1 + math.cos(math.pi * share)) / 2
