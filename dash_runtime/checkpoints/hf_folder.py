"""Says whether a folder has what is read from a Hugging Face checkpoint. Reads none of it."""

from pathlib import Path

from dash_runtime.checkpoints.hf_config import CONFIG_FILE
from dash_runtime.checkpoints.weights import INDEX_FILE, WEIGHTS_FILE, missing_weights
from dash_runtime.errors import CheckpointError, CheckpointNotFound

TOKENIZER_FILE = "tokenizer.json"


def check_folder(folder: Path) -> None:
    """Checks that a Hugging Face folder has what is read from it.

    Raises:
        CheckpointNotFound: config.json or the weights are missing.
        CheckpointError: there is no tokenizer.json, or the weights are no safetensors.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointNotFound(f"{folder} is no model: it has no {CONFIG_FILE}.")
    if not (folder / WEIGHTS_FILE).is_file() and not (folder / INDEX_FILE).is_file():
        raise missing_weights(folder)
    tokenizer_file(folder)


def tokenizer_file(folder: Path) -> Path:
    """The folder's tokenizer.json.

    Raises:
        CheckpointError: there is none.
    """
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json; save the model's fast tokenizer there with save_pretrained."
        )
    return file
