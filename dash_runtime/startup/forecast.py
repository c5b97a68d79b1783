"""Tells what a model will take before anything is done with it. Knows configurations and bytes; reads no weights."""

import shutil
from pathlib import Path

import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import described_model
from dash_runtime.config import EngineConfig
from dash_runtime.devices import device_of
from dash_runtime.progress import Progress
from dash_runtime.startup.memory_plan import model_bytes


def tell_needs(model: str, cache_folder: Path, config: EngineConfig, progress: Progress) -> None:
    """Tells the weights, memory and disk that a GGUF file or a folder takes. Says nothing of what it cannot read: the
    start will."""
    own = described_model(model, cache_folder)
    if own is None:
        return
    device = device_of(torch.device("cpu"))
    context = min(own.context_length, config.context_length or own.context_length)
    needs = model_bytes(own, tuple(Action), torch.bfloat16, context, config, (), device)
    num_weights = sum(map(own.num_weights, range(own.num_layers))) + own.vocab_size * own.hidden_size
    parts = {action: needs.weights_in(action.name) for action in (Action.FULL, Action.INT8, Action.INT4)}
    disk = sum(parts.values())
    parts[Action.INT8] += parts[Action.INT4]  # which its layers share
    listed = ", ".join(f"{size / 1e9:.1f} GB in {action.name}" for action, size in parts.items())
    free = device.free_bytes()
    memory = "" if free is None else f" of {free / 1e9:.1f} GB that are free"
    progress(f"{own.name}: {num_weights / 1e9:.2f} billion weights take {listed}{memory}")
    existing = next(folder for folder in (cache_folder, *cache_folder.parents) if folder.exists())
    left = shutil.disk_usage(existing).free
    progress(f"{own.name}: up to {disk / 1e9:.1f} GB of {left / 1e9:.1f} GB that are free in {cache_folder}")
