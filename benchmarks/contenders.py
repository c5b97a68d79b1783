"""The contenders: our engine, transformers and llama.cpp, each decoding greedily from token ids.

All run in one process behind one call, so that they can take turns. Knows models; knows no figures.
"""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.runs import Run, run_from_arrivals
from dash_runtime.config import GenerationRequest, SamplingParameters, SkipOptions, StoppingParameters
from dash_runtime.constraint import Constraint
from dash_runtime.engine.engine import Engine
from dash_runtime.events import SequenceFinished, TokenProduced


class Contender(Protocol):
    """Continues all prompts at once by `num_tokens`, past any end of sequence."""

    def run(self, prompts: Sequence[list[int]], num_tokens: int) -> Run: ...


class EngineContender:
    """Our engine in one mode, without server or transport. With a constraint, its end ends an answer."""

    def __init__(
        self,
        engine: Engine,
        skip: SkipOptions,
        constraint: Constraint | None = None,
        sampling: SamplingParameters | None = None,
    ) -> None:
        self._engine = engine
        self._skip = skip
        self._constraint = constraint
        self._sampling = SamplingParameters() if sampling is None else sampling

    @torch.inference_mode()  # as a worker serves
    def run(self, prompts: Sequence[list[int]], num_tokens: int) -> Run:
        engine = self._engine
        arrivals: dict[str, list[tuple[float, int]]] = {str(number): [] for number in range(len(prompts))}
        shares: list[float] = []
        started = time.perf_counter()
        try:
            for request_id, prompt in zip(arrivals, prompts, strict=True):
                stopping = StoppingParameters(num_tokens, ignore_eos=True)
                own = request_id, prompt, stopping, self._sampling
                engine.submit(GenerationRequest(*own, skip=self._skip, constraint=self._constraint))
            while engine.has_work:
                events = engine.step()
                now = time.perf_counter()
                for event in events:
                    if isinstance(event, TokenProduced):
                        arrivals[event.request_id].append((now, 1))
                    elif isinstance(event, SequenceFinished) and event.decode_seconds:
                        shares.append(event.depth.exposed_ns / 1e9 / event.decode_seconds)
        finally:
            for request_id in arrivals:
                engine.cancel(request_id)
        return run_from_arrivals(started, list(arrivals.values()), sum(shares) / len(shares) if shares else 0.0)


class Transformers:
    """transformers' `generate` in bf16, with scaled-dot-product attention and a dynamic cache."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
        self._model.eval()
        # Without an end-of-sequence token, no processor forbids it and nothing looks for it.
        self._model.generation_config = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)

    def run(self, prompts: Sequence[list[int]], num_tokens: int, **assistance: object) -> Run:
        """`assistance` holds the arguments of `generate` for drafting."""
        inputs = torch.tensor(prompts)
        arrivals: list[tuple[float, int]] = []

        def note_time(input_ids: torch.Tensor, scores: Any, **_: object) -> torch.Tensor:
            num_new = input_ids.shape[1] - inputs.shape[1] - sum(count for _, count in arrivals)
            arrivals.append((time.perf_counter(), num_new))
            return torch.zeros(len(input_ids), dtype=torch.bool)

        started = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=num_tokens,
                stopping_criteria=[note_time],
                **assistance,
            )
        num_come = sum(count for _, count in arrivals)
        if num_come != num_tokens:
            raise RuntimeError(f"{num_come} tokens came instead of {num_tokens}")
        return run_from_arrivals(started, [arrivals] * len(prompts))


class LlamaCpp:
    """llama.cpp on the unchanged GGUF file, by its C API, without a sampler: numpy takes the largest logits.

    `Llama.eval` of the same package takes 15 % more time. Takes up to `max_sequences` of up to `max_length` tokens.
    """

    def __init__(self, file: Path, num_threads: int, *, max_sequences: int = 16, max_length: int = 640) -> None:
        import llama_cpp
        import numpy

        self._library, self._numpy = llama_cpp, numpy
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, None)
        model_options = llama_cpp.llama_model_default_params()
        model_options.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), model_options)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = max_sequences * max_length, max_sequences
        options.n_threads = options.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(model, options)
        self._vocabulary_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(options.n_batch, 0, 1)

    @property
    def description(self) -> str:
        info = self._library.llama_print_system_info().decode().strip(" |")
        return f"llama-cpp-python {self._library.__version__} ({info})"

    def run(self, prompts: Sequence[list[int]], num_tokens: int) -> Run:
        arrivals: list[list[tuple[float, int]]] = [[] for _ in prompts]
        started = time.perf_counter()
        for _ in self.steps(prompts, num_tokens):
            now = time.perf_counter()
            for own in arrivals:
                own.append((now, 1))
        return run_from_arrivals(started, arrivals)

    def steps(self, prompts: Sequence[list[int]], num_tokens: int) -> Iterator[list[int]]:
        """Yields the next token of each prompt, `num_tokens` times."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        rows = list(prompts)
        length = 0
        for _ in range(num_tokens):
            # Prompts come one by one: together they may be longer than a batch.
            groups = [range(len(rows))] if length else [[number] for number in range(len(rows))]
            chosen = [token for group in groups for token in self._decode(rows, group, length)]
            length += len(rows[0])
            rows = [[token] for token in chosen]
            yield chosen

    def _decode(self, rows: Sequence[list[int]], group: Sequence[int], length: int) -> list[int]:
        """Feeds the tokens of some sequences, all behind `length` others, and returns the likeliest next of each."""
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
        return [self._largest_logit(end) for end in ends]

    def _largest_logit(self, place: int) -> int:
        logits = self._library.llama_get_logits_ith(self._context, place)
        return int(self._numpy.ctypeslib.as_array(logits, shape=(self._vocabulary_size,)).argmax())


def check_llama_cpp(file: Path, num_threads: int) -> None:
    """Tries llama.cpp in a process of its own. Raises RuntimeError if it crashes on this machine, as it was built."""
    trial = multiprocessing.get_context("spawn").Process(target=_run_llama_cpp, args=(file, num_threads))
    trial.start()
    trial.join()
    if trial.exitcode:
        raise RuntimeError(f"it ends with {trial.exitcode} on this machine; docs/performance.md has a cause")


def _run_llama_cpp(file: Path, num_threads: int) -> None:
    LlamaCpp(file, num_threads).run([[1] * 40, [1] * 40], 2)
