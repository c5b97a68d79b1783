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
from dash_runtime.files.tensor_file import has_metadata, load_tensors, naming, save_tensors
from dash_runtime.files.wording import quoted
from dash_runtime.layers.compensation import Compensation
from dash_runtime.layers.narrow_head import HeadMap
from dash_runtime.linears.grouped_matrix import GROUP_SIZE
from dash_runtime.model_config import ModelConfig
from dash_runtime.policy.compensation_file import load_compensation, restored, stored
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.model_sketch import is_same_model
from dash_runtime.policy.network import PolicyNetwork
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
    if policy.head_map is not None:
        tensors |= {f"head.{name}": getattr(policy.head_map, name).half() for name in HeadMap.__slots__}
    metadata = PolicyMetadata(
        name=policy.name,
        model_fingerprint=fingerprint,
        spec=policy.spec,
        is_drafter=policy.is_drafter,
        rounding=policy.rounding,
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
        network = _for_known(known, network, facts).rounded()
        prefix = "compensation."
        compensation = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        unknown = tensors.keys() - {f"network.{name}" for name in PolicyNetwork.__slots__}
        unknown -= {f"compensation.{name}" for name in compensation}
        unknown -= {f"head.{name}" for name in HeadMap.__slots__}
        if unknown:
            raise PolicyFileError(f"has an unknown tensor {quoted(min(unknown))}")
        return LearnedPolicy(
            name=facts.name,
            network=network.to(device),
            spec=facts.spec,
            compensation=restored(facts.compensation, compensation, config, dtype, device),
            calibration=facts.calibration,
            plans=facts.plans,
            is_drafter=facts.is_drafter,
            head_map=_checked_head_map(tensors, facts.spec.head, config, device),
            rounding=facts.rounding,
        )


def load_compensation_of(
    path: Path, config: ModelConfig, fingerprint: str, *, dtype: torch.dtype, device: torch.device
) -> Compensation:
    """Reads the compensation of a policy's file, or of one that holds nothing else (`compensation_file.py`).

    Raises:
        PolicyFileError: the message names the file and the fault.
    """
    if has_metadata(path, _KEY):
        return load_policy(path, config, fingerprint, dtype=dtype, device=device).compensation
    return load_compensation(path, config, fingerprint, dtype=dtype, device=device)


def _checked_network(tensors: Mapping[str, Tensor], facts: PolicyMetadata, config: ModelConfig) -> PolicyNetwork:
    network = PolicyNetwork(*(tensors[f"network.{name}"] for name in PolicyNetwork.__slots__))
    blocks, block_size, num_actions = len(facts.spec.decision_blocks), facts.spec.block_size, len(facts.spec.actions)
    widths = (network.hidden_weight.shape[0], network.inner_weight.shape[0])
    sizes = (blocks, block_size, num_actions, config.hidden_size, len(facts.embedded_actions), *widths)
    for name, shape in PolicyNetwork.shapes(*sizes).items():
        tensor: Tensor = getattr(network, name)
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise PolicyFileError(f"tensor network.{name} must be finite float32 of shape {shape}")
    return network


def _checked_head_map(
    tensors: Mapping[str, Tensor], head: Action, config: ModelConfig, device: torch.device
) -> HeadMap | None:
    own = [tensors.get(f"head.{name}") for name in HeadMap.__slots__]
    if all(tensor is None for tensor in own):
        if head is Action.SKIP:
            raise PolicyFileError("has a narrow head without its map")
        return None
    rank = own[0].shape[0] if own[0] is not None and own[0].ndim else 0
    if not rank or rank % GROUP_SIZE:
        raise PolicyFileError(f"tensor head.narrow must have a multiple of {GROUP_SIZE} rows")
    shapes = (rank, config.hidden_size), (config.hidden_size, rank), (config.vocab_size,)
    for name, tensor, shape in zip(HeadMap.__slots__, own, shapes, strict=True):
        is_known = tensor is not None and tensor.dtype == torch.float16 and tuple(tensor.shape) == shape
        if tensor is None or not is_known or not tensor.isfinite().all():
            raise PolicyFileError(f"tensor head.{name} must be finite float16 of shape {shape}")
    return HeadMap(*(tensor.to(device, torch.float32) for tensor in own if tensor is not None))


def _for_known(known: Mapping[str, Action], network: PolicyNetwork, facts: PolicyMetadata) -> PolicyNetwork:
    """Returns the network with a row of facts for each known action; zeros if the file has none."""
    num_own = len(facts.embedded_actions)
    own, scalars = network.fact_weight.tensor_split((num_own,), dim=1)
    rows = dict(zip(facts.embedded_actions, own.unbind(1), strict=True))
    known_rows = [rows.get(name, torch.zeros_like(own[:, 0])) for name in _by_number(known)]
    return replace(network, fact_weight=torch.cat((torch.stack(known_rows, dim=1), scalars), dim=1))


def _by_number(known: Mapping[str, Action]) -> list[str]:
    """Returns the names of the actions in the order of a network's rows."""
    return sorted(known, key=known.__getitem__)
