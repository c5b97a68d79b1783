"""Decodes with llama.cpp or its fork ik_llama.cpp in this process: answers every line of prompts with a line of
arrival times.

By its C API, without a sampler: numpy takes the largest logits. Runs in an environment of its own, so it imports
nothing of ours: `python -I llama_child.py MODULE FILE NUM_THREADS MAX_SEQUENCES MAX_LENGTH`. `child.py` describes the
lines. One more, `{"text": [token ids], "file": FILE}`, asks for the logits behind each token, float32
`[tokens, vocab_size]` in numpy's format, and is answered with `{}`.

`python -I llama_child.py MODULE --quantize FILE TYPE OUTPUT` writes the file in another of its formats instead.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy


class Llama:
    """A model and one context, for up to `max_sequences` of up to `max_length` tokens."""

    def __init__(self, library: Any, file: str, num_threads: int, max_sequences: int, max_length: int) -> None:
        self._library = library
        library.llama_backend_init()
        model_options = library.llama_model_default_params()
        model_options.n_gpu_layers = 0
        if hasattr(model_options, "repack_tensors"):  # ik_llama.cpp's run-time repacking
            model_options.repack_tensors = True
            model_options.use_mmap = False
        model = library.llama_model_load_from_file(file.encode(), model_options)
        options = library.llama_context_default_params()
        options.n_ctx, options.n_seq_max = max_sequences * max_length, max_sequences
        options.n_batch = max(options.n_batch, max_length)
        options.n_threads = options.n_threads_batch = num_threads
        if hasattr(options, "flash_attn"):  # as its own llama-bench has it; llama.cpp finds out by itself
            options.flash_attn = True
        self._context = library.llama_init_from_model(model, options)
        self._vocabulary_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        self._batch = library.llama_batch_init(options.n_batch, 0, 1)

    def steps(self, prompts: Sequence[list[int]], num_tokens: int) -> Iterator[list[int]]:
        """Yields the next token of each prompt, `num_tokens` times."""
        self._clear()
        rows = list(prompts)
        length = 0
        for _ in range(num_tokens):
            # Prompts come one by one: together they may be longer than a batch.
            groups = [range(len(rows))] if length else [[number] for number in range(len(rows))]
            chosen = [int(self._logits(end).argmax()) for group in groups for end in self._decode(rows, group, length)]
            length += len(rows[0])
            rows = [[token] for token in chosen]
            yield chosen

    def logits(self, text: list[int]) -> numpy.ndarray:
        """Returns the logits behind each token, float32 `[tokens, vocab_size]`."""
        self._clear()
        # One by one, as decoding has them.
        each = enumerate(text)
        return numpy.stack([self._logits(*self._decode([[token]], [0], place)).copy() for place, token in each])

    def _clear(self) -> None:
        if hasattr(self._library, "llama_kv_cache_clear"):  # ik_llama.cpp
            self._library.llama_kv_cache_clear(self._context)
        else:
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def _decode(self, rows: Sequence[list[int]], group: Sequence[int], length: int) -> list[int]:
        """Feeds the tokens of some sequences, all behind `length` others, and returns the place of each one's last."""
        batch, place = self._batch, 0
        ends = []
        for sequence in group:
            for position, token in enumerate(rows[sequence], length):
                batch.token[place], batch.pos[place], batch.logits[place] = token, position, 0
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
                place += 1
            ends.append(place - 1)
            batch.logits[place - 1] = 1
        batch.n_tokens = place
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        return ends

    def _logits(self, place: int) -> numpy.ndarray:
        pointer = self._library.llama_get_logits_ith(self._context, place)
        return numpy.ctypeslib.as_array(pointer, shape=(self._vocabulary_size,))


def main() -> None:
    library = importlib.import_module(sys.argv[1])
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if sys.argv[2] == "--quantize":
        quantize(library, *sys.argv[3:])
        return
    file, *sizes = sys.argv[2:]
    llama = Llama(library, file, *map(int, sizes))
    package = sys.argv[1].split(".")[0]
    ready = f"{package} {importlib.import_module(package).__version__}"
    print(json.dumps({"ready": ready}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(llama, json.loads(line))), file=answers, flush=True)


def _answer(llama: Llama, asked: dict[str, Any]) -> dict[str, Any]:
    if "text" in asked:
        numpy.save(asked["file"], llama.logits(asked["text"]))
        return {}
    arrivals: list[tuple[float, int]] = []
    started = time.perf_counter()
    for _ in llama.steps(asked["prompts"], asked["num_tokens"]):
        arrivals.append((time.perf_counter(), 1))
    return {"started": started, "streams": [arrivals] * len(asked["prompts"])}


def quantize(library: Any, file: str, kind: str, output: str) -> None:
    options = library.llama_model_quantize_default_params()
    options.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.allow_requantize = True
    status = library.llama_model_quantize(file.encode(), output.encode(), options)
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status}")


if __name__ == "__main__":
    main()
