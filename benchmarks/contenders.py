"""The contenders of this process: our engine and transformers, each decoding greedily from token ids.

All stand behind one call, so that they can take turns. Knows models; knows no figures.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.runs import Run, run_from_arrivals
from dash_runtime.actions import Action
from dash_runtime.config import GenerationRequest, SamplingParameters, SkipOptions, StoppingParameters
from dash_runtime.constraint import Constraint
from dash_runtime.engine.engine import Engine
from dash_runtime.events import SequenceFinished, TokenProduced
from dash_runtime.policy.catalog import PolicyCatalog


class Contender(Protocol):
    """Continues all prompts at once by `num_tokens`, past any end of sequence."""

    def run(self, prompts: Sequence[list[int]], num_tokens: int) -> Run: ...


class EngineContender:
    """Our engine in one mode, without server or transport. With a constraint, its end ends an answer. With `prefill`
    prompts run in that action, also where a start found another one faster; not at full depth.

    Refuses a run whose prompts were not computed whole: what an earlier run left would make it too fast.
    """

    def __init__(
        self,
        engine: Engine,
        skip: SkipOptions,
        constraint: Constraint | None = None,
        sampling: SamplingParameters | None = None,
        prefill: Action | None = None,
    ) -> None:
        self._engine = engine
        self._skip = skip
        self._prefill = prefill
        self._constraint = constraint
        self._sampling = SamplingParameters() if sampling is None else sampling

    @torch.inference_mode()  # as a worker serves
    def run(self, prompts: Sequence[list[int]], num_tokens: int) -> Run:
        engine = self._engine
        arrivals: dict[str, list[tuple[float, int]]] = {str(number): [] for number in range(len(prompts))}
        shares: list[float] = []
        with ExitStack() as running:
            if self._prefill is not None:
                running.enter_context(prefilling_in(engine, self._prefill))
            started = time.perf_counter()
            for request_id, prompt in zip(arrivals, prompts, strict=True):
                running.callback(engine.cancel, request_id)
                stopping = StoppingParameters(num_tokens, ignore_eos=True)
                own = request_id, prompt, stopping, self._sampling
                engine.submit(GenerationRequest(*own, skip=self._skip, constraint=self._constraint))
            while engine.has_work:
                events = engine.step()
                now = time.perf_counter()
                for event in events:
                    if isinstance(event, TokenProduced):
                        arrivals[event.request_id].append((now, 1))
                    elif isinstance(event, SequenceFinished):
                        require_cached(event.num_cached_prompt_tokens, 0)
                        if event.decode_seconds:
                            shares.append(event.depth.exposed_ns / 1e9 / event.decode_seconds)
        return run_from_arrivals(started, list(arrivals.values()), sum(shares) / len(shares) if shares else 0.0)


def prefill_action_of(engine: Engine) -> Action:
    """Returns the action that prompts of those who are not at full depth have."""
    assert isinstance(engine._catalog, PolicyCatalog)
    return engine._catalog._prefill_action or Action.FULL


@contextmanager
def prefilling_in(engine: Engine, action: Action) -> Iterator[None]:
    """Gives these prompts another action meanwhile."""
    assert isinstance(engine._catalog, PolicyCatalog)
    kept = prefill_action_of(engine)
    engine._catalog.learn(prefill_action=action)
    try:
        yield
    finally:
        engine._catalog.learn(prefill_action=kept)


def require_cached(num_cached: int, expected: int) -> None:
    """Raises RuntimeError if other than so many tokens of a prompt came from an earlier one."""
    if num_cached != expected:
        raise RuntimeError(f"{num_cached} prompt tokens came from an earlier prompt, not {expected}")


class Transformers:
    """transformers' `generate` in bf16, with scaled-dot-product attention and a dynamic cache; or compiled, with a
    static one, which compiles anew for each sum of prompt and new tokens."""

    def __init__(self, folder: Path, is_compiled: bool = False) -> None:
        from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
        self._model.eval()
        # Without an end-of-sequence token, no processor forbids it and nothing looks for it.
        self._model.generation_config = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)
        self._options: Mapping[str, object] = {}
        if is_compiled:
            compiling = CompileConfig(mode="default")
            # Otherwise `generate` compiles for accelerators only.
            compiling._compile_all_devices = True
            self._options = {"cache_implementation": "static", "compile_config": compiling}

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
                **self._options,
                **assistance,
            )
        num_come = sum(count for _, count in arrivals)
        if num_come != num_tokens:
            raise RuntimeError(f"{num_come} tokens came instead of {num_tokens}")
        return run_from_arrivals(started, [arrivals] * len(prompts))
