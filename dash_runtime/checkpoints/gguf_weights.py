"""Writes a GGUF file's tensors as one bfloat16 model.safetensors, one tensor in memory at a time.

Knows llama.cpp's tensor names and the row order of its query and key projections. Knows no torch.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from dash_runtime.checkpoints.gguf_config import ROPE_FACTORS
from dash_runtime.checkpoints.gguf_file import GgufFile
from dash_runtime.checkpoints.parameters import EMBEDDING, FINAL_NORM, HEAD, parameter_shapes
from dash_runtime.errors import CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.files.wording import quoted
from dash_runtime.model_config import ModelConfig

if TYPE_CHECKING:
    import numpy as np

_GLOBAL_NAMES = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BF16_BYTES = 2


def gguf_name(parameter: str) -> str:
    """llama.cpp's name of a parameter, such as `blk.3.attn_q.weight`."""
    if parameter in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[parameter]
    _, _, layer, rest = parameter.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_LAYER_NAMES[module]}.{kind}"


def write_weights(gguf: GgufFile, config: ModelConfig, file: Path) -> None:
    """Dequantises every parameter of `config` into `file`.

    Raises:
        CorruptCheckpoint: a tensor is missing or has another shape than the metadata say.
        UnsupportedArchitecture: the file has tensors that the architecture here does not use.
    """
    shapes = parameter_shapes(config)
    _check_tensors(gguf, shapes)
    with file.open("wb") as out:
        out.write(_safetensors_header(shapes))
        for parameter in shapes:
            values = gguf.dequantize(gguf.tensors[gguf_name(parameter)])
            heads = _rotated_heads(config, parameter)
            if heads is not None:
                values = _unpermute(values, heads)
            out.write(_bfloat16_bytes(values))


def _check_tensors(gguf: GgufFile, shapes: dict[str, tuple[int, ...]]) -> None:
    for parameter, shape in shapes.items():
        name = gguf_name(parameter)
        tensor = gguf.tensors.get(name)
        if tensor is None:
            raise CorruptCheckpoint(f"{gguf.path} is incomplete: it has no tensor {name}.")
        if tensor.shape != shape:
            raise CorruptCheckpoint(
                f"{gguf.path} is damaged: its tensor {name} has the shape {list(tensor.shape)}, "
                f"but its metadata ask for {list(shape)}."
            )
    unused = gguf.tensors.keys() - {gguf_name(parameter) for parameter in shapes} - {ROPE_FACTORS}
    if unused:
        raise UnsupportedArchitecture(f"{gguf.path} has a tensor that is not supported: {quoted(min(unused))}.")


def _safetensors_header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """The length and header of a file with these tensors in this order, in bfloat16."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for parameter, shape in shapes.items():
        start, end = end, end + _BF16_BYTES * math.prod(shape)
        header[parameter] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data must be aligned to be mapped
    return len(text).to_bytes(8, "little") + text


def _rotated_heads(config: ModelConfig, parameter: str) -> int | None:
    """The number of heads whose rows llama.cpp's converter reordered, for the `llama` architecture."""
    if config.architecture != "LlamaForCausalLM":
        return None
    if ".q_proj." in parameter:
        return config.num_heads
    return config.num_kv_heads if ".k_proj." in parameter else None


def _unpermute(values: "np.ndarray", heads: int) -> "np.ndarray":
    """Rows from (pair, half) order, which ggml's rotary embedding expects, back to (half, pair)."""
    paired = values.reshape(heads, -1, 2, *values.shape[1:])  # [heads, head_dim / 2, 2, ...]
    return paired.swapaxes(1, 2).reshape(values.shape)


def _bfloat16_bytes(values: "np.ndarray") -> bytes:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    rows = values.reshape(-1, values.shape[-1])
    return quantize(rows, GGMLQuantizationType.BF16).tobytes()
