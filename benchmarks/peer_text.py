"""`python -m benchmarks.peer_text FILE.gguf …`: holds a model's full depth to llama.cpp's greedy answers.

Renders each conversation with the file's chat template, if it has one, here and by llama.cpp's Python package, and
compares the tokens. llama.cpp then answers; full depth reads its answer, token after token, and says which tokens it
would have chosen otherwise, and by how many nats. llama.cpp rounds activations too, so a few differ. Exits with 1 if a
prompt's tokens differ. Needs `pip install llama-cpp-python`, which compiles it.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.llama_child import Llama
from benchmarks.rounds import progress
from dash_runtime.actions import Action
from dash_runtime.checkpoints import (
    default_cache_folder,
    load_model_config,
    load_tokenizer,
    open_weights,
    resolve_checkpoint,
    tokenizer_file,
)
from dash_runtime.checkpoints.chat_template import ChatTemplate
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.full_path import full_outputs
from dash_runtime.decoder.loading import make_decoder
from dash_runtime.startup.build import DTYPES

_QUESTIONS = (
    "What is the capital of France, and which river flows through it?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Explain in two sentences why the sky is blue.",
    "Translate to German: The library opens at nine in the morning.",
    "List five animals that lay eggs.",
    "A train travels 60 km in 45 minutes. How fast is it, in km/h?",
)
_MOST_POSITIONS = 640


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_text", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--precision", choices=DTYPES, default="bfloat16")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    agree = [_agrees(file, DTYPES[options.precision], options.tokens) for file in options.files]
    raise SystemExit(int(not all(agree)))


def _agrees(file: Path, dtype: torch.dtype, num_tokens: int) -> bool:
    import llama_cpp
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    folder = resolve_checkpoint(str(file), None, default_cache_folder(os.environ), progress)
    template, tokenizer = ChatTemplate.load(folder), load_tokenizer(tokenizer_file(folder))
    decoder = _decoder(folder, dtype)
    vocabulary = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    ends = [vocabulary._model.token_get_text(own) for own in (vocabulary.token_eos(), vocabulary.token_bos())]
    source = vocabulary.metadata.get("tokenizer.chat_template")
    llama = Llama(llama_cpp, str(file), torch.get_num_threads(), max_sequences=1, max_length=_MOST_POSITIONS)
    num_same, num_equal, gaps = 0, 0, [0.0]
    for question in _QUESTIONS:
        text = their_text = question
        if source is not None:
            messages: Any = [{"role": "user", "content": question}]
            text = template.render([("user", question)])
            their_text = Jinja2ChatFormatter(source, *ends)(messages=messages).prompt
        prompt = tokenizer.encode(text, add_special_tokens=False).ids
        theirs = vocabulary.tokenize(their_text.encode(), add_bos=False, special=True)
        num_same += prompt == theirs
        answer = [token for (token,) in llama.steps([prompt], num_tokens)]
        outputs = full_outputs(decoder, [[*prompt, *answer[:-1]]])[-num_tokens:]
        logprobs = decoder.logits(outputs, (Action.FULL,) * num_tokens).log_softmax(-1)
        lost = logprobs.amax(-1) - logprobs[torch.arange(num_tokens), torch.tensor(answer)]
        num_equal += int((lost == 0).sum())
        gaps += lost[lost > 0].tolist()
    progress(
        f"{file.name}: {num_same} of {len(_QUESTIONS)} prompts have llama.cpp's tokens; full depth chooses {num_equal} "
        f"of its {num_tokens * len(_QUESTIONS)}, and others for the rest, by at most {max(gaps):.2f} nats"
    )
    return num_same == len(_QUESTIONS)


def _decoder(folder: Path, dtype: torch.dtype) -> Decoder:
    config = load_model_config(folder)
    sizes: dict[str, Any] = {"dtype": dtype, "device": torch.device("cpu"), "context_length": _MOST_POSITIONS}
    return make_decoder(config, open_weights(folder), (Action.FULL,), **sizes)


if __name__ == "__main__":
    main()
