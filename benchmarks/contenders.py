"""The contenders: our engine, transformers and llama.cpp, each decoding greedily from token ids.

All run in one process behind one call, so that they can take turns. Knows models; knows no figures.
"""

import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.runs import Run, run_from_arrivals
from dash_runtime.config import GenerationRequest, SkipOptions, StoppingParameters
from dash_runtime.constraint import Constraint
from dash_runtime.engine.engine import Engine
from dash_runtime.events import SequenceFinished, TokenProduced


class Contender(Protocol):
    """Continues all prompts at once by `num_tokens`, past any end of sequence."""

    def run(self, prompts: Sequence[list[int]], num_tokens: int) -> Run: ...


class EngineContender:
    """Our engine in one mode, without server or transport. With a constraint, its end ends an answer."""

    def __init__(self, engine: Engine, skip: SkipOptions, constraint: Constraint | None = None) -> None:
        self._engine = engine
        self._skip = skip
        self._constraint = constraint

    def run(self, prompts: Sequence[list[int]], num_tokens: int) -> Run:
        engine = self._engine
        arrivals: dict[str, list[tuple[float, int]]] = {str(number): [] for number in range(len(prompts))}
        shares: list[float] = []
        started = time.perf_counter()
        try:
            for request_id, prompt in zip(arrivals, prompts, strict=True):
                stopping = StoppingParameters(num_tokens, ignore_eos=True)
                request = GenerationRequest(request_id, prompt, stopping, skip=self._skip, constraint=self._constraint)
                engine.submit(request)
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
    """llama.cpp through llama-cpp-python, on the unchanged GGUF file. Takes the largest logit, without a sampler."""

    def __init__(self, file: Path, num_threads: int) -> None:
        import llama_cpp
        import numpy

        self._library, self._numpy = llama_cpp, numpy
        with redirect_stderr(StringIO()):
            self._llm = llama_cpp.Llama(
                str(file),
                n_ctx=2048,
                n_threads=num_threads,
                n_threads_batch=num_threads,
                n_gpu_layers=0,
                logits_all=False,
                verbose=False,
            )

    @property
    def description(self) -> str:
        info = self._library.llama_print_system_info().decode().strip(" |")
        return f"llama-cpp-python {self._library.__version__} ({info})"

    def run(self, prompts: Sequence[list[int]], num_tokens: int) -> Run:
        (prompt,) = prompts
        arrivals: list[tuple[float, int]] = []
        tokens = prompt
        self._llm.reset()
        started = time.perf_counter()
        for _ in range(num_tokens):
            self._llm.eval(tokens)
            tokens = [self._largest_logit()]
            arrivals.append((time.perf_counter(), 1))
        return run_from_arrivals(started, [arrivals])

    def _largest_logit(self) -> int:
        logits = self._library.llama_get_logits_ith(self._llm.ctx, -1)
        return int(self._numpy.ctypeslib.as_array(logits, shape=(self._llm.n_vocab(),)).argmax())
