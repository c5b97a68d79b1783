"""Policy files: a learned policy as safetensors, with what it was made for as metadata.

A file names the model it belongs to by fingerprint and is refused for another one. Everything read is
checked against its bounds before use (policy_metadata.py reads the metadata). Knows files; knows no training and no
serving.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints.parameters import layer_norms
from dash_runtime.errors import PolicyFileError
from dash_runtime.files.json_file import parse_json
from dash_runtime.files.tensor_file import load_tensors, naming, save_tensors
from dash_runtime.files.wording import quoted
from dash_runtime.model_config import ModelConfig
from dash_runtime.policy.compensation_file import restored, stored
from dash_runtime.policy.learned import NUM_SCALAR_FEATURES, LearnedPolicy, PolicyNetwork
from dash_runtime.policy.policy import decision_blocks
from dash_runtime.policy.policy_metadata import PolicyMetadata

_KEY = "dash_policy"
_WHAT = "policy file"


def model_fingerprint(config: ModelConfig, weights: Mapping[str, Tensor]) -> str:
    """Returns a digest of a model's shape and of its layers' norm weights.

    Cheap to read, and different for each training.
    """
    digest = hashlib.sha256()
    shape = (config.num_layers, config.hidden_size, config.num_heads, config.vocab_size, config.head_dim)
    digest.update(repr(shape).encode())
    for index in range(config.num_layers):
        for norm in layer_norms(config):
            weight = weights[f"{config.tensor_names.layers}.{index}.{norm}.weight"]
            digest.update(weight.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def find_policies(folder: Path, fingerprint: str) -> list[Path]:
    """The policy files in `folder` that were made for the model with this fingerprint, by name.

    Raises:
        PolicyFileError: naming a file that is none, or is not as it was written.
    """
    found: list[Path] = []
    for path in sorted(folder.glob("*.safetensors")):
        _, metadata = load_tensors(path, _WHAT, (_KEY,))
        with naming(path, _WHAT):
            if parse_json(metadata[_KEY])["model_fingerprint"] == fingerprint:
                found.append(path)
    return found


def save_policy(path: Path, policy: LearnedPolicy, fingerprint: str) -> None:
    """Writes the file in one rename, so that a reader never sees half of it.

    Raises:
        PolicyFileError: it cannot be written.
    """
    tensors = {f"network.{name}": getattr(policy.network, name) for name in PolicyNetwork.__slots__}
    tensors |= {f"compensation.{name}": tensor for name, tensor in stored(policy.compensation).items()}
    metadata = PolicyMetadata(
        policy.name,
        fingerprint,
        policy.actions,
        policy.pinned,
        policy.lookahead,
        policy.block_size,
        policy.head,
        policy.pinned_action,
        policy.is_drafter,
        policy.compensation.kind.value,
        policy.costs,
        policy.calibration,
    )
    save_tensors(path, _WHAT, tensors, {_KEY: metadata.to_json()})


def load_policy(
    path: Path,
    config: ModelConfig,
    fingerprint: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> LearnedPolicy:
    """Reads a policy for the model with this fingerprint. `dtype` is the decoder's, for the compensation.

    Raises:
        PolicyFileError: naming the file, and what is wrong with it.
    """
    tensors, metadata = load_tensors(path, _WHAT, (_KEY,))
    with naming(path, _WHAT):
        facts = PolicyMetadata.parse(metadata[_KEY])
        facts.check_for(config, fingerprint)
        return _policy_from(facts, tensors, config, dtype, device)


def _policy_from(
    facts: PolicyMetadata,
    tensors: dict[str, Tensor],
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> LearnedPolicy:
    num_blocks = len(decision_blocks(config.num_layers, facts.pinned, facts.block_size))
    network = _network_from(tensors, config, (num_blocks, facts.block_size, len(facts.actions)))
    rung = {
        name.removeprefix("compensation."): tensor
        for name, tensor in tensors.items()
        if name.startswith("compensation.")
    }
    unknown = tensors.keys() - {f"network.{name}" for name in PolicyNetwork.__slots__}
    unknown -= {f"compensation.{name}" for name in rung}
    if unknown:
        raise PolicyFileError(f"has an unknown tensor {quoted(min(unknown))}")
    compensation = restored(facts.compensation, rung, config, dtype, device)
    on_device = PolicyNetwork(*(getattr(network, name).to(device) for name in PolicyNetwork.__slots__))
    return LearnedPolicy(
        facts.name,
        on_device,
        facts.actions,
        facts.pinned,
        facts.lookahead,
        facts.block_size,
        facts.head,
        compensation,
        facts.costs,
        facts.calibration,
        facts.pinned_action,
        is_drafter=facts.is_drafter,
    )


def _network_from(tensors: dict[str, Tensor], config: ModelConfig, outputs: tuple[int, int, int]) -> PolicyNetwork:
    network = PolicyNetwork(*(tensors[f"network.{name}"] for name in PolicyNetwork.__slots__))
    width = network.input_bias.shape[0]
    embedding = network.block_embedding.shape[1]
    expected: dict[str, tuple[int, ...]] = {
        "block_embedding": (outputs[0], embedding),
        "action_embedding": (len(Action), embedding),
        "input_weight": (width, config.hidden_size + 2 * embedding + NUM_SCALAR_FEATURES),
        "input_bias": (width,),
        "output_weight": (*outputs, width),
        "output_bias": outputs,
    }
    for name, shape in expected.items():
        tensor: Tensor = getattr(network, name)
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise PolicyFileError(f"tensor network.{name} must be finite float32 of shape {shape}")
    return network
