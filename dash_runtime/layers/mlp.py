"""A layer's MLP: one gated linear unit, or a mixture of them, of which a router chooses a few for each row.

Eager layers and passes with a gradient both run it. Knows tensors; knows no actions and no kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.linears.dense_linear import Linear
from dash_runtime.model_config import Activation, MixtureConfig

LinearT = TypeVar("LinearT", bound=Linear, covariant=True)
OtherT = TypeVar("OtherT", bound=Linear)


@dataclass(frozen=True, slots=True)
class GatedMlp(Generic[LinearT]):
    """A gated linear unit (Shazeer 2020). Gate and up are one matrix."""

    gate_up: LinearT
    down: LinearT

    def __call__(self, inputs: Tensor, activation: Activation) -> Tensor:
        """Maps `[..., hidden_size]` to the same."""
        gate, up = self.gate_up(inputs).chunk(2, dim=-1)
        gate = functional.silu(gate) if activation is Activation.SILU else functional.gelu(gate, approximate="tanh")
        # In place if no gradient needs the factors, since a prompt's are megabytes.
        return self.down(gate * up if gate.requires_grad or up.requires_grad else gate.mul_(up))

    def mapped(
        self, convert: Callable[[LinearT], OtherT], convert_router: Callable[[LinearT], OtherT]
    ) -> "GatedMlp[OtherT]":
        """Returns it with other matrices. It has no router."""
        return GatedMlp(convert(self.gate_up), convert(self.down))


@dataclass(frozen=True, slots=True)
class Mixture(Generic[LinearT]):
    """Experts, of which each row runs those that the router finds the most probable (Shazeer et al. 2017)."""

    config: MixtureConfig
    router: LinearT
    """Maps a row to its experts' scores, `[..., num_experts]`."""
    experts: tuple[GatedMlp[LinearT], ...]

    def __call__(self, inputs: Tensor, activation: Activation) -> Tensor:
        """Maps `[..., hidden_size]` to the same. Reads the weights of chosen experts only.

        A row's terms, and the order in which they are added, do not depend on other rows.
        """
        rows = inputs.flatten(0, -2)
        shares, chosen = self._route(rows)  # [rows, num_chosen] each
        order = chosen.flatten().argsort(stable=True)  # one expert's rows after the other's
        experts, counts = chosen.unique(return_counts=True)
        groups = rows.index_select(0, order // self.config.num_chosen).split(counts.tolist())
        outputs = [self.experts[expert](own, activation) for expert, own in zip(experts.tolist(), groups, strict=True)]
        terms = torch.cat(outputs).index_select(0, order.argsort()).unflatten(0, chosen.shape)
        # [rows, num_chosen, hidden_size]; a library's sum may take another order for other numbers of rows.
        total = terms[:, 0] * shares[:, :1]
        for place in range(1, self.config.num_chosen):
            total = total + terms[:, place] * shares[:, place, None]
        return total.to(inputs.dtype).view_as(inputs)

    def mapped(
        self, convert: Callable[[LinearT], OtherT], convert_router: Callable[[LinearT], OtherT]
    ) -> "Mixture[OtherT]":
        """Returns it with other matrices."""
        experts = tuple(expert.mapped(convert, convert_router) for expert in self.experts)
        return Mixture(self.config, convert_router(self.router), experts)

    def _route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the shares and the numbers of each row's experts, the most probable first, `[rows, num_chosen]`.

        Shares are float32 at least.
        """
        scores = self.router(rows)
        probabilities = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        shares, chosen = probabilities.topk(self.config.num_chosen, dim=-1)
        return (shares / shares.sum(dim=-1, keepdim=True) if self.config.has_normed_shares else shares), chosen
