"""Converts one GGUF file into the files of a Hugging Face folder.

Knows the order of the steps; knows no caches, locks or manifests.
"""

import json
from pathlib import Path

from dash_runtime.checkpoints.gguf_config import config_keys, eos_token_ids, gguf_family
from dash_runtime.checkpoints.gguf_file import GgufFile
from dash_runtime.checkpoints.gguf_parameters import GgufParameters, write_weights
from dash_runtime.checkpoints.gguf_weights import write_place
from dash_runtime.checkpoints.hf_config import CONFIG_FILE, GENERATION_CONFIG_FILE, parse_model_config
from dash_runtime.checkpoints.weights import WEIGHTS_FILE
from dash_runtime.progress import Progress


def convert_gguf(
    path: Path, folder: Path, progress: Progress = lambda message: None, *, copies_weights: bool = True
) -> None:
    """Writes configuration, tokenizer and chat template of the model in `path` into `folder`, and its weights in
    bfloat16; or, instead of these, where they are.

    `progress` hears of the weights only, which take long: what is not supported is refused before.

    Raises:
        CorruptCheckpoint: the file is damaged, naming it.
        UnsupportedArchitecture: the model or its tokenizer is not supported, naming it.
    """
    from dash_runtime.checkpoints.gguf_tokenizer import write_tokenizer

    gguf = GgufFile(path)
    family = gguf_family(gguf)
    raw = config_keys(gguf, family)
    config = parse_model_config(raw, path.stem, path)
    _write_json(folder / CONFIG_FILE, raw)
    ends = eos_token_ids(gguf, config.vocab_size)
    generation: dict[str, object] = {"eos_token_id": ends} | {key: raw[key] for key in ("bos_token_id",) if key in raw}
    _write_json(folder / GENERATION_CONFIG_FILE, generation)
    write_tokenizer(gguf, config.vocab_size, folder)
    parameters = GgufParameters(gguf, family, config)
    if copies_weights:
        write_weights(parameters, folder / WEIGHTS_FILE, path.name, progress)
    else:
        write_place(parameters, folder)


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2), encoding="utf-8")
