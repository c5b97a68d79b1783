"""Loads the damaged files as the server and its worker do, and describes the result part by part."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import check_weights, load_model_config, open_weights, resolve_checkpoint
from dash_runtime.checkpoints.chat_template import ChatTemplate
from dash_runtime.checkpoints.conversion_cache import ConversionSource, cached_conversion
from dash_runtime.checkpoints.gguf_conversion import convert_gguf
from dash_runtime.decoder.loading import make_decoder
from dash_runtime.errors import InvalidRequest
from dash_runtime.model_config import BlockConfig, ModelConfig, RopeConfig
from dash_runtime.policy.compensation_file import load_compensation
from dash_runtime.policy.model_sketch import model_fingerprint
from dash_runtime.policy.policy_file import find_policies, load_policy
from dash_server.text import TextTokenizer
from tests.runtime.support import CPU
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE

CONVERSION = "tiny-conversion"
FINGERPRINT = "a model"

_CONTEXT_TOKENS = 64
"""The worker has a setting that bounds the context too, and with it the size of the decoder's tables."""
_TEXT = "Hello <|user|> wörld"
_MESSAGES = [("user", "Hello"), ("assistant", "Yes?")]
_NUM_LAYERS = 4
_POLICY_MODEL = ModelConfig(
    name="tiny",
    architecture="LlamaForCausalLM",
    num_layers=_NUM_LAYERS,
    hidden_size=HIDDEN_SIZE,
    num_heads=4,
    num_kv_heads=2,
    head_dim=HIDDEN_SIZE // 4,
    intermediate_size=160,
    vocab_size=VOCAB_SIZE,
    rms_norm_eps=1e-6,
    context_length=512,
    block=BlockConfig(),
    ropes=(RopeConfig(10000.0),) * _NUM_LAYERS,
    has_tied_head=True,
    sliding_window=(None,) * _NUM_LAYERS,
    eos_token_ids=frozenset((256,)),
)

Parts = Mapping[str, str]


@dataclass(frozen=True)
class Loaded:
    """The loaded result, part by part; `message` is the log's message if a file was mended."""

    parts: Parts
    message: str | None = None


def load_folder(folder: Path) -> Loaded:
    """Loads a model folder."""
    return Loaded(_model_parts(resolve_checkpoint(str(folder), None, folder / "no-cache")))


def load_gguf(folder: Path) -> Loaded:
    """Loads a GGUF file that was never converted."""
    return Loaded(_model_parts(resolve_checkpoint(str(folder / "tiny.gguf"), None, folder / "converted")))


def load_conversion(folder: Path) -> Loaded:
    """Loads a kept conversion whose GGUF file still exists."""
    messages: list[str] = []
    source = ConversionSource("tiny", "the source", CONVERSION, lambda: folder / "tiny.gguf")
    converted = cached_conversion(source, folder / "kept", convert_gguf, messages.append)
    return Loaded(_model_parts(converted), messages[0] if messages else None)


def load_converted_folder(folder: Path) -> Loaded:
    """Loads a kept conversion by its own path."""
    return load_folder(folder / "kept" / CONVERSION)


def load_policies(folder: Path) -> Loaded:
    """Loads the one policy file in `folder`, by its name and as a shipped one."""
    find_policies(folder, FINGERPRINT)
    policy = load_policy(folder / "tiny.safetensors", _POLICY_MODEL, FINGERPRINT, dtype=torch.float32, device=CPU)
    parts = {name: repr(getattr(policy, name)) for name in ("name", "spec", "calibration", "is_drafter")}
    parts["network"] = _digest({name: getattr(policy.network, name) for name in policy.network.__slots__})
    parts["compensation"] = f"{policy.compensation.kind} {_digest(policy.compensation.tensors())}"
    return Loaded(parts)


def load_fit(folder: Path) -> Loaded:
    """Loads a compensation file."""
    file = folder / "tiny.safetensors"
    compensation = load_compensation(file, _POLICY_MODEL, FINGERPRINT, dtype=torch.float32, device=CPU)
    return Loaded({"compensation": f"{compensation.kind} {_digest(compensation.tensors())}"})


def _model_parts(folder: Path) -> Parts:
    config = load_model_config(folder, "tiny")
    weights = open_weights(folder)
    check_weights(weights, config)
    parts = {f"config.{field.name}": repr(getattr(config, field.name)) for field in fields(config)}
    parts["weights"] = _digest(weights) + model_fingerprint(config, weights)
    context_length = min(config.context_length, _CONTEXT_TOKENS)
    make_decoder(config, weights, (Action.FULL,), dtype=torch.float32, device=CPU, context_length=context_length)
    tokenizer, template = TextTokenizer.load(folder), ChatTemplate.load(folder)
    ids = tokenizer.encode(_TEXT)
    parts["token ids"] = f"{ids} {tokenizer.decode(ids)!r}"
    parts["special token ids"] = repr(sorted(tokenizer.special_token_ids))
    parts["tokenizer"] = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    parts["chat template"] = repr(template.source)
    parts["special tokens"] = repr(sorted(template._special_tokens.items()))
    try:
        parts["conversation"] = template.render(_MESSAGES) + template.render_conversation(_MESSAGES)
    except InvalidRequest as error:
        parts["conversation"] = f"refused: {error}"
    return parts


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
