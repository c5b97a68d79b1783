"""Reads a checkpoint's tensors as the layers of a decoder: fused, cast and on their device.

The tensors' shapes have been checked before. Knows one model's configuration; knows no families and no kernels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.layers.layer_body import Linears, Norms
from dash_runtime.layers.mlp import GatedMlp, Mixture
from dash_runtime.layers.norm import RmsNorm
from dash_runtime.layers.rotary import channel_order
from dash_runtime.linears.dense_linear import FullLinear
from dash_runtime.linears.grouped_matrix import GROUP_SIZE, Rounding, is_nearly_exact
from dash_runtime.model_config import ModelConfig, QkNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights(Norms):
    """One layer's weights.

    The offset of norm weights is added already, and the channels of queries and keys are as the rotary table has them.
    """

    linears: Linears[FullLinear]


@dataclass(frozen=True, slots=True)
class WeightLoader:
    """Reads weights."""

    config: ModelConfig
    weights: Mapping[str, Tensor]
    dtype: torch.dtype
    device: torch.device
    finer_keys: Action | None = Action.INT8
    """The precision of keys and values where four bits would change them and the other outputs are in INT4 or INT3
    (`precision_of_keys`). None: INT4, whatever that does to them."""
    rounding: Rounding = field(default_factory=dict)
    """Matrices that were rounded with their inputs in view."""

    def tensor(self, name: str) -> Tensor:
        """Returns one tensor in the loader's dtype and on its device. It may share the file's memory."""
        return self.weights[name].detach().to(self.device, self.dtype).contiguous()

    def norm(self, name: str) -> RmsNorm:
        """Returns the norm whose weight is called `name`."""
        return RmsNorm(self._norm_weight(name), self.config.rms_norm_eps)

    def linear(self, names: Sequence[str], has_bias: bool) -> FullLinear:
        """Returns several matrices of the same input, fused along their outputs."""

        def fused(kind: str) -> Tensor:
            parts = [self.tensor(f"{name}.{kind}") for name in names]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return FullLinear(fused("weight"), fused("bias") if has_bias else None)

    def embedding(self) -> Tensor:
        """Returns the embedding, `[vocab_size, hidden_size]`."""
        return self.tensor(f"{self.config.tensor_names.embedding}.weight")

    def final_norm(self) -> RmsNorm:
        """Returns the norm before the head."""
        return self.norm(f"{self.config.tensor_names.final_norm}.weight")

    def head(self) -> Tensor:
        """Returns the head of a model whose head is not tied, `[vocab_size, hidden_size]`."""
        return self.tensor(f"{self.config.tensor_names.head}.weight")

    def layer(self, index: int) -> LayerWeights:
        """Returns the weights of one layer."""
        names, block = self.config.tensor_names, self.config.block
        prefix = f"{names.layers}.{index}"

        def norm(name: str, is_present: bool) -> RmsNorm | None:
            return self.norm(f"{prefix}.{name}.weight") if is_present else None

        def linear(modules: Sequence[str], has_bias: bool) -> FullLinear:
            return self.linear([f"{prefix}.{module}" for module in modules], has_bias)

        def with_rounded(place: int, full: FullLinear) -> FullLinear:
            own = {action: kept[index, place] for action, kept in self.rounding.items() if (index, place) in kept}
            return replace(full, rounded={action: matrix.to(self.device) for action, matrix in own.items()})

        linears = Linears(
            self._with_keys(self._with_pairs_apart(index, linear(names.query_key_value, block.has_qkv_bias))),
            linear([names.output], block.has_output_bias),
            self._mlp(index, prefix),
        )
        has_width_norms = block.qk_norm is QkNorm.WIDTH
        return LayerWeights(
            input_norm=norm(names.input_norm, block.has_input_norms),
            attention_output_norm=norm(names.attention_output_norm, block.has_output_norms),
            mlp_norm=norm(names.mlp_norm, block.has_input_norms),
            mlp_output_norm=norm(names.mlp_output_norm, block.has_output_norms),
            head_norm=self._head_norm(prefix) if block.qk_norm is QkNorm.HEAD else None,
            query_norm=norm(names.query_norm, has_width_norms),
            key_norm=norm(names.key_norm, has_width_norms),
            linears=linears.mapped_by_place(with_rounded, lambda router: router),
        )

    def _mlp(self, index: int, prefix: str) -> GatedMlp[FullLinear] | Mixture[FullLinear]:
        names, mixture = self.config.tensor_names, self.config.mixture_of(index)

        def linear(modules: Sequence[str]) -> FullLinear:
            return self.linear([f"{prefix}.{module}" for module in modules], self.config.block.has_mlp_bias)

        if mixture is None:
            return GatedMlp(linear(names.gate_up), linear([names.down]))
        experts = (
            GatedMlp(
                linear([module.format(expert) for module in names.expert_gate_up]),
                linear([names.expert_down.format(expert)]),
            )
            for expert in range(mixture.num_experts)
        )
        return Mixture(mixture, self.linear([f"{prefix}.{names.router}"], has_bias=False), tuple(experts))

    def _with_pairs_apart(self, index: int, fused: FullLinear) -> FullLinear:
        """Returns a layer's query-key-value matrix with the channels of queries and keys as `rotate` pairs them."""
        config, rope = self.config, self.config.ropes[index]
        order = None if rope is None else channel_order(rope, config.head_dim)
        if order is None:
            return fused
        assert config.block.qk_norm is None, "norms of queries and keys are not reordered"
        num_rotated = config.num_heads + config.num_kv_heads
        rows = torch.arange(len(fused.weight), device=fused.weight.device).view(-1, config.head_dim)
        rows = torch.cat((rows[:num_rotated, order], rows[num_rotated:])).flatten()
        return FullLinear(fused.weight[rows], None if fused.bias is None else fused.bias[rows])

    def _with_keys(self, fused: FullLinear) -> FullLinear:
        """Returns a layer's query-key-value matrix whose keys and values INT4 and INT3 leave finer if four bits would
        change them, else INT3 in INT4."""
        query_size = self.config.query_size
        if fused.weight.shape[1] % GROUP_SIZE:
            return fused
        is_fine = self.finer_keys is None or is_nearly_exact(fused.weight[query_size:])
        return replace(fused, keys_from=query_size, finer_keys=None if is_fine else self.finer_keys)

    def _head_norm(self, prefix: str) -> Tensor:
        config, names = self.config, self.config.tensor_names
        query_norm = self._norm_weight(f"{prefix}.{names.query_norm}.weight").expand(config.num_heads, -1)
        key_norm = self._norm_weight(f"{prefix}.{names.key_norm}.weight").expand(config.num_kv_heads, -1)
        return torch.cat((query_norm, key_norm))

    def _norm_weight(self, name: str) -> Tensor:
        """Returns a norm's weight with the offset added, in float32: bfloat16 would round small weights away."""
        offset = self.config.block.norm_offset
        if not offset:
            return self.tensor(name)
        return (self.weights[name].detach().float() + offset).to(self.device, self.dtype)
