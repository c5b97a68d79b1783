"""Checks that a folder has the files of a Hugging Face checkpoint, and that its texts can be used.

Reads no configuration and no weights.
"""

from pathlib import Path

from dash_runtime.checkpoints.hf_config import CONFIG_FILE
from dash_runtime.checkpoints.tokenizer_file import load_tokenizer
from dash_runtime.checkpoints.weights import GGUF_PLACE_FILE, INDEX_FILE, WEIGHTS_FILE, missing_weights
from dash_runtime.errors import CheckpointError, CheckpointNotFound

TOKENIZER_FILE = "tokenizer.json"


def check_folder(folder: Path) -> None:
    """Checks that a Hugging Face folder has the files that are read from it.

    Reads the tokenizer and the chat template: their users may come to them long after the weights were packed.

    Raises:
        CheckpointNotFound: config.json or the weights are missing.
        CheckpointError: there is no tokenizer.json, or the weights are no safetensors.
        CorruptCheckpoint: the tokenizer or the chat template cannot be used.
    """
    # Imports Jinja, which importing this package must not.
    from dash_runtime.checkpoints.chat_template import ChatTemplate

    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointNotFound(f"{folder} is no model: it has no {CONFIG_FILE}.")
    if not any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE, GGUF_PLACE_FILE)):
        raise missing_weights(folder)
    load_tokenizer(tokenizer_file(folder))
    ChatTemplate.load(folder)


def tokenizer_file(folder: Path) -> Path:
    """Returns the folder's tokenizer.json.

    Raises:
        CheckpointError: there is none.
    """
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json; save the model's fast tokenizer there with save_pretrained."
        )
    return file
