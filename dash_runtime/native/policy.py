"""A learned policy's network for the native code.

Knows a network's tensors; knows no policies and no facts.
"""

from ctypes import addressof, c_char, c_double, c_int64, pointer, sizeof

import torch
from torch import Tensor
from torch.nn import functional

from dash_runtime.actions import Action
from dash_runtime.linears.grouped_matrix import LANES
from dash_runtime.native.library import NativeLibrary
from dash_runtime.native.structs import MOST_NUMBERS, BlockStruct, DecisionsStruct, PolicyStruct
from dash_runtime.passes import Network


class RowDecisions:
    """The decisions of a row within a pass, one layer after another.

    Args:
        facts: float32 memory for what the row is told: the known facts and others, then each action's price.
    """

    def __init__(self, policy: "NativePolicy", facts: Tensor) -> None:
        self._scores = bytearray(4 * policy.num_layers * policy.num_actions)
        self._kept = policy, facts
        scores = addressof(c_char.from_buffer(self._scores))
        self.struct = pointer(
            DecisionsStruct(
                policy.pointer, facts.data_ptr(), policy.actions, policy.layer_costs, scores, policy.num_known
            )
        )

    @property
    def scores(self) -> bytes:
        """The scores with which the last pass decided its layers, float32 `[num_layers, actions]`."""
        return bytes(self._scores)


class NativePolicy:
    """A network as the native code evaluates it: for rows; or layer after layer within a pass (`RowDecisions`)."""

    def __init__(self, library: NativeLibrary, network: Network) -> None:
        self._library = library
        self.num_layers, self.num_actions = network.num_layers, len(network.actions)
        self.num_known = network.num_known
        width, inner_width = (_padded(len(own)) for own in (network["hidden_weight"], network["inner_weight"]))
        block_size, hidden_size = network["output_weight"].shape[1], network["hidden_weight"].shape[1]
        hidden = _pad(network["hidden_weight"], width).view(-1, LANES, hidden_size).transpose(1, 2)
        hidden = hidden.to(torch.bfloat16).contiguous()
        inner = _pad(_pad(network["inner_weight"], inner_width).T, width).contiguous()
        self._kept: list[object] = [hidden, inner]
        self._blocks = (BlockStruct * network.num_layers)()
        for number, layers in enumerate(network.blocks):
            tensors = [
                _pad(network["hidden_bias"][number], width),
                _pad(network["fact_weight"][number].T, width).T,
                _pad(network["inner_bias"][number], inner_width),
                _pad(network["output_weight"][number].flatten(0, 1).T, inner_width).T,
                network["output_bias"][number].flatten(),
            ]
            tensors = [own.float().contiguous() for own in tensors]
            self._kept.append(tensors)
            self._blocks[layers[0]] = BlockStruct(*(own.data_ptr() for own in tensors))
        num_facts = network["fact_weight"].shape[1]
        sizes = (hidden_size, width, inner_width, num_facts, self.num_actions, block_size)
        self.pointer = pointer(PolicyStruct(hidden.data_ptr(), inner.data_ptr(), self._blocks, *sizes))
        self._block_size = block_size
        self.layer_costs = (c_double * (max(Action) + 1))()
        for action, cost in network.layer_costs.items():
            self.layer_costs[action] = cost
        self.actions = (c_int64 * self.num_actions)(*network.actions)

    def choose(self, layer: int, hidden: Tensor, facts: Tensor) -> tuple[Tensor, Tensor]:
        """Decides the block that begins with `layer`, in the calling thread.

        Returns the numbers of the best actions, int64 `[rows, block_size]`, and the scores, float32 `[rows, block_size,
        actions]`; from bf16 `hidden` `[rows, hidden_size]` and each row's facts and prices.
        """
        num_rows, hidden = len(hidden), hidden.contiguous()
        scores = torch.empty(num_rows, self._block_size, self.num_actions)
        best = torch.empty(num_rows, self._block_size, dtype=torch.int64)
        block = addressof(self._blocks) + layer * sizeof(BlockStruct)
        memory = (own.data_ptr() for own in (hidden, facts))
        self._library.choose(self.pointer, block, *memory, num_rows, scores.data_ptr(), best.data_ptr())
        return best, scores


def fits(network: Network) -> bool:
    """Returns True if the native code has room for a network of these sizes."""
    num_scores = network["output_weight"].shape[1] * len(network.actions)
    sizes = (_padded(len(network["hidden_weight"])), _padded(len(network["inner_weight"])), num_scores)
    num_facts = network["fact_weight"].shape[1] + len(network.actions)
    return max(*sizes, num_facts) <= MOST_NUMBERS and network["hidden_weight"].shape[1] % LANES == 0


def _padded(width: int) -> int:
    return -(-width // LANES) * LANES


def _pad(tensor: Tensor, rows: int) -> Tensor:
    """Adds zeros to the first dimension."""
    return functional.pad(tensor, (*[0, 0] * (tensor.dim() - 1), 0, rows - len(tensor)))
