"""The embedded model, converted once into the user's cache, is the model that llama.cpp runs."""

import time
from pathlib import Path

import pytest

from dash_runtime.checkpoints import check_weights, load_model_config, open_weights, resolve_checkpoint
from dash_runtime.checkpoints.manifest import sha256_of
from tests.runtime.gguf_files import load_tokenizer

pytestmark = pytest.mark.embedded

# From llama.cpp's own tokenizer on the same file (POST /tokenize, parse_special).
LLAMA_CPP_IDS = {
    "in 2024, 12345 and 3.14159": [
        *[254, 216, 34, 32, 34, 36, 28, 216, 33, 34, 35, 36, 37],
        *[284, 216, 35, 30, 33, 36, 33, 37, 41],
    ],
    "x=1;y=22;z=333\r\nfoo\r\n\r\nbar\n\n\nbaz\t\ttab": [
        *[104, 45, 33, 43, 105, 45, 34, 34, 43, 106, 45, 35, 35, 35, 201, 198],
        *[15236, 7209, 198, 6299, 1116, 198, 45511, 197, 197, 15999],
    ],
    "naïve café — “quotes” …": [3546, 46494, 37366, 1841, 619, 385, 2346, 573, 5548],
    "<|im_start|>user\nhi<|im_end|>\n": [1, 4093, 198, 6004, 2, 198],
    "<|im_start|><|endoftext|>  <|im_end|>x": [1, 0, 256, 2, 104],
    "\t \n \r ": [197, 3717, 26410, 216],
    "Ⅳ ½ ² ٣٤٥ १२३": [
        *[173, 223, 113, 216, 16738, 216, 19133, 216, 164, 113, 164, 114, 164, 115],
        *[216, 9310, 117, 9310, 118, 9310, 119],
    ],
    "": [],
}


@pytest.fixture(scope="module")
def folder(embedded_cache: Path) -> Path:
    return resolve_checkpoint("embedded", None, embedded_cache)


def test_a_warm_start_takes_little_longer_than_reading_what_is_kept(folder: Path, embedded_cache: Path) -> None:
    starting, reading = [], []
    for _ in range(5):  # other work on the machine only ever adds time, most of it not this process's
        first = time.process_time()
        assert resolve_checkpoint("embedded", None, embedded_cache) == folder
        second = time.process_time()
        for path in folder.iterdir():
            sha256_of(path)
        starting.append(second - first)
        reading.append(time.process_time() - second)
    assert min(starting) < 1.5 * min(reading)


def test_its_shape_and_name(folder: Path) -> None:
    config = load_model_config(folder)
    assert config.name == "SmolLM2-135M-Instruct"
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.vocab_size, config.context_length, config.ropes[0].theta) == (49152, 8192, 100000.0)
    assert config.has_tied_head
    assert config.eos_token_ids == {2}
    check_weights(open_weights(folder), config)


def test_its_tokenizer_gives_llama_cpps_ids(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for text, ids in LLAMA_CPP_IDS.items():
        assert tokenizer.encode(text).ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
