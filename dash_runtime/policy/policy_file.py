"""Policy files: a learned policy as safetensors, with what it was made for as metadata.

A file names the model it belongs to by fingerprint and is refused for another one. Everything read is
checked against its bounds before use. Knows files; knows no training and no serving.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dash_runtime.actions import Action, CostTable
from dash_runtime.errors import ConfigError, PolicyFileError
from dash_runtime.model_config import ModelConfig
from dash_runtime.policy.compensation_file import restored, stored
from dash_runtime.policy.learned import NUM_SCALAR_FEATURES, Calibration, LearnedPolicy, PolicyNetwork
from dash_runtime.policy.policy import decision_blocks
from dash_runtime.policy.tensor_file import load_tensors, save_tensors

FORMAT = "dash-policy-2"
FEATURES = "rms-normalised-hidden|block|last-action|cost-spent,log-price,log-price-squared"
_KEY = "dash_policy"


def model_fingerprint(config: ModelConfig, weights: Mapping[str, Tensor]) -> str:
    """A name for a model by its shape and its norm weights: cheap to read, and different for each
    training."""
    digest = hashlib.sha256()
    shape = (config.num_layers, config.hidden_size, config.num_heads, config.vocab_size, config.head_dim)
    digest.update(repr(shape).encode())
    for index in range(config.num_layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            weight = weights[f"model.layers.{index}.{name}.weight"]
            digest.update(weight.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def find_policies(folder: Path, fingerprint: str) -> list[Path]:
    """The policy files in `folder` that were made for the model with this fingerprint, by name."""
    found: list[Path] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if json.loads(file.metadata()[_KEY])["model_fingerprint"] == fingerprint:
                found.append(path)
    return found


def save_policy(path: Path, policy: LearnedPolicy, fingerprint: str) -> None:
    """Writes the file in one rename, so that a reader never sees half of it.

    Raises:
        PolicyFileError: it cannot be written.
    """
    tensors = {f"network.{name}": getattr(policy.network, name) for name in PolicyNetwork.__slots__}
    tensors |= {f"compensation.{name}": tensor for name, tensor in stored(policy.compensation).items()}
    facts = {
        "format": FORMAT,
        "name": policy.name,
        "model_fingerprint": fingerprint,
        "features": FEATURES,
        "actions": [action.name for action in policy.actions],
        "pinned": sorted(policy.pinned),
        "lookahead": policy.lookahead,
        "block_size": policy.block_size,
        "head": policy.head.name,
        "pinned_action": policy.pinned_action.name,
        "is_drafter": policy.is_drafter,
        "compensation": policy.compensation.kind.value,
        "costs": policy.costs.to_json(),
        "calibration": [list(point) for point in policy.calibration.points],
        "divergences": list(policy.calibration.divergences),
        "recommended_budget": policy.calibration.recommended_budget,
    }
    save_tensors(path, "policy file", tensors, {_KEY: json.dumps(facts)})


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
    tensors, metadata = load_tensors(path, "policy file")
    try:
        facts = json.loads(metadata[_KEY])
        return _policy_from(facts, tensors, config, fingerprint, dtype, device)
    except PolicyFileError as error:
        raise PolicyFileError(f"policy file {path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ConfigError) as error:
        raise PolicyFileError(f"policy file {path} is damaged: {type(error).__name__} {error}") from None


def _policy_from(
    facts: dict[str, Any],
    tensors: dict[str, Tensor],
    config: ModelConfig,
    fingerprint: str,
    dtype: torch.dtype,
    device: torch.device,
) -> LearnedPolicy:
    for key, expected in (("format", FORMAT), ("features", FEATURES)):
        if facts[key] != expected:
            raise PolicyFileError(f"has {key} {facts[key]!r}; this version reads {expected!r}")
    if facts["model_fingerprint"] != fingerprint:
        raise PolicyFileError(f"was made for another model than {config.name}")
    actions = tuple(Action[name] for name in facts["actions"])
    pinned, lookahead, block_size = frozenset(facts["pinned"]), int(facts["lookahead"]), int(facts["block_size"])
    _check_layers(pinned, lookahead, config.num_layers)
    if not 1 <= block_size <= config.num_layers:
        raise PolicyFileError(f"has block_size {block_size}; it must be 1 to {config.num_layers}")
    num_blocks = len(decision_blocks(config.num_layers, pinned, block_size))
    network = _network_from(tensors, config, (num_blocks, block_size, len(actions)))
    costs = CostTable.from_json(facts["costs"])
    if costs.num_layers != config.num_layers or not set(actions) <= set(costs.layer):
        raise PolicyFileError("has a cost table for other layers or actions than its own")
    head = Action[facts["head"]]
    if head not in costs.head:
        raise PolicyFileError(f"has no cost for its head precision {head.name}")
    pinned_action = Action[facts.get("pinned_action", Action.FULL.name)]
    if pinned_action is Action.SKIP or pinned_action not in costs.layer:
        raise PolicyFileError(f"runs pinned layers in {pinned_action.name}, which is no kernel or has no cost")
    points = tuple((float(budget), float(log_price)) for budget, log_price in facts["calibration"])
    if not points or list(points) != sorted(points) or not 0 < points[0][0] <= points[-1][0] <= 1:
        raise PolicyFileError("has a calibration that is empty, not ascending or outside (0, 1]")
    calibration = Calibration(
        points, tuple(float(value) for value in facts["divergences"]), float(facts["recommended_budget"])
    )
    if len(calibration.divergences) != len(points) or not points[0][0] <= calibration.recommended_budget <= 1:
        raise PolicyFileError("has a recommended budget or divergences that do not fit its calibration")
    rung = {
        name.removeprefix("compensation."): tensor
        for name, tensor in tensors.items()
        if name.startswith("compensation.")
    }
    compensation = restored(facts["compensation"], rung, config, dtype, device)
    on_device = PolicyNetwork(*(getattr(network, name).to(device) for name in PolicyNetwork.__slots__))
    return LearnedPolicy(
        str(facts["name"]),
        on_device,
        actions,
        pinned,
        lookahead,
        block_size,
        head,
        compensation,
        costs,
        calibration,
        pinned_action,
        is_drafter=bool(facts.get("is_drafter", False)),
    )


def _check_layers(pinned: frozenset[int], lookahead: int, num_layers: int) -> None:
    if lookahead < 1:
        raise PolicyFileError(f"has lookahead {lookahead}; it must be at least 1")
    if not pinned <= set(range(num_layers)):
        raise PolicyFileError(f"pins layers that a model of {num_layers} layers does not have")
    undecided = set(range(min(lookahead, num_layers))) | {num_layers - 1}
    if not undecided <= pinned:
        raise PolicyFileError(f"must pin layers {sorted(undecided)}, which it cannot decide with its lookahead")


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
