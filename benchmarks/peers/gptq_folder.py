"""Writes a checkpoint folder with INT4 weights in GPTQ's layout, which vLLM reads: rounded to the nearest in groups.

Knows that layout and safetensors; knows no figures.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dash_runtime.files.atomic_file import replacing

_GROUP = 32
_PACKED = 8
"""INT4 values in an int32."""
_ROUNDED = ("_proj.weight",)
"""The ends of the names of matrices that are rounded; embeddings and head stay as they are."""


def write_gptq_folder(source: Path, folder: Path) -> Path:
    """Writes the folder if it is not there yet, and returns it."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as partial:
        partial.mkdir()
        for file in source.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
                shutil.copy(file, partial)
        tensors: dict[str, Tensor] = {}
        for file in sorted(source.glob("*.safetensors")):
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118, it is no mapping
                    tensor = weights.get_tensor(name)
                    tensors |= _rounded(name, tensor) if name.endswith(_ROUNDED) else {name: tensor}
        save_file(tensors, partial / "model.safetensors", {"format": "pt"})
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "gptq", "bits": 4, "group_size": _GROUP, "desc_act": False, "sym": True, "lm_head": False,
        }  # fmt: skip
        (partial / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _rounded(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Returns GPTQ's tensors of a matrix `[out_features, in_features]`: values from 0 to 15; 8 stands for 0."""
    num_out, num_in = weight.shape
    groups = weight.float().T.reshape(num_in // _GROUP, _GROUP, num_out)
    scales = (groups.abs().amax(1, keepdim=True) / 7).clamp(min=1e-8)
    values = ((groups / scales).round().clamp(-8, 7) + 8).to(torch.int64).reshape(num_in, num_out)
    shifts = 4 * torch.arange(_PACKED)
    packed = (values.reshape(-1, _PACKED, num_out) << shifts[None, :, None]).sum(1)
    zeros = torch.full((num_in // _GROUP, num_out // _PACKED), 0x77777777, dtype=torch.int64)  # 8, less the 1 it adds
    start = name.removesuffix("weight")
    return {
        f"{start}qweight": _as_int32(packed),
        f"{start}qzeros": _as_int32(zeros),
        f"{start}scales": scales.squeeze(1).to(torch.float16),
        f"{start}g_idx": (torch.arange(num_in) // _GROUP).to(torch.int32),
    }


def _as_int32(values: Tensor) -> Tensor:
    """Returns the lower 32 bits."""
    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32).contiguous()
