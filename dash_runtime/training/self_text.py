"""Text that the model writes itself: its own answers to a list of prompts, at full depth.

A policy serves the text that its model writes, so it is trained on such text by default, beside Python's help. The text
is kept in a file, since writing it takes minutes on a CPU. Knows the engine, prompts and a chat template; knows no
policies and no training.
"""

import contextlib
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dash_runtime.actions import Action, CostTable
from dash_runtime.checkpoints import load_tokenizer
from dash_runtime.checkpoints.chat_template import ChatTemplate
from dash_runtime.config import EngineConfig, GenerationRequest, SamplingParameters, StoppingParameters
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.engine import Engine
from dash_runtime.errors import ConfigError, PolicyFileError
from dash_runtime.events import SequenceFinished, TokenProduced
from dash_runtime.files.tensor_file import save_tensors
from dash_runtime.layers.compensation import Identity
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.progress import Progress
from dash_runtime.startup.default_text import cut, default_token_sequences, encode
from dash_runtime.startup.measured_engine import assemble_engine
from dash_runtime.training.data import interleave

PROMPTS_FILE = Path(__file__).with_name("prompts.txt")
_VERSION = 1
_METADATA = "dash_self_text"
_HELP_SHARE = 3
"""One sequence in this many is from Python's help."""
_NUM_REPORTS = 20


def shipped_prompts() -> tuple[str, ...]:
    """Returns the prompts that come with the package, one per line of their file."""
    return tuple(line for line in PROMPTS_FILE.read_text("utf-8").splitlines() if line.strip())


@dataclass(frozen=True, slots=True)
class SelfTextSettings:
    """The prompts that the model answers, and the sampling of its answers.

    `num_slots` is the number of answers written at once; the text does not depend on it. `context_length` bounds a
    prompt with its answer: the decoder must be made for that many positions.
    """

    prompts: tuple[str, ...] = field(default_factory=shipped_prompts)
    seed: int = 0
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 200
    num_slots: int = 32
    context_length: int = 512


