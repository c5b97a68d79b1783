"""Policy files: a learned policy's tensors as safetensors, and the rest as metadata (policy_metadata.py).

A file knows its model by a sketch (model_sketch.py) and its actions by name. It is refused for another model, and
everything read is checked against its bounds before use. Knows files; knows no training and no serving.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.errors import PolicyFileError
from dash_runtime.files.json_file import parse_json
from dash_runtime.files.tensor_file import load_tensors, naming, save_tensors
from dash_runtime.files.wording import quoted
from dash_runtime.model_config import ModelConfig
from dash_runtime.policy.compensation_file import restored, stored
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.model_sketch import is_same_model
from dash_runtime.policy.network import NUM_SCALAR_FEATURES, PolicyNetwork
from dash_runtime.policy.policy_metadata import PolicyMetadata

_KEY = "dash_policy"
_WHAT = "policy file"


def find_policies(folder: Path, fingerprint: str) -> list[Path]:
    """Returns the policy files in `folder` for the model with this fingerprint, in the order of their names.

    Raises:
        PolicyFileError: a file is no policy file, or has changed since it was written; the message names it.
    """
    found: list[Path] = []
    for path in sorted(folder.glob("*.safetensors")):
        _, metadata = load_tensors(path, _WHAT, (_KEY,))
        with naming(path, _WHAT):
            if is_same_model(parse_json(metadata[_KEY])["model_fingerprint"], fingerprint):
                found.append(path)
    return found


def save_policy(
    path: Path, policy: LearnedPolicy, fingerprint: str, known: Mapping[str, Action] = Action.__members__
) -> None:
    """Writes the file in one rename, so that a reader never sees half of it.

    `known` are the actions that the network has a row for, by name.

    Raises:
        PolicyFileError: it cannot be written.
    """
    tensors = {f"network.{name}": getattr(policy.network, name) for name in PolicyNetwork.__slots__}
    tensors |= {f"compensation.{name}": tensor for name, tensor in stored(policy.compensation).items()}
    metadata = PolicyMetadata(
        name=policy.name,
        model_fingerprint=fingerprint,
        spec=policy.spec,
        is_drafter=policy.is_drafter,
        compensation=policy.compensation.kind.value,
        calibration=policy.calibration,
        plans=policy.plans,
        embedded_actions=tuple(_by_number(known)),
    )
    save_tensors(path, _WHAT, tensors, {_KEY: metadata.to_json()})


def load_policy(
    path: Path,
    config: ModelConfig,
    fingerprint: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    known: Mapping[str, Action] = Action.__members__,
) -> LearnedPolicy:
    """Reads a policy for the model with this fingerprint.

    Args:
        dtype: the decoder's, for the compensation.
        known: the actions of this runtime, by name. An action that the file does not have is never chosen.

    Raises:
        PolicyFileError: the message names the file and the fault.
    """
    tensors, metadata = load_tensors(path, _WHAT, (_KEY,))
    with naming(path, _WHAT):
        facts = PolicyMetadata.parse(metadata[_KEY], known)
        facts.check_for(config, fingerprint)
        network = _checked_network(tensors, facts, config)
        network = replace(network, action_embedding=_embedding_for(known, network.action_embedding, facts))
        prefix = "compensation."
        compensation = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        unknown = tensors.keys() - {f"network.{name}" for name in PolicyNetwork.__slots__}
        unknown -= {f"compensation.{name}" for name in compensation}
        if unknown:
            raise PolicyFileError(f"has an unknown tensor {quoted(min(unknown))}")
        return LearnedPolicy(
            name=facts.name,
            network=PolicyNetwork(*(getattr(network, name).to(device) for name in PolicyNetwork.__slots__)),
            spec=facts.spec,
            compensation=restored(facts.compensation, compensation, config, dtype, device),
            calibration=facts.calibration,
            plans=facts.plans,
            is_drafter=facts.is_drafter,
        )


def _checked_network(tensors: Mapping[str, Tensor], facts: PolicyMetadata, config: ModelConfig) -> PolicyNetwork:
    network = PolicyNetwork(*(tensors[f"network.{name}"] for name in PolicyNetwork.__slots__))
    width, embedding = network.input_bias.shape[0], network.block_embedding.shape[1]
    outputs = (len(facts.spec.decision_blocks), facts.spec.block_size, len(facts.spec.actions))
    expected: dict[str, tuple[int, ...]] = {
        "block_embedding": (outputs[0], embedding),
        "action_embedding": (len(facts.embedded_actions), embedding),
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


def _embedding_for(known: Mapping[str, Action], embedding: Tensor, facts: PolicyMetadata) -> Tensor:
    """Returns a row for each known action; zeros if the file has none."""
    rows = dict(zip(facts.embedded_actions, embedding, strict=True))
    return torch.stack([rows.get(name, torch.zeros_like(embedding[0])) for name in _by_number(known)])


def _by_number(known: Mapping[str, Action]) -> list[str]:
    """Returns the names of the actions in the order of a network's rows."""
    return sorted(known, key=known.__getitem__)
