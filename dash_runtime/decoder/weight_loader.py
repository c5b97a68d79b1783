"""A checkpoint's tensors as the layers of a decoder: read, fused and cast by their Hugging Face names.

Their shapes are checked before. Knows names and one model's shape; knows no kernels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dash_runtime.decoder.norm import RmsNorm
from dash_runtime.linears.dense_linear import FullLinear
from dash_runtime.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's weights; query, key and value are one matrix, and gate and up.

    `head_norm` is the query and key norm, `[num_heads + num_kv_heads, head_dim]`.
    """

    input_norm: RmsNorm | None
    mlp_norm: RmsNorm | None
    head_norm: Tensor | None
    query_key_value: FullLinear
    output: FullLinear
    gate_up: FullLinear
    down: FullLinear
    attention_output_norm: RmsNorm | None = None
    mlp_output_norm: RmsNorm | None = None
    query_norm: RmsNorm | None = None
    key_norm: RmsNorm | None = None


class WeightLoader:
    """Reads weights.

    Args:
        copies: whether nothing may be shared with the mapping, so that it can be dropped. Otherwise what needs no cast
            and no fusing is.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        copies: bool = False,
    ) -> None:
        self._config = config
        self._weights = weights
        self._dtype = dtype
        self._device = device
        self._copies = copies

    def tensor(self, name: str) -> Tensor:
        stored = self._weights[name].detach()
        tensor = stored.to(self._device, self._dtype).contiguous()
        return tensor.clone() if self._copies and tensor.data_ptr() == stored.data_ptr() else tensor

    def norm(self, name: str) -> RmsNorm:
        return RmsNorm(self.tensor(name), self._config.rms_norm_eps)

    def linear(self, names: Sequence[str], has_bias: bool) -> FullLinear:
        """Several matrices of one input, fused along their outputs."""

        def fused(kind: str) -> Tensor:
            parts = [self.tensor(f"{name}.{kind}") for name in names]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return FullLinear(fused("weight"), fused("bias") if has_bias else None)

    def layer(self, index: int) -> LayerWeights:
        config = self._config
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        head_norm = None
        if config.block.qk_norm is not None:
            query_norm = self.tensor(f"{attention}.q_norm.weight").expand(config.num_heads, -1)
            key_norm = self.tensor(f"{attention}.k_norm.weight").expand(config.num_kv_heads, -1)
            head_norm = torch.cat((query_norm, key_norm))
        return LayerWeights(
            self.norm(f"{prefix}.input_layernorm.weight"),
            self.norm(f"{prefix}.post_attention_layernorm.weight"),
            head_norm,
            self.linear([f"{attention}.{name}_proj" for name in "qkv"], config.block.has_qkv_bias),
            self.linear([f"{attention}.o_proj"], config.block.has_output_bias),
            self.linear([f"{mlp}.gate_proj", f"{mlp}.up_proj"], config.block.has_mlp_bias),
            self.linear([f"{mlp}.down_proj"], config.block.has_mlp_bias),
        )