def default_training_sequences(
    decoder: Decoder,
    tokenizer_file: Path,
    chat_template: ChatTemplate,
    eos_ids: frozenset[int],
    num_sequences: int,
    sequence_length: int,
    cache_file: Path,
    progress: Progress,
    *,
    fingerprint: str,
    settings: SelfTextSettings | None = None,
) -> list[list[int]]:
    """Returns the text to train on if the user gives none: one sequence from Python's help to two that the model wrote.

    They are interleaved, so that any number from the start is the same mixture. The arguments are those of
    `self_generated_sequences`.

    Raises:
        DashRuntimeError: as for `self_generated_sequences`.
    """
    help_text = default_token_sequences(tokenizer_file, num_sequences // _HELP_SHARE, sequence_length)
    own_text = self_generated_sequences(
        decoder,
        tokenizer_file,
        chat_template,
        eos_ids,
        num_sequences - len(help_text),
        sequence_length,
        cache_file,
        progress,
        fingerprint=fingerprint,
        settings=settings,
    )
    return interleave([help_text, own_text])


def self_generated_sequences(
    decoder: Decoder,
    tokenizer_file: Path,
    chat_template: ChatTemplate,
    eos_ids: frozenset[int],
    num_sequences: int,
    sequence_length: int,
    cache_file: Path,
    progress: Progress,
    *,
    fingerprint: str,
    settings: SelfTextSettings | None = None,
) -> list[list[int]]:
    """Returns sequences of token ids from the model's own answers, each after its prompt in the model's chat template.

    The conversations are packed one after another and cut. The same model and settings give the same sequences; asking
    for fewer gives the first of them. They are read from `cache_file` if it holds enough of the same. Otherwise it is
    written; if that fails, the next run writes the text again.

    Args:
        eos_ids: the tokens that end an answer.
        progress: called with sentences.
        fingerprint: names the model (`model_sketch.model_fingerprint`).

    Raises:
        ConfigError: there are no prompts, or none fits in the context.
        CorruptCheckpoint: the tokenizer file cannot be used.
        InvalidRequest: a setting is out of range, or the chat template refuses a prompt.
    """
    settings = settings or SelfTextSettings()
    prompts = _prompt_ids(tokenizer_file, chat_template, settings)
    key = _key(fingerprint, tokenizer_file, chat_template, eos_ids, sequence_length, settings)
    kept = _read(cache_file, key, num_sequences, sequence_length, decoder.config.vocab_size)
    if kept is not None:
        return kept
    progress(f"letting the model write {num_sequences} sequences of {sequence_length} tokens (kept for later runs)")
    writer = _Writer(decoder, eos_ids, prompts, settings)
    sequences = writer.write(num_sequences, sequence_length, progress)
    _write(cache_file, key, sequences)
    return sequences


class _Writer:
    """Writes conversations: each is a prompt's token ids and then the answer's."""

    def __init__(
        self, decoder: Decoder, eos_ids: frozenset[int], prompts: Sequence[list[int]], settings: SelfTextSettings
    ) -> None:
        self._engine = _full_depth_engine(decoder, eos_ids, settings)
        self._settings = settings
        self._schedule = _schedule(prompts, settings.seed)
        self._conversations: list[list[int]] = []
        self._num_tokens = 0
        self._num_unfinished = 0

    def write(self, num_sequences: int, length: int, progress: Progress) -> list[list[int]]:
        """Returns exactly `num_sequences` of `length` token ids.

        Every conversation is written to its end, and they are packed in the order in which they began. In the order in
        which they end, short answers would be preferred.
        """
        wanted = num_sequences * length
        reported = 0
        while self._num_tokens < wanted or self._engine.has_work:
            while self._num_tokens < wanted and self._num_unfinished < self._settings.num_slots:
                self._begin(next(self._schedule))
            self._step()
            done = min(num_sequences, self._num_tokens // length)
            if (done - reported) * _NUM_REPORTS >= num_sequences:
                reported = done
                progress(f"the model has written {done} of {num_sequences} sequences")
        self._engine.close()
        return cut([token for ids in self._conversations for token in ids], length)[:num_sequences]

    def _begin(self, prompt: list[int]) -> None:
        settings = self._settings
        number = len(self._conversations)
        stopping = StoppingParameters(min(settings.max_new_tokens, settings.context_length - len(prompt)))
        seed = ((settings.seed << 32) + number) % (1 << 63)
        sampling = SamplingParameters(settings.temperature, top_p=settings.top_p, seed=seed)
        self._engine.submit(GenerationRequest(str(number), prompt, stopping, sampling))
        self._conversations.append(list(prompt))
        self._num_tokens += len(prompt)
        self._num_unfinished += 1

    def _step(self) -> None:
        for event in self._engine.step():
            if isinstance(event, TokenProduced):
                self._conversations[int(event.request_id)].append(event.token_id)
                self._num_tokens += 1
            elif isinstance(event, SequenceFinished):
                self._num_unfinished -= 1


def _schedule(prompts: Sequence[list[int]], seed: int) -> Iterator[list[int]]:
    """Yields all prompts again and again, each time in another order."""
    for turn in count():
        yield from random.Random(f"{seed}/{turn}").sample(prompts, len(prompts))


def _full_depth_engine(decoder: Decoder, eos_ids: frozenset[int], settings: SelfTextSettings) -> Engine:
    config = EngineConfig(settings.num_slots, settings.num_slots * settings.context_length, settings.context_length)
    # Nothing is decided at full depth, so the costs are never read.
    costs = CostTable(decoder.num_layers, {Action.FULL: 1 / decoder.num_layers}, {Action.FULL: 0.0})
    catalog = PolicyCatalog(costs, (Action.FULL,), Identity(), ())
    return assemble_engine(decoder, catalog, config, settings.context_length, eos_ids)


def _prompt_ids(tokenizer_file: Path, chat_template: ChatTemplate, settings: SelfTextSettings) -> list[list[int]]:
    """Returns the token ids of the rendered prompts that leave room for an answer."""
    if not settings.prompts:
        raise ConfigError("prompts", "are none")
    if chat_template.source is None:
        texts = [f"{prompt}\n" for prompt in settings.prompts]
    else:
        texts = [chat_template.render([("user", prompt)]) for prompt in settings.prompts]
    ids = encode(load_tokenizer(tokenizer_file), texts)
    fitting = [prompt for prompt in ids if 0 < len(prompt) < settings.context_length]
    if not fitting:
        raise ConfigError("prompts", f"none of them fits in {settings.context_length} tokens with an answer")
    return fitting


def _key(
    fingerprint: str,
    tokenizer_file: Path,
    chat_template: ChatTemplate,
    eos_ids: frozenset[int],
    sequence_length: int,
    settings: SelfTextSettings,
) -> str:
    """Returns a key that differs if the text would. The device and its precision are left out: text that the model
    wrote on another device is its text too."""
    facts = asdict(settings)
    del facts["num_slots"]
    tokenizer = hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    parts = (_VERSION, fingerprint, tokenizer, chat_template.source, sorted(eos_ids), sequence_length, facts)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read(file: Path, key: str, num_sequences: int, length: int, vocab_size: int) -> list[list[int]] | None:
    """Returns the first `num_sequences` in the file; None if it has too few, has another key or is damaged."""
    try:
        with safe_open(file, framework="pt") as kept:
            metadata = json.loads((kept.metadata() or {}).get(_METADATA, "{}"))
            ids = kept.get_tensor("token_ids")
    except (OSError, RecursionError, SafetensorError, ValueError):
        return None
    if ids.dtype != torch.int32 or ids.ndim != 2 or ids.shape[1] != length or len(ids) < num_sequences:
        return None
    if metadata != {"key": key, "sha256": _digest(ids)} or not bool(((ids >= 0) & (ids < vocab_size)).all()):
        return None
    sequences: list[list[int]] = ids[:num_sequences].tolist()
    return sequences


def _write(file: Path, key: str, sequences: list[list[int]]) -> None:
    """Writes the file in one rename."""
    ids = torch.tensor(sequences, dtype=torch.int32)
    metadata = {_METADATA: json.dumps({"key": key, "sha256": _digest(ids)})}
    # If the folder cannot be written to, the next run writes the text again.
    with contextlib.suppress(OSError, PolicyFileError):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, "self-written text", {"token_ids": ids}, metadata)


def _digest(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()
