"""Divergence from full depth of what decodes faster: our modes as they are served, and llama.cpp's formats.

All read the same texts, token by token, as decoding does: answers that full depth drew at a temperature of 1. A figure
is the mean over tokens of KL(full depth ‖ this distribution), in nats; its spread is over the texts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy
import torch

from benchmarks.contenders import require_cached
from benchmarks.figures import Report
from benchmarks.peers.gguf_formats import MODULES
from benchmarks.rounds import Effort, progress
from benchmarks.setting import FULL_DEPTH, INT3, INT4, INT8, Setting
from dash_runtime.actions import Action
from dash_runtime.config import GenerationRequest, SamplingParameters, SkipOptions, StoppingParameters
from dash_runtime.engine import sequence
from dash_runtime.engine.engine import Engine
from dash_runtime.events import DepthStatistics, SequenceFinished, TokenLogprobs, TokenProduced

Distributions = Sequence[numpy.ndarray]
"""For each token of an answer the logarithms of all tokens' probabilities at its place, `[vocab_size]`."""


def measure_divergence(report: Report, setting: Setting, effort: Effort) -> None:
    """Adds the divergence of each mode and format."""
    engine, num_tokens = setting.engine, effort.stream_tokens
    progress("divergence: full depth's answers")
    texts = [(prompt, _answer(engine, prompt, num_tokens, seed)) for seed, prompt in enumerate(setting.prompts.exact)]
    references = [read_answer(engine, FULL_DEPTH, *text) for text in texts]
    modes = {"int8": INT8, "int4": INT4, "adaptive": setting.adaptive}
    if Action.INT3 in engine.facts.actions:
        modes["int3"] = INT3
    readers: dict[str, Callable[[list[int], list[int]], Distributions]] = {
        name: (lambda prompt, answer, skip=skip: read_answer(engine, skip, prompt, answer))
        for name, skip in modes.items()
    }
    for name, child in setting.ggufs.items():
        if name.startswith("llama_cpp"):
            readers[name] = lambda prompt, answer, child=child: _rows(child.logits([*prompt, *answer]), len(answer))
    for name, read in readers.items():
        progress(f"divergence: {name}")
        with report.attempt(f"divergence, {name}"):
            values = [
                float(numpy.mean([divergence(*pair) for pair in zip(reference, read(*text), strict=True)]))
                for text, reference in zip(texts, references, strict=True)
            ]
            report.add_mean(f"divergence_{name}", values)
    left_out = [peer for peer in MODULES if peer != "llama_cpp"]
    report.note(
        f"divergence_*: nats a token from full depth as it is served, of {len(texts)} answers of {num_tokens} tokens "
        "that full depth drew at a temperature of 1, read token by token; the mean, with its range over the texts. "
        f"{', '.join(left_out)} is not asked: its files have the same weights"
    )


def _answer(engine: Engine, prompt: list[int], num_tokens: int, seed: int) -> list[int]:
    sampling = SamplingParameters(temperature=1.0, seed=seed)
    stopping = StoppingParameters(num_tokens, ignore_eos=True)
    request = GenerationRequest("answer", prompt, stopping, sampling, FULL_DEPTH)
    return [event.token_id for event in _produced(engine, request)]


def read_answer(
    engine: Engine, skip: SkipOptions, prompt: list[int], answer: list[int], depths: list[DepthStatistics] | None = None
) -> Distributions:
    """Returns the distribution at each token of a given answer, and adds their depth to `depths`."""
    stopping = StoppingParameters(len(answer), ignore_eos=True)
    request = GenerationRequest("reading", prompt, stopping, skip=skip, logprobs=0, scored_token_ids=answer)
    with _whole_distributions() as rows:
        num_tokens = sum(1 for _ in _produced(engine, request, depths))
    assert len(rows) == num_tokens
    return rows


@contextmanager
def _whole_distributions() -> Iterator[list[numpy.ndarray]]:
    """Collects what the best log probabilities of each token would be taken from: a server gives the best 20."""
    rows: list[numpy.ndarray] = []

    def keep(logits: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
        rows.append(torch.log_softmax(logits.float(), dim=-1).numpy())
        return TokenLogprobs(float(rows[-1][token_id]), [])

    plain = sequence.token_logprobs
    sequence.token_logprobs = keep
    try:
        yield rows
    finally:
        sequence.token_logprobs = plain


def _produced(
    engine: Engine, request: GenerationRequest, depths: list[DepthStatistics] | None = None
) -> Iterator[TokenProduced]:
    engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, SequenceFinished):
                require_cached(event.num_cached_prompt_tokens, 0)
                if depths is not None:
                    depths.append(event.depth)
            elif isinstance(event, TokenProduced):
                yield event


def _rows(logits: numpy.ndarray, num_tokens: int) -> Distributions:
    """Returns the distributions of the last `num_tokens` tokens, each of which the logits before it make."""
    return list(torch.from_numpy(logits[-num_tokens - 1 : -1]).double().log_softmax(dim=-1).numpy())


def divergence(reference: numpy.ndarray, other: numpy.ndarray) -> float:
    """Returns KL(reference ‖ other) of logarithms of probabilities, in nats."""
    size = min(len(reference), len(other))  # a file may pad its vocabulary
    exact, own = reference[:size].astype(numpy.float64), other[:size].astype(numpy.float64)
    return float((numpy.exp(exact) * (exact - own)).sum())
