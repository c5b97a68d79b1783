"""The interface of a policy's evaluation that a layer's program takes along. Knows tensors; knows no policies."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.programs.program_cache import Program
from dash_runtime.programs.row_calls import Exchange


class Evaluation(Protocol):
    """One row's evaluation of a policy on the input of the layer that runs next."""

    programs: Mapping[Action, Program]
    """By the row's action: the layer's program with the evaluation in it. SKIP's has the policy's own compensation."""
    inputs_by_layer: Sequence[Sequence[Tensor]]
    """The program's last inputs, by the layer that is decided; none for a layer that is not. The evaluation's result is
    written into one of them."""
    exchange: Exchange
    layer_costs: Mapping[Action, float]
    """For the share of cost that a token has spent already."""
